"""Bad data is refused in one clear line, with the cause and the place."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.image_files import (
    encoded,
    pixels,
    whole_npz,
    write_images,
    write_npz,
    write_pair,
    write_parquet,
    write_tiny_imagenet,
)

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.datasets import load


def unreadable(path: Path) -> str:
    path.write_bytes(b"not what it says")
    return str(path)


def parquet_with(folder: Path, blobs: dict[int, bytes | None] | None = None, labels: Any = None, **options: Any) -> str:
    """A train shard of 4 good rows and one of 4 rows with `blobs` or `labels` put in; a good test file."""
    good = [encoded(image) for image in pixels(4)]
    changed: list[bytes | None] = [*good]
    for row, blob in (blobs or {}).items():
        changed[row] = blob
    write_parquet(folder / "train-0.parquet", good, [0, 1, 0, 1], **options)
    write_parquet(folder / "train-1.parquet", changed, labels or [0, 1, 0, 1], **options)
    write_parquet(folder / "test-0.parquet", good, [0, 1, 0, 1], **options)
    return f"parquet:{folder}"


def damaged_page(folder: Path) -> str:
    name = parquet_with(folder, compression="gzip")
    data = bytearray((folder / "train-1.parquet").read_bytes())
    data[100:300] = bytes(200)
    (folder / "train-1.parquet").write_bytes(data)
    return name


def half_downloaded(folder: Path) -> str:
    return f"parquet:{write_pair(folder, **{'train-00000-of-00002': 0, 'test-00000-of-00001': 1})}"


def other_names(folder: Path) -> str:
    name = parquet_with(folder)
    write_parquet(folder / "test-0.parquet", [encoded(pixels(1)[0])], [0], names=["dog", "cat"])
    return name


def text_labels(folder: Path) -> str:
    pq.write_table(pa.table({"img": [b"x"], "label": ["once upon a time " * 20]}), folder / "train.parquet")
    return f"parquet:{folder}"


def path_images(folder: Path) -> str:
    pq.write_table(pa.table({"img": ["a.png"], "label": [0]}), folder / "train.parquet")
    return f"parquet:{folder}"


def damaged_metadata(folder: Path) -> str:
    return parquet_with(folder, names={"0": "cat", "2": "dog"})


def other_columns(folder: Path) -> str:
    return parquet_with(folder, image="picture")


def no_label_column(folder: Path) -> str:
    return parquet_with(folder, label="kind")


def folder_with(folder: Path, where: str, image: np.ndarray | bytes) -> str:
    """A good ImageFolder of two classes with one more file."""
    for name in ("train/ant", "train/bee", "test/ant", "test/bee"):
        write_images(folder / name, pixels(3))
    (folder / where).parent.mkdir(exist_ok=True)
    (folder / where).write_bytes(image if isinstance(image, bytes) else encoded(image))
    return f"folder:{folder}"


def write_flat(folder: Path) -> str:
    write_images(folder, pixels(3))
    return f"folder:{folder}"


def empty_class(folder: Path) -> str:
    (folder / "train" / "cow").mkdir(parents=True)
    return folder_with(folder, "train/ant/9.png", pixels(1)[0])


def two_validation_folders(folder: Path) -> str:
    for name in ("train", "val", "valid"):
        write_images(folder / name / "ant", pixels(1))
    return f"folder:{folder}"


def no_train_folder(folder: Path) -> str:
    write_images(folder / "test" / "ant", pixels(1))
    return f"folder:{folder}"


def one_class(folder: Path) -> str:
    write_images(folder / "train" / "ant", pixels(3))
    write_images(folder / "test" / "ant", pixels(3))
    return f"folder:{folder}"


def cut_npz(folder: Path) -> str:
    name = whole_npz(folder / "a.npz")
    (folder / "a.npz").write_bytes((folder / "a.npz").read_bytes()[:700])
    return name


def tiny_without(folder: Path, change: Callable[[Path], object]) -> str:
    change(write_tiny_imagenet(folder / "tiny-imagenet-200"))
    return "tiny-imagenet"


def sixteen_bit(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0].astype(np.uint16) * 256).save(buffer, "PNG")
    return buffer.getvalue()


PNG = encoded(pixels(1)[0])
BAD: dict[str, tuple[Callable[[Path], str], dict[str, Any], str]] = {
    "unknown name": (lambda at: "cifar11", {}, r"unknown data 'cifar11'; did you mean cifar10.*known: digits"),
    "kind without path": (lambda at: "parquet", {}, r"data 'parquet' lacks its path; write parquet:PATH"),
    "empty path": (lambda at: "npz:", {}, r"data 'npz:' lacks its path; write npz:PATH"),
    "path without kind": (lambda at: str(at), {}, r"is a path: write its kind before it, e\.g\. folder:/"),
    "path in capitals": (
        lambda at: unreadable(at / "a.PARQUET"),
        {},
        r"write its kind before it, e\.g\. parquet:.*a\.PARQUET",
    ),
    "table of names": (
        lambda at: unreadable(at / "labels.csv"),
        {},
        r"labels\.csv' is a file of a kind",
    ),
    "kind in capitals": (lambda at: f"Folder: {at}", {}, r"unknown data 'Folder: .*; write folder:/"),
    "name in capitals": (lambda at: "CIFAR10", {}, r"unknown data 'CIFAR10'; did you mean cifar10"),
    "no name": (lambda at: "", {}, r"unknown data ''; known: digits"),
    "address": (
        lambda at: "folder:s3://bucket/images",
        {},
        r"s3://bucket/images: data is read from this machine",
    ),
    "archive": (lambda at: f"folder:{unreadable(at / 'a.zip')}", {}, r"a\.zip is not a folder; .* after unpacking it"),
    "parquet as folder": (lambda at: f"folder:{write_pair(at, train=0)}", {}, r"holds Parquet files.*; give parquet:/"),
    "parquet in data as folder": (
        lambda at: f"folder:{write_pair(at / 'data', train=0).parent}",
        {},
        r"data holds Parquet files, not images; give parquet:/",
    ),
    "images in no folder": (lambda at: write_flat(at), {}, r"no class folders in .* \(3 images in no folder\)"),
    "unknown kind": (lambda at: f"zip:{at}", {}, r"unknown data 'zip:"),
    "missing path": (lambda at: f"parquet:{at / 'none'}", {}, r"none does not exist"),
    "validation one": (lambda at: "digits", {"validation": 1.0}, r"0 <= validation < 1, got 1\.0"),
    "validation negative": (lambda at: "digits", {"validation": -0.1}, r"validation must .*, got -0\.1"),
    "validation nan": (lambda at: "digits", {"validation": float("nan")}, r"validation must .*, got nan"),
    "validation of no image": (lambda at: "digits", {"validation": 0.001}, r"0.001 of each train class .* larger"),
    "unknown constants": (lambda at: "digits", {"normalisation": "cifar"}, r"unknown normalisation 'cifar'; did you"),
    "other channels": (
        lambda at: "digits",
        {"normalisation": "cifar10"},
        r"normalisation cifar10 has 3 channels, the images of digits have 1; use normalisation computed",
    ),
    "folder without parquet": (lambda at: f"parquet:{at}", {}, r"no \.parquet file in .*data"),
    "no train file": (lambda at: f"parquet:{write_pair(at, test=0)}", {}, r"no train split in .*test\.parquet"),
    "no parquet": (lambda at: f"parquet:{unreadable(at / 'a.parquet')}", {}, r"a\.parquet: not a readable parquet"),
    "damaged page": (damaged_page, {}, r"train-1\.parquet: cannot read column img"),
    "half downloaded": (half_downloaded, {}, r"holds 1 of 2 files like train-00000-of-00002\.parquet"),
    "classes disagree": (other_names, {}, r"train-0\.parquet and .*test-0\.parquet name different classes"),
    "damaged metadata": (damaged_metadata, {}, r"train-0\.parquet: its huggingface metadata is damaged"),
    "text labels": (text_labels, {}, r"train\.parquet: column label holds texts of up to 340 characters"),
    "paths for images": (path_images, {}, r"train\.parquet: column img is string; it must hold the bytes"),
    "no image column": (other_columns, {}, r"no column img or image or imgs or images \(found picture, label\)"),
    "no label column": (no_label_column, {}, r"no column label or fine_label or .* or classes \(found img, kind\)"),
    "damaged image": (lambda at: parquet_with(at, {2: b"no"}), {}, r"train-1\.parquet, row 2: not a readable image"),
    "cut image": (lambda at: parquet_with(at, {3: PNG[:90]}), {}, r"train-1\.parquet, row 3: not a readable image"),
    "null image": (lambda at: parquet_with(at, {0: None}), {}, r"train-1\.parquet, row 0: .*no image bytes"),
    "16 bits": (lambda at: parquet_with(at, {1: sixteen_bit(pixels(1)[0])}), {}, r"row 1: .*mode I;16, only 8 bits"),
    "two sizes": (
        lambda at: parquet_with(at, {1: encoded(pixels(1, size=9)[0, :7])}),
        {},
        r"train-1\.parquet, row 1: the image is 9x7, the first one \(.*train-0\.parquet, row 0\) is 8x8",
    ),
    "null label": (
        lambda at: parquet_with(at, labels=[0, 1, None, 1]),
        {},
        r"train-1\.parquet, row 2: .*label is null",
    ),
    "large label": (
        lambda at: parquet_with(at, labels=[0, 2, 0, 1]),
        {},
        r"train-1\.parquet, row 1: label 2 in the train split is out of range; the 2 classes have labels 0\.\.1",
    ),
    "negative label": (
        lambda at: parquet_with(at, labels=[0, 1, 0, -1], names=None),
        {},
        r"train-1\.parquet, row 3: label -1 in the train split is negative",
    ),
    "huge label": (
        lambda at: parquet_with(at, labels=[0, 10**12, 0, 1], names=None),
        {},
        r"train-1\.parquet, row 1: label 1000000000000 with only 8 train images",
    ),
    "test label": (
        lambda at: whole_npz(at / "a.npz", y_test=np.array([0, 1, 2, 0])),
        {},
        r"a\.npz, y_test\[2\]: label 2 in the test split is out of range",
    ),
    "empty file": (
        lambda at: f"parquet:{write_parquet(at / 'a.parquet', [], [])}",
        {},
        r"a\.parquet: has no row",
    ),
    "class without image": (empty_class, {}, r"class 'cow' \(label 2\) .* has no train image"),
    "gap in labels": (
        lambda at: whole_npz(at / "a.npz", y_train=np.array([0, 2] * 4)),
        {},
        r"class '1' \(label 1\) of .*a\.npz has no train image",
    ),
    "one class": (one_class, {}, r"has 1 class; a classifier needs at least 2"),
    "no train folder": (no_train_folder, {}, r"no train split in .* it has test; add .*train"),
    "no class folders": (lambda at: f"folder:{at}", {}, r"no class folders in"),
    "folder is a file": (lambda at: f"folder:{unreadable(at / 'a.txt')}", {}, r"a\.txt is not a folder"),
    "two validation folders": (two_validation_folders, {}, r"val and .*valid are both the validation split"),
    "damaged file": (lambda at: folder_with(at, "train/bee/9.png", b"no"), {}, r"bee/9\.png: not a readable image"),
    "size in test": (
        lambda at: whole_npz(at / "a.npz", x_test=pixels(4, size=5)),
        {},
        r"y_test\[0\]: the test image is 5x5, the train images \(.*y_train\[0\]\) are 8x8",
    ),
    "size of a file": (
        lambda at: folder_with(at, "train/bee/9.png", pixels(1, size=9)[0]),
        {},
        r"bee/9\.png: the image is 9x9, the first one \(.*ant/000\.png\) is 8x8",
    ),
    "class in test alone": (
        lambda at: folder_with(at, "test/cow/0.png", pixels(1)[0]),
        {},
        r"test/cow: not one of the classes \(ant, bee\)",
    ),
    "constant channel": (
        lambda at: whole_npz(at / "a.npz", x_train=pixels(8) * np.array([1, 0, 1], np.uint8)),
        {},
        r"channel 1 of the train images of .*a\.npz is constant",
    ),
    "no npz": (lambda at: f"npz:{unreadable(at / 'a.npz')}", {}, r"a\.npz: not a readable npz file"),
    "cut npz": (cut_npz, {}, r"a\.npz: not a readable npz file"),
    "pickled npz": (
        lambda at: whole_npz(at / "a.npz", y_train=np.array([{}] * 8, dtype=object)),
        {},
        r"a\.npz: not a readable npz file of plain arrays",
    ),
    "npz names": (lambda at: write_npz(at / "a.npz", x=1, y=2), {}, r"no array x_train \(found x, y\)"),
    "npz half a pair": (
        lambda at: write_npz(at / "a.npz", x_train=pixels(4)),
        {},
        r"no array y_train \(found x_train\)",
    ),
    "npz lengths": (
        lambda at: whole_npz(at / "a.npz", y_train=np.arange(7) % 2),
        {},
        r"x_train has 8 images, y_train 7 labels",
    ),
    "npz float range": (
        lambda at: whole_npz(at / "a.npz", x_train=pixels(8) * 1.0),
        {},
        r"x_train holds values outside 0\.\.1 \(float64\)",
    ),
    "npz nan": (
        lambda at: whole_npz(at / "a.npz", x_train=np.full((8, 4, 4), np.nan)),
        {},
        r"x_train holds NaN \(float64\)",
    ),
    "npz shape": (lambda at: whole_npz(at / "a.npz", x_train=np.zeros((8, 5, 5, 5), np.uint8)), {}, r"\(8, 5, 5, 5\)"),
    "npz flat": (lambda at: whole_npz(at / "a.npz", x_train=np.zeros((8, 64), np.uint8)), {}, r"has shape \(8, 64\)"),
    "npz both layouts": (
        lambda at: whole_npz(at / "a.npz", x_train=np.zeros((8, 3, 9, 3), np.uint8)),
        {},
        r"could be NHWC and NCHW",
    ),
    "npz text": (lambda at: whole_npz(at / "a.npz", x_train=np.full((8, 4, 4), "a")), {}, r"x_train is <U1"),
    "npz float labels": (lambda at: whole_npz(at / "a.npz", y_train=np.ones(8)), {}, r"y_train is float64"),
    "no tiny-imagenet": (lambda at: "tiny-imagenet", {}, r"no tiny-imagenet in .*--data-root"),
    "no annotations": (
        lambda at: tiny_without(at, lambda base: (base / "val" / "val_annotations.txt").unlink()),
        {},
        r"val_annotations\.txt is missing",
    ),
    "annotated class": (
        lambda at: tiny_without(at, lambda base: (base / "val" / "val_annotations.txt").write_text("000.JPEG\tn09\n")),
        {},
        r"val_annotations\.txt, line 1: class 'n09' is none",
    ),
    "annotated file": (
        lambda at: tiny_without(at, lambda base: (base / "val" / "images" / "001.JPEG").unlink()),
        {},
        r"val/images/001\.JPEG is missing",
    ),
    "listed class": (
        lambda at: tiny_without(at, lambda base: (base / "wnids.txt").write_text("n01 n02 n03")),
        {},
        r"class 'n03' \(label 2\) .* has no train image",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, tmp_path):
    make, options, pattern = BAD[case]
    name = make(tmp_path)
    with pytest.raises(UserError, match=pattern) as caught:
        load(name, root=tmp_path, **options)
    assert "\n" not in str(caught.value)
    if str(tmp_path) in name:
        assert str(tmp_path) in str(caught.value)  # names the place
