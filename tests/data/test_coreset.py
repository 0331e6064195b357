"""Coresets: the draw is balanced and uniform, and a file gives back what was saved or one line of refusal."""

import json
import math
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from support.errors import refusal

from fbpc_ray.core.rng import generator
from fbpc_ray.data.coreset import Coreset, balanced, dumps, load, metadata, save

NAMES = ("cat", "dog", "ship")


def coreset(m: int = 6) -> Coreset:
    """Non-contiguous images, names beyond ASCII, and a mean that has no short decimal form."""
    images = torch.randn(m, 4, 5, 3, generator=generator(0, "images")).permute(0, 3, 1, 2)
    return Coreset(images, torch.arange(m) % 3, (1 / 3, 0.1, 0.2), (0.25, math.pi, 1e-3), ("cat", "Hündin", 'a "b"'))


# The draw


def test_a_draw_is_balanced_ordered_and_without_repeats():
    labels = torch.randint(0, 3, (200,), generator=generator(0, "labels"))
    for ipc in (1, 7, int(labels.bincount().min())):
        indices = balanced(labels, ipc, NAMES, generator(0, "draw"))
        assert indices.dtype == torch.int64 and indices.shape == (3 * ipc,)
        assert labels[indices].tolist() == [0] * ipc + [1] * ipc + [2] * ipc
        assert len(set(indices.tolist())) == 3 * ipc


def test_a_draw_is_a_function_of_its_generator():
    labels = torch.arange(300) % 3
    first, again, other = (balanced(labels, 10, NAMES, generator(seed, "draw")) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(balanced(labels, 4, NAMES, generator(0, "draw")), first.reshape(3, 10)[:, :4].flatten()), (
        "nested"
    )


def test_a_draw_is_uniform_within_each_class():
    """2 of 5 in 2,000 draws: each index 800 times in the mean, standard deviation sqrt(2000 * .4 * .6) = 22; and
    each of the 20 ordered pairs 100 times, standard deviation 9.7."""
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 0, 1])
    source = generator(0, "many")
    draws = torch.stack([balanced(labels, 2, ("a", "b"), source) for _ in range(2000)])
    counts = draws.flatten().bincount(minlength=10)
    assert (counts - 800).abs().max() < 5 * 22
    pairs = (10 * draws[:, 0] + draws[:, 1]).bincount(minlength=100)
    assert (pairs > 0).sum() == 20 and (pairs[pairs > 0] - 100).abs().max() < 5 * 9.7


def test_more_images_than_a_class_has_are_refused():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    assert len(balanced(labels, 2, NAMES, generator(0))) == 6
    line = refusal(balanced, labels, 3, NAMES, generator(0))
    assert line == "class 'dog' has 2 images, ipc is 3: lower --ipc, or give more data"
    assert "class 'fox' has 0 images" in refusal(balanced, labels, 1, (*NAMES, "fox"), generator(0))
    for ipc in (0, -1):
        assert f"--ipc: must be 1 or more, got {ipc}" in refusal(balanced, labels, ipc, NAMES, generator(0))
    with pytest.raises(ValueError, match="float32"):
        balanced(labels.float(), 1, NAMES, generator(0))


# What a reader sees


def test_a_coreset_is_described_in_three_lines():
    facts = {"method": "fbpc", "data": "digits", "step": "60", "settings": '{"architectures": ["a", "b"], "width": 8}'}
    assert repr(coreset()._replace(facts=facts)).splitlines() == [
        "Coreset of 6 images of 3 x 4 x 5, 3 classes, hard labels",
        'classes: cat, Hündin, a "b"',
        "distilled by fbpc, from digits, step 60, on a b, width 8",
    ]
    random = facts | {"method": "random", "step": "0"}
    assert repr(coreset()._replace(facts=random)).splitlines()[2:] == ["real images, drawn at random, from digits"]
    assert len(repr(coreset()).splitlines()) == 2


def test_the_description_of_a_strangers_file_is_short_text():
    """No line of its own, no markup, whatever the metadata says."""
    hostile = "<b>x</b>\n" + "y" * 500
    result = coreset()._replace(classes=(hostile, "b", "c"), facts={"method": hostile, "settings": "[1"})
    lines = repr(result).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 100
    assert "<b>" not in result._repr_html_() and "&lt;b&gt;" in result._repr_html_()


