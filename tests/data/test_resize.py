"""--image-size: torchvision's Resize and CenterCrop to the bit, for every source; another size is another data set."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_files import encode, picture, write_table
from support.runs import flags, refused
from torchvision.transforms import functional as theirs

from fbpc_ray.commands import main
from fbpc_ray.core.config import read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.data import arrays
from fbpc_ray.data.datasets import Dataset, assemble, load
from fbpc_ray.data.resize import Resizing, resized, resized_arrays

SIZES = [(8, 8), (20, 9), (9, 20), (33, 17), (64, 64), (16, 16), (17, 16), (5, 40), (12, 7), (10, 30)]
"""(width, height) of image number i."""


def oracle(image: np.ndarray, size: int, mode: str) -> np.ndarray:
    """(h, w, c) uint8 -> (c, size, size) by torchvision on a PIL image."""
    shape = size if mode == "crop" else [size, size]
    whole = theirs.resize(Image.fromarray(image), shape, theirs.InterpolationMode.BICUBIC)  # type: ignore[arg-type]
    return np.asarray(theirs.center_crop(whole, [size, size])).transpose(2, 0, 1)


def mixed(count: int = 10) -> list[np.ndarray]:
    return [picture(number % 2, number, SIZES[number % len(SIZES)]) for number in range(count)]


def write_folder(root: Path, images: list[np.ndarray]) -> str:
    for split in ("train", "test"):
        for number, image in enumerate(images):
            path = root / split / "ab"[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(image))
    return f"folder:{root}"


def write_parquet(root: Path, images: list[np.ndarray]) -> str:
    for split in ("train", "test"):
        write_table(root / f"{split}.parquet", [(encode(image), number % 2) for number, image in enumerate(images)])
    return f"parquet:{root}"


def from_python(train: Any, **options: Any) -> Dataset:
    return assemble(arrays.read(train, train, resizing=Resizing(**options)), "own")


@pytest.mark.parametrize("mode", ["crop", "stretch"])
@pytest.mark.parametrize("side", [8, 16, 31])
def test_an_image_of_any_shape_is_what_torchvision_makes_of_it(side, mode):
    for image in mixed():
        result = np.asarray(resized(Image.fromarray(image), Resizing(side, mode))).transpose(2, 0, 1)
        np.testing.assert_array_equal(result, oracle(image, side, mode))
        planes = resized_arrays(image.transpose(2, 0, 1)[None, :2], Resizing(side, mode))[0]
        np.testing.assert_array_equal(planes, oracle(image, side, mode)[:2])


def test_reducing_is_antialiased():
    """A pattern of one pixel becomes its mean, which a filter that samples single pixels misses."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[::2] = 200
    small = np.asarray(resized(Image.fromarray(image), Resizing(8)))
    assert np.abs(small.astype(int) - 100).max() <= 6


@pytest.mark.parametrize("mode", ["crop", "stretch"])
@pytest.mark.parametrize("source", ["folder", "parquet", "pairs", "lists", "tensors"])
def test_files_and_python_data_of_several_sizes_are_read(tmp_path, source, mode):
    images, labels = mixed(), [number % 2 for number in range(10)]
    order = list(range(10))
    if source == "folder":
        data = load(write_folder(tmp_path, images), image_size=16, resize=mode)
        order = [*range(0, 10, 2), *range(1, 10, 2)]
    elif source == "parquet":
        data = load(write_parquet(tmp_path, images), image_size=16, resize=mode)
    elif source == "pairs":
        data = from_python([(Image.fromarray(i), n) for i, n in zip(images, labels, strict=True)], size=16, mode=mode)
    elif source == "lists":
        data = from_python((images, labels), size=16, mode=mode)
    else:
        tensors = [torch.tensor(image.transpose(2, 0, 1)) for image in images]
        data = from_python((tensors, labels), size=16, mode=mode)
    assert data.image_shape == (3, 16, 16)
    np.testing.assert_array_equal(data.train.images, np.stack([oracle(images[n], 16, mode) for n in order]))
    assert data.train.labels.tolist() == [labels[n] for n in order]
    way = "short side, then centre crop" if mode == "crop" else "stretched"
    note = f"10 images of 10 sizes, 8x8 to 64x64, resized to 16x16 ({way}); 6 of them were smaller"
    assert [note in text for text in data.notes] == [True, True]


