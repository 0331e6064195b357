"""Arrays of an npz file and data from Python: one conversion, one set of checks, no value that changes unsaid."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_files import picture
from support.errors import refusal

from fbpc_ray.data import arrays
from fbpc_ray.data.datasets import Dataset, assemble, load

COUNT = 12
IMAGES = np.stack([picture(n % 3, n) for n in range(COUNT)])
"""(n, h, w, c)"""
LABELS = np.arange(COUNT) % 3


def from_python(*splits: Any, **options: Any) -> Dataset:
    return assemble(arrays.read(*splits, **options), "own")


def from_npz(folder: Path, **values: Any) -> Dataset:
    np.savez(folder / "a.npz", **values)
    return load(f"npz:{folder / 'a.npz'}")


def pairs(images: Any, labels: Any) -> list[tuple[Any, Any]]:
    return list(zip(images, labels, strict=True))


# ---- from Python


@pytest.mark.parametrize(
    "images",
    [
        IMAGES, IMAGES / 255, IMAGES.astype(np.int64), IMAGES.astype(">u2"), torch.tensor(IMAGES.transpose(0, 3, 1, 2)),
        torch.tensor(IMAGES.transpose(0, 3, 1, 2)).int(), torch.tensor(IMAGES.transpose(0, 3, 1, 2) / 255).float(),
        torch.tensor(IMAGES.transpose(0, 3, 1, 2) / 255).half(),
    ],
    ids=["uint8", "float64", "int64", "big endian", "tensor", "int32 tensor", "float tensor", "half tensor"],
)  # fmt: skip
@pytest.mark.parametrize("form", ["arrays", "pairs"])
def test_images_of_any_type_are_the_same_pixels(images, form):
    split = (images, LABELS) if form == "arrays" else pairs(images, LABELS.tolist())
    data = from_python(split, (IMAGES, LABELS))
    np.testing.assert_array_equal(data.train.images, IMAGES.transpose(0, 3, 1, 2))
    assert data.train.labels.tolist() == LABELS.tolist()


def test_bfloat16_tensors_are_read():
    images = torch.tensor(IMAGES.transpose(0, 3, 1, 2) / 255)
    data = from_python((images.bfloat16(), LABELS), (IMAGES, LABELS))
    expected = (images.bfloat16().float() * 255).round().numpy()
    np.testing.assert_array_equal(data.train.images, expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pictures_of_more_than_8_bits_are_refused_as_in_files(dtype):
    deep = [Image.fromarray((image[..., 0].astype(np.uint16) * 257).astype(dtype)) for image in IMAGES]
    assert "only 8 bits per channel" in refusal(from_python, pairs(deep, LABELS.tolist()))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("form", ["arrays", "pairs"])
def test_arrays_of_more_than_8_bits_are_refused(dtype, form):
    deep = IMAGES.astype(dtype) * 100
    split = (deep, LABELS) if form == "arrays" else pairs(deep, LABELS.tolist())
    assert "outside 0..255" in refusal(from_python, split)


@pytest.mark.parametrize("label", [1.7, 1.0, "1", None, torch.tensor(1.5), np.float32(1), np.array([0, 1])])
def test_labels_that_are_no_integers_are_refused(label):
    data = pairs(IMAGES, LABELS.tolist())
    data[5] = (IMAGES[5], label)
    message = refusal(from_python, data)
    assert "train[5] must be an (image, int label) pair" in message


@pytest.mark.parametrize("label", [2, np.int8(2), np.uint64(2), torch.tensor(2), torch.tensor([2]), np.array([2])])
def test_labels_of_any_integer_type_are_read(label):
    data = pairs(IMAGES, LABELS.tolist())
    data[5] = (IMAGES[5], label)
    assert from_python(data, (IMAGES, LABELS)).train.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("labels", [LABELS + 0.5, LABELS.astype("S1"), LABELS == 1, torch.tensor(LABELS).float()])
def test_arrays_of_labels_that_are_no_integers_are_refused(labels):
    assert "it must be integers, one per image" in refusal(from_python, (IMAGES, labels))


@pytest.mark.parametrize("as_pairs", [[("a", 1), ("b", 2)], [1, 2], ["images", "labels"], ([[1], [2, 3]], [0, 1])])
def test_lists_of_two_that_are_no_images_are_one_line(as_pairs):
    assert "the data given" in refusal(from_python, as_pairs)


def test_a_list_of_two_pairs_is_a_data_set_of_two_images():
    raw = arrays.read([(IMAGES[0], 0), (IMAGES[1], 1)])
    np.testing.assert_array_equal(raw.parts["train"].images, IMAGES[:2].transpose(0, 3, 1, 2))
    assert raw.parts["train"].labels.tolist() == [0, 1]


def test_images_and_labels_may_be_a_list_of_two_arrays():
    np.testing.assert_array_equal(arrays.read([IMAGES, LABELS]).parts["train"].images, IMAGES.transpose(0, 3, 1, 2))


def test_images_of_two_types_are_refused():
    data = pairs(IMAGES, LABELS.tolist())
    data[3] = (IMAGES[3] / 255, 0)
    assert "train[3] is float64, the first image is uint8" in refusal(from_python, data)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(4, 3, 8, 8, dtype=torch.complex64), torch.zeros(4, 3, 8, 8).to_sparse(), np.full((4, 8, 8), "a"),
     torch.zeros(4, 3, 8, 8, device="meta")],
    ids=["complex", "sparse", "text", "meta"],
)  # fmt: skip
def test_other_tensors_are_one_line(images):
    assert "images" in refusal(from_python, (images, [0, 1, 0, 1]))


def test_a_test_split_of_minus_ones_is_left_out_with_a_note():
    data = from_python((IMAGES, LABELS), (IMAGES, np.full(COUNT, -1)), (IMAGES, LABELS))
    assert data.test.labels.tolist() == LABELS.tolist() and "all of its labels are -1" in data.notes[0]


def test_names_of_classes_are_checked():
    message = refusal(from_python, (IMAGES, LABELS), classes=["a", "b\x1b", "c"])
    assert "control characters" in message and message.isprintable()


# ---- npz


def test_floats_and_columns_of_labels(tmp_path):
    first = IMAGES.transpose(0, 3, 1, 2)
    data = from_npz(
        tmp_path, x_train=(first / 255).astype(np.float16), y_train=LABELS.astype(np.int32)[:, None],
        x_test=first / 255, y_test=LABELS,
    )  # fmt: skip
    np.testing.assert_array_equal(data.train.images, first)
    np.testing.assert_array_equal(data.test.images, first)


def test_big_endian_and_fortran_order(tmp_path):
    data = from_npz(
        tmp_path, x_train=np.asfortranarray(IMAGES.astype(">u2")), y_train=LABELS.astype(">i4"), x_test=IMAGES,
        y_test=LABELS,
    )  # fmt: skip
    np.testing.assert_array_equal(data.train.images, data.test.images)


@pytest.mark.parametrize(
    ("images", "top"),
    [(IMAGES.astype(np.float32) / 255 / 255, 1), ((IMAGES > 120).astype(np.int64), 1), (IMAGES // 20, 12)],
)
def test_images_of_few_levels_get_a_note(tmp_path, images, top):
    data = from_npz(tmp_path, x_train=images, y_train=LABELS, x_test=IMAGES, y_test=LABELS)
    assert f"use the levels 0..{top} of 0..255" in data.notes[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x_train": IMAGES, "y_train": LABELS + 1}, "labels run from 1 to 3; they must start at 0"),
        ({"x_train": IMAGES, "y_train": LABELS == 1}, "y_train is bool"),
        ({"X_train": IMAGES, "Y_train": LABELS}, "no array y_train (found X_train, Y_train)"),
        (
            {"train_images": IMAGES[..., 0], "train_labels": 2 * np.eye(3, dtype=np.uint8)[LABELS]},
            "train_labels is uint8",
        ),
        ({"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES}, "no array y_test"),
        ({"x_train": IMAGES, "y_train": LABELS.astype(np.uint64) + 2**63}, "holds 9223372036854775810"),
        ({"x_train": np.array([IMAGES[0], IMAGES[1][:3]], object), "y_train": [0, 1]}, "not a readable npz file"),
    ],
)
def test_arrays_that_are_refused(tmp_path, values, message):
    assert message in refusal(from_npz, tmp_path, **values)


@pytest.mark.parametrize("word", ["val", "valid", "validation"])
@pytest.mark.parametrize("form", ["x_{}", "X_{}", "{}_images"])
def test_names_of_validation_arrays(tmp_path, word, form):
    images = form.format(word)
    labels = images.replace("x_", "y_").replace("X_", "y_").replace("images", "labels")
    data = from_npz(tmp_path, x_train=IMAGES, y_train=LABELS, x_test=IMAGES, y_test=LABELS, **{
        images: IMAGES[:6], labels: LABELS[:6]})  # fmt: skip
    assert len(data.validation.labels) == 6 and not data.notes


def test_an_empty_split_is_refused_as_such(tmp_path):
    empty = {"x_test": IMAGES[:0], "y_test": LABELS[:0]}
    assert "x_test is empty; add images, or leave out this split" in refusal(
        from_npz, tmp_path, x_train=IMAGES, y_train=LABELS, **empty
    )


def test_a_one_hot_column_without_an_image_is_refused(tmp_path):
    rows = np.eye(14, dtype=np.uint8)[LABELS]
    assert "class '3' (label 3)" in refusal(from_npz, tmp_path, train_images=IMAGES, train_labels=rows)


def test_columns_of_names_are_names(tmp_path):
    names = np.array(["cat", "dog", "eel"])[LABELS][:, None]
    data = from_npz(tmp_path, x_train=IMAGES, y_train=names, x_test=IMAGES, y_test=names)
    assert data.classes == ("cat", "dog", "eel") and data.train.labels.tolist() == LABELS.tolist()


def test_files_of_another_kind_are_refused_without_advice_to_unpickle(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "b.npz").write_bytes(b"PAR1" * 9)
    for name in ("a.npy", "b.npz"):
        message = refusal(load, f"npz:{tmp_path / name}")
        assert "not a whole archive of numpy.savez" in message and "pickle" not in message
    assert f"is a folder; give npz:FILE, or folder:{tmp_path}" in refusal(load, f"npz:{tmp_path}")


def test_arrays_that_are_not_read_are_named(tmp_path):
    data = from_npz(tmp_path, x_train=IMAGES, y_train=LABELS, x_test=IMAGES, y_test=LABELS, masks=IMAGES)
    assert "left out the arrays masks" in data.notes[0]


def test_medmnist(tmp_path):
    split = {f"{name}_{word}": values for name in ("train", "val", "test") for word, values in (
        ("images", IMAGES[..., 0]), ("labels", LABELS[:, None].astype(np.uint8)))}  # fmt: skip
    data = from_npz(tmp_path, **split)
    assert [len(part.labels) for part in (data.train, data.validation, data.test)] == [12, 12, 12]
    assert data.image_shape == (1, 8, 8) and not data.notes


def test_damaged_members_of_an_archive_are_one_line(tmp_path):
    path = tmp_path / "a.npz"
    header = b"\x93NUMPY\x01\x00"
    for body in (b"{" * 60, b"(" * 60_000, b"{'descr': '<f4', 'fortran_order': False, 'shape': ('x',), }\n"):
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("x_train.npy", "y_train.npy"):
                archive.writestr(name, header + (len(body) % 65536).to_bytes(2, "little") + body)
        assert "not a readable npz file" in refusal(load, f"npz:{path}")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(load, f"npz:{path}")


def test_paths_that_are_no_files_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (f"npz:{tmp_path / 'pipe'}", f"parquet:{tmp_path / 'pipe'}"):
        assert "neither a folder nor a regular file" in refusal(load, name)
    for name in ("folder:~nobody-of-this-name/x", "folder:a\0b", f"npz:{tmp_path}", "folder:" + "x" * 5000):
        assert refusal(load, name)


# ---- names and one-hot rows, of npz and of Python


NAMES = np.array(["zebra", "ant", "cow"])[LABELS]
ONE_HOT = np.eye(3)[LABELS]


def test_names_of_an_npz_are_classes_in_alphabetical_order(tmp_path):
    data = from_npz(tmp_path, x_train=IMAGES, y_train=NAMES, x_test=IMAGES[:6], y_test=NAMES[:6])
    assert data.classes == ("ant", "cow", "zebra")
    assert [data.classes[label] for label in data.train.labels] == NAMES.tolist()
    assert [data.classes[label] for label in data.test.labels] == NAMES[:6].tolist()
    mixed = {"x_train": IMAGES, "y_train": NAMES, "x_test": IMAGES, "y_test": LABELS}
    assert "labels of train are names, those of test are not; use one form" in refusal(from_npz, tmp_path, **mixed)
    twice = np.array(["caf\u00e9", "cafe\u0301", "tea"])[LABELS]
    assert "differ only in Unicode form" in refusal(from_npz, tmp_path, x_train=IMAGES, y_train=twice)


@pytest.mark.parametrize("form", [list, np.array, pairs])
def test_names_from_python(form):
    split = pairs(IMAGES, NAMES.tolist()) if form is pairs else (IMAGES, form(NAMES.tolist()))
    assert from_python(split, (IMAGES, NAMES)).classes == ("ant", "cow", "zebra")
    data = from_python(split, (IMAGES, NAMES), classes=("zebra", "ant", "cow"))
    assert data.train.labels.tolist() == LABELS.tolist()
    message = refusal(from_python, split, classes=("zebra", "ant"))
    assert "label 'cow' is none of the classes (zebra, ant)" in message


@pytest.mark.parametrize("rows", [ONE_HOT, ONE_HOT.astype(bool), ONE_HOT.astype(np.uint8), torch.tensor(ONE_HOT)])
def test_one_hot_rows_are_class_numbers(tmp_path, rows):
    data = from_npz(tmp_path, x_train=IMAGES, y_train=np.asarray(rows), x_test=IMAGES, y_test=LABELS)
    assert data.train.labels.tolist() == LABELS.tolist()
    assert "labels of train are one-hot, read as the numbers of 3 classes" in data.notes[0]
    for split in ((IMAGES, rows), pairs(IMAGES, rows)):
        assert from_python(split, (IMAGES, LABELS)).train.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("row", [[0, 0, 0], [1, 1, 0], [0.5, 0.5, 0], [2, 0, -1], [float("nan"), 1, 0]])
def test_a_row_that_is_not_one_hot_is_refused(tmp_path, row):
    rows = ONE_HOT.copy()
    rows[3] = row
    assert "it must be integers, one per image, or names, or one-hot rows" in refusal(
        from_npz, tmp_path, x_train=IMAGES, y_train=rows
    )


@pytest.mark.parametrize(
    "keys", [("X_train", "y_train"), ("images", "targets"), ("imgs", "labels"), ("data", "targets")]
)
def test_other_names_of_arrays(tmp_path, keys):
    data = from_npz(tmp_path, **{keys[0]: IMAGES, keys[1]: LABELS, "x_test": IMAGES, "y_test": LABELS})
    assert data.train.labels.tolist() == LABELS.tolist()