# The file


def test_soft_labels_come_back_to_the_bit_and_are_probabilities_for_a_likelihood(tmp_path):
    hard = coreset()
    assert torch.equal(hard.likelihood_labels, hard.labels)
    logits = torch.randn(len(hard.labels), len(hard.classes), generator=generator(1))
    save(hard._replace(soft_labels=logits), tmp_path / "soft.safetensors")
    back = load(tmp_path / "soft.safetensors")
    assert back.soft_labels is not None and torch.equal(back.soft_labels, logits)
    assert torch.equal(back.labels, hard.labels)
    torch.testing.assert_close(back.likelihood_labels, logits.exp() / logits.exp().sum(1, keepdim=True))


def test_soft_labels_of_another_shape_type_or_that_are_not_finite_are_refused():
    hard = coreset()
    good = torch.zeros(len(hard.labels), len(hard.classes))
    for bad in (good[:, :-1], good[1:], good.double(), good + torch.inf):
        with pytest.raises(ValueError, match="soft labels are"):
            dumps(hard._replace(soft_labels=bad))


def test_a_coreset_comes_back_to_the_bit(tmp_path):
    saved, path = coreset(), tmp_path / "new" / "coreset.safetensors"
    save(saved._replace(images=saved.images.clone().requires_grad_()), path, {"commit": "abc", "ipc": "2"})
    back = load(path)
    assert back.images.dtype == torch.float32 and torch.equal(back.images, saved.images)
    assert back.labels.dtype == torch.int64 and torch.equal(back.labels, saved.labels)
    assert back[2:6] == saved[2:6] and all(isinstance(value, tuple) for value in back[2:5])
    assert back.facts == {"commit": "abc", "ipc": "2"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["commit"] == "abc" and file.metadata()["ipc"] == "2"
    path.write_bytes(b"overwritten in place")  # what was loaded does not depend on the file any more
    assert torch.equal(back.images, saved.images)
    back.images.zero_()


def test_saving_again_replaces_and_gives_the_same_bytes(tmp_path):
    path = tmp_path / "c"
    save(coreset(3), path)
    save(coreset(), path)
    first = path.read_bytes()
    save(coreset(), path)
    assert path.read_bytes() == first and len(load(path).images) == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(6, 3, 4, 5, dtype=torch.float64)}, "images are torch.float64"),
        ({"images": torch.zeros(6, 3, 4)}, "expected float32 (m, c, h, w)"),
        ({"images": torch.zeros(0, 3, 4, 5), "labels": torch.zeros(0, dtype=torch.int64)}, "(0, 3, 4, 5)"),
        ({"images": torch.full((6, 3, 4, 5), float("nan"))}, "not finite"),
        ({"labels": torch.zeros(6)}, "labels are torch.float32"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "expected int64 (6,)"),
        ({"labels": torch.full((6,), 3)}, "labels from 3 to 3, but 3 classes"),
        ({"labels": torch.full((6,), -1)}, "labels from -1 to -1"),
        ({"mean": (0.5,)}, "1 means and 3 stds for 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "not a normalisation"),
        ({"mean": (0.0, float("nan"), 1.0)}, "not a n"),  # in a file, NaN is not a number of JSON
        ({"mean": ("a", 0.0, 1.0)}, "not a normalisation"),
        ({"classes": (1, 2, 3)}, "not text"),
        ({"classes": ()}, "but 0 classes"),
    ],
)
def test_what_is_not_a_coreset_is_neither_saved_nor_loaded(tmp_path, change, words):
    bad, path = coreset()._replace(**change), tmp_path / "c"
    with pytest.raises(ValueError) as caught:
        save(bad, path)
    assert words in str(caught.value) and not path.exists()
    facts = {name: json.dumps(list(getattr(bad, name))) for name in ("mean", "std", "classes")}
    tensors = {"images": bad.images.contiguous(), "labels": bad.labels}
    path.write_bytes(to_bytes(tensors, {"format": "1", **facts}))
    line = refusal(load, path)
    assert str(path) in line and words in line and "fbpc distill" in line