@pytest.mark.parametrize("name", ["digits", "npz", "grey npz"])
def test_arrays_of_one_size_are_resized(tmp_path, name):
    if name == "digits":
        assert load("digits", image_size=12).image_shape == (1, 12, 12)
        return
    images, labels = np.stack([picture(n % 2, n, (20, 9)) for n in range(8)]), np.arange(8) % 2
    stored = images[..., 0] if name == "grey npz" else images
    np.savez(tmp_path / "a.npz", x_train=stored, y_train=labels, x_test=stored[:4, :, :14], y_test=labels[:4])
    data = load(f"npz:{tmp_path / 'a.npz'}", image_size=8)
    wanted = np.stack([oracle(image, 8, "crop") for image in images])
    np.testing.assert_array_equal(data.train.images, wanted[:, :1] if name == "grey npz" else wanted)
    assert data.test.images.shape[2:] == (8, 8)
    assert any("train: 8 images of size 20x9, resized to 8x8" in note for note in data.notes)


def test_another_size_is_another_data_set_and_an_unused_one_is_none(tmp_path):
    """Experts are found by the fingerprint, which is of the resized images; without the flag it is as before."""
    square = write_folder(tmp_path / "square", [picture(n % 2, n) for n in range(10)])
    long = write_folder(tmp_path / "long", [picture(n % 2, n, (12, 8)) for n in range(10)])
    prints = [
        load(square).fingerprint, load(square, image_size=6).fingerprint, load(long).fingerprint,
        load(long, image_size=8).fingerprint, load(long, image_size=8, resize="stretch").fingerprint,
    ]  # fmt: skip
    assert len(set(prints)) == 5
    assert load(square, image_size=8).fingerprint == prints[0]
    assert load(square, image_size=8).notes == ()
    assert prints[0] == "b968f0931e83d038"  # by the code before --image-size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "all images must have one size: resize them, such as by --image-size 32"),
        ({"image_size": -1}, "--image-size -1: must be 0"),
        ({"image_size": 5000}, "--image-size 5000: must be 0 (as the images are) to 4096"),
        ({"resize": "pad", "image_size": 8}, "--resize pad: must be one of crop, stretch"),
        ({"resize": "stretch"}, "--resize stretch needs a size: add --image-size 32"),
    ],
)
def test_refusals_are_one_line_with_the_fix(tmp_path, options, message):
    for write in (write_folder, write_parquet):
        with pytest.raises(UserError) as caught:
            load(write(tmp_path / write.__name__, mixed()), **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_long_strip_is_refused_and_stretched(tmp_path):
    images = [*mixed(9), picture(1, 0, (2000, 3))]
    with pytest.raises(UserError, match=r"009\.png: not a readable image \(2000x3, too long to crop; --resize stretch"):
        load(write_folder(tmp_path, images), image_size=8)
    assert load(write_folder(tmp_path, images), image_size=8, resize="stretch").image_shape == (3, 8, 8)


def test_python_data_of_several_sizes_name_the_argument():
    with pytest.raises(UserError, match=r"resize them, such as by image_size=32"):
        from_python([(Image.fromarray(image), number % 2) for number, image in enumerate(mixed())])


def test_a_run_keeps_the_size_and_what_it_exports_is_scored_with_the_same_flag(small, tmp_path, capsys):
    """`fbpc distill --image-size 8` on ten sizes; `fbpc evaluate`, RUN and --coreset, with and without the flag."""
    data, out = write_folder(tmp_path / "images", mixed(20)), tmp_path / "run"
    chosen = {"architectures": ("convnet-in",), "num_chains": 1, "chain_epochs": 2, "chain_every": 1}
    words = flags(small, data=data, image_size=8, method="random", backend="serial", out=str(out), **chosen)
    main.main(["distill", *words])
    assert "resized to 8x8 (short side, then centre crop)" in capsys.readouterr().out
    assert (read_config(out).data.image_size, read_config(out).data.resize) == (8, "crop")
    main.main(["evaluate", str(out), "--backend", "serial", "--json", str(tmp_path / "again.json")])
    scores = {name: json.loads((tmp_path / name).read_text())["coresets"] for name in ("run/result.json", "again.json")}
    assert scores["again.json"] == scores["run/result.json"]
    main.main(["export", str(out), "--format", "npz", "--out", str(tmp_path / "mine")])
    words = ["--coreset", str(tmp_path / "mine.npz"), "--data", data, "--backend", "serial", "--width", "8",
             "--num-chains", "1", "--chain-epochs", "2", "--chain-every", "1", "--threads", "1"]  # fmt: skip
    for size in (["--image-size", "8"], []):  # the file says 8
        main.main(["evaluate", *words, *size, "--json", str(tmp_path / "coreset.json")])
        scored = json.loads((tmp_path / "coreset.json").read_text())["coresets"]["given"]
        assert scored == scores["run/result.json"]["random"]
    assert "--image-size" in refused(capsys, *words, "--image-size", "16", command="evaluate")