@pytest.mark.parametrize("missing", ["images", "labels", "format", "mean", "std", "classes"])
def test_a_file_without_one_of_its_parts_is_refused(tmp_path, missing):
    saved, path = coreset(), tmp_path / "c"
    facts = {"format": "1", **{name: json.dumps(list(getattr(saved, name))) for name in ("mean", "std", "classes")}}
    tensors = {"images": saved.images.contiguous(), "labels": saved.labels}
    path.write_bytes(to_bytes(tensors, facts))
    load(path)
    for part in (facts, tensors):
        part.pop(missing, None)
    path.write_bytes(to_bytes(tensors, facts))
    assert missing in refusal(load, path)


@pytest.mark.parametrize(("key", "text"), [("format", "2"), ("mean", "5"), ("std", "["), ("classes", "null")])
def test_metadata_that_says_something_else_is_refused(tmp_path, key, text):
    saved, path = coreset(), tmp_path / "c"
    facts = {"format": "1", **{name: json.dumps(list(getattr(saved, name))) for name in ("mean", "std", "classes")}}
    path.write_bytes(to_bytes({"images": saved.images.contiguous(), "labels": saved.labels}, {**facts, key: text}))
    assert str(path) in refusal(load, path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c"
    assert f"{path}: coreset not found" in refusal(load, path)
    assert "must be a regular file, is a folder" in refusal(load, tmp_path)
    torch.save(coreset()._asdict(), path)  # a zip file with a pickle in it
    assert "is not a coreset" in refusal(load, path)
    for data in (pickle.dumps(coreset()), b"", b"\0" * 100, b"PK\3\4"):
        path.write_bytes(data)
        assert "is not a coreset" in refusal(load, path)


def test_a_damaged_file_is_refused(tmp_path):
    """Every length, and every byte flipped: one line, no traceback."""
    path = tmp_path / "c"
    save(coreset(3), path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert "is not a coreset" in refusal(load, path)
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        assert "is not a coreset" in refusal(load, path)


def test_metadata_may_not_hide_the_files_own(tmp_path):
    with pytest.raises(ValueError, match="mean"):
        save(coreset(), tmp_path / "c", {"mean": "[0]"})
    assert not list(tmp_path.iterdir())


# The header


def test_metadata_reads_the_header_and_no_tensor(tmp_path, monkeypatch):
    path = tmp_path / "coreset.safetensors"
    save(coreset(), path, {"step": "7"})
    pages = bytearray(path.read_bytes())
    pages[-coreset().images.numel() * 4 :] = b"\xff" * (coreset().images.numel() * 4)  # all of them NaN
    path.write_bytes(pages)
    assert metadata(path)["step"] == "7"
    assert "its checksum is not that of its content" in refusal(load, path)


def test_metadata_refuses_the_headers_that_load_refuses(tmp_path):
    path = tmp_path / "coreset.safetensors"
    facts = {"format": "1", "mean": "[0]", "std": "[1]", "classes": '["a", "b"]'}
    images, labels = torch.zeros(2, 1, 3, 3), torch.tensor([0, 1])
    wrong = [
        ({"images": images, "labels": labels}, facts | {"format": "2"}),
        ({"images": images, "labels": labels}, facts | {"std": "[0]"}),
        ({"images": images, "labels": labels}, facts | {"mean": "[0, 0]"}),
        ({"images": images, "labels": labels}, facts | {"classes": "[1, 2]"}),
        ({"images": images, "labels": labels[:1]}, facts),
        ({"images": images[0], "labels": labels}, facts),
        ({"images": images[0, 0, 0], "labels": labels}, facts),
        ({"images": images.double(), "labels": labels}, facts),
        ({"images": images}, facts),
        ({"images": images, "labels": labels}, {}),
    ]
    for tensors, words in wrong:
        path.write_bytes(to_bytes(tensors, words))
        assert "is not a coreset" in refusal(metadata, path) and refusal(load, path)
    path.write_bytes(to_bytes({"images": images, "labels": labels}, facts))
    assert metadata(path) == facts
    path.write_bytes(path.read_bytes()[:-4])
    assert "is not a coreset" in refusal(metadata, path)
    assert "coreset not found" in refusal(metadata, tmp_path / "none")
