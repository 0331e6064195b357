"""Parquet: which columns hold images and labels, and which classes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_files import encode, picture, rows, write_splits, write_table
from support.parquet_data import read, refusal


def test_train_and_test_must_have_one_column_of_labels(tmp_path):
    write_table(tmp_path / "train.parquet", rows(4), label="fine_label", more={"label": [0, 1] * 4})
    write_table(tmp_path / "test.parquet", rows(2, 50), label="fine_label")
    assert "has the column label" in refusal(tmp_path) and "fine_label" in refusal(tmp_path)
    write_table(tmp_path / "test.parquet", rows(2, 50), label="fine_label", more={"label": [0, 1] * 2})
    assert "labels are of the column label, not of fine_label" in read(tmp_path).notes[0]


@pytest.mark.parametrize("label", ["label", "fine_label", "labels"])
def test_columns_of_labels(tmp_path, label):
    write_table(tmp_path / "train.parquet", rows(5), label=label)
    assert read(tmp_path).classes == ("a", "b") and len(read(tmp_path).train.labels) == 8


def test_names_of_classes_in_one_file_hold_for_all_and_two_orders_are_refused(tmp_path):
    write_table(tmp_path / "train.parquet", rows(4))
    write_table(tmp_path / "test.parquet", rows(2, 50), names=None)
    data = read(tmp_path)
    assert data.classes == ("a", "b") and len(data.train.labels) == 8 and len(data.test.labels) == 4
    write_table(tmp_path / "test.parquet", rows(2, 50), names=("b", "a"))
    assert "name different classes" in refusal(tmp_path)


def test_two_classes_of_one_name_stay_two(tmp_path):
    write_table(tmp_path / "train.parquet", rows(5, classes=4), names=("crane", "crane", "", "x"))
    assert read(tmp_path).classes == ("crane", "crane", "", "x")


def test_a_class_without_images_is_refused(tmp_path):
    write_table(tmp_path / "train.parquet", rows(4), names=("a", "b", "unknown"))
    assert "class 'unknown' (label 2)" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["a\x00b", "\ud800", "x\x1b[0m"])
def test_names_of_classes_that_no_file_can_hold_are_refused(tmp_path, name):
    write_table(tmp_path / "train.parquet", rows(5), names=("a", name))
    assert "rename the class" in refusal(tmp_path) and refusal(tmp_path).isprintable()


@pytest.mark.parametrize("other", ["validation", "valid", "dev"])
def test_a_test_split_without_labels_leaves_the_validation_split_as_test(tmp_path, other):
    write_table(tmp_path / "train.parquet", rows(4))
    write_table(tmp_path / f"{other}.parquet", rows(2, 40))
    write_table(tmp_path / "test.parquet", [(image, -1) for image, _ in rows(3, 50)])
    data = read(tmp_path)
    assert len(data.test.labels) == 4 and "all of its labels are -1" in "\n".join(data.notes)
    (tmp_path / f"{other}.parquet").unlink()
    assert len(read(tmp_path).train.labels) == 6 and "drawn with seed 0, serve as test" in read(tmp_path).notes[-1]
    write_table(tmp_path / "test.parquet", [*rows(1, 50), (rows(1, 60)[0][0], -1)])
    assert "label -1 in the test split is negative" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "last", "message"),
    [
        (pa.float64(), 1.0, "column label is double; it must hold integers from 0, names of"),
        (pa.int8(), None, "row 7: column label is null"),
        (pa.uint64(), 2**63 + 5, "row 7: label 9223372036854775813 is too large"),
        (pa.list_(pa.float32()), [0.5, 0.5], "row 7: column label holds [0.5, 0.5], not one-hot"),
        (pa.list_(pa.int8()), [1], "row 7: column label holds [1], not one-hot"),
    ],
)
def test_labels_that_are_no_integers(tmp_path, kind, last, message):
    data = [(image, [1 - label, label] if pa.types.is_list(kind) else label) for image, label in rows(4)]
    write_table(tmp_path / "train.parquet", [*data[:-1], (data[-1][0], last)], kind=kind)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_labels_of_text_are_classes_in_alphabetical_order(tmp_path, kind):
    """Of all splits together, so that numbers mean the same in each."""
    first, then = rows(4), rows(2, 50)
    write_table(
        tmp_path / "train.parquet", [(image, ("zebra", "ant")[label]) for image, label in first], None, kind=kind
    )
    write_table(tmp_path / "test.parquet", [(image, ("zebra", "ant")[label]) for image, label in then], None, kind=kind)
    data = read(tmp_path)
    assert data.classes == ("ant", "zebra")
    assert data.train.labels.tolist() == [1 - label for _, label in first]
    assert data.test.labels.tolist() == [1 - label for _, label in then]
    write_table(tmp_path / "test.parquet", [(image, "cat") for image, _ in then], None, kind=kind)
    assert "class 'cat' (label 1)" in refusal(tmp_path)
    write_table(tmp_path / "test.parquet", then, None)
    assert "test.parquet integers; use one form in all files" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "one"), [(pa.list_(pa.int64()), 1), (pa.list_(pa.float32(), 2), 1.0), (pa.large_list(pa.bool_()), True)],
    ids=str,
)  # fmt: skip
def test_one_hot_lists_are_class_numbers(tmp_path, kind, one):
    zero = type(one)(0)
    data, hot = rows(4), [[one, zero], [zero, one]]
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.parquet", [(image, hot[label]) for image, label in data], None, kind=kind)
    assert read(tmp_path).train.labels.tolist() == [label for _, label in data]


@pytest.mark.parametrize("label", ["labels", "target", "targets", "class", "classes"])
@pytest.mark.parametrize("image", ["image", "img", "imgs", "images"])
def test_plural_names_of_columns_are_read(tmp_path, image, label):
    data = rows(4)
    table = pa.table({image: [blob for blob, _ in data], label: [number for _, number in data]})
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table, tmp_path / "test.parquet")
    assert read(tmp_path).train.labels.tolist() == [number for _, number in data]


def test_one_hot_lists_have_a_value_for_each_class(tmp_path):
    """Files that disagree are refused, and a class without an image is missed."""
    data = rows(4)
    wide = [(image, [int(label == column) for column in range(4)]) for image, label in data]
    narrow = [(image, [1 - label, label]) for image, label in data]
    write_table(tmp_path / "train-0.parquet", narrow, None, kind=pa.list_(pa.int64()))
    write_table(tmp_path / "train-1.parquet", wide, None, kind=pa.list_(pa.int64()))
    assert "the one-hot lists of its files differ in length" in refusal(tmp_path)
    (tmp_path / "train-0.parquet").unlink()
    assert "class '2' (label 2)" in refusal(tmp_path)
    write_table(tmp_path / "train-1.parquet", narrow, None, kind=pa.list_(pa.int64()))
    write_table(tmp_path / "test.parquet", wide, None, kind=pa.list_(pa.int64()))
    assert "different numbers of columns (train 2, test 4)" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["image", "label"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, name):
    data = rows(4)
    columns = {"image": pa.array([blob for blob, _ in data]), "label": pa.array([label for _, label in data])}
    names = [*columns, name]
    pq.write_table(pa.Table.from_arrays([columns[one] for one in names], names=names), tmp_path / "train.parquet")
    assert f"train.parquet: has 2 columns {name}; rename all but one" in refusal(tmp_path)


def test_columns_of_views_are_read(tmp_path):
    """Some writers store texts and bytes as views."""
    data = rows(4)
    images, labels = [blob for blob, _ in data], ["ab"[label] for _, label in data]
    table = pa.table({"image": pa.array(images, pa.binary_view()), "label": pa.array(labels, pa.string_view())})
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table, tmp_path / "test.parquet")
    loaded = read(tmp_path)
    assert loaded.classes == ("a", "b") and loaded.train.labels.tolist() == [label for _, label in data]


def test_a_split_without_a_row_is_refused(tmp_path):
    write_table(tmp_path / "train.parquet", rows(4))
    write_table(tmp_path / "test.parquet", [])
    assert "test.parquet: has no row; write it again, or remove it" in refusal(tmp_path)


def test_folders_of_images_are_refused_with_their_kind(tmp_path):
    assert f"give folder:{tmp_path} for folders of images" in refusal(write_splits(tmp_path))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pa.array([{"bytes": None, "path": f"/nowhere/{n}.png"} for n in range(4)],
                  pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "holds paths (/nowhere/0.png)"),
        (pa.array([[[[1]]]] * 4), "it must hold the bytes of image files"),
        (pa.array([[1, 2]] * 4, pa.list_(pa.uint8())), "it must hold the bytes of image files"),
        (pa.array([[{"bytes": b"x", "path": None}]] * 4), "it must hold the bytes of image files"),
    ],
    ids=["paths", "arrays", "lists of bytes", "lists of images"],
)  # fmt: skip
def test_columns_that_hold_no_images(tmp_path, image, message):
    pq.write_table(pa.table({"image": image, "label": [0, 1, 0, 1]}), tmp_path / "train.parquet")
    assert message in refusal(tmp_path)


def test_another_size_is_refused_with_its_row(tmp_path):
    write_table(tmp_path / "train.parquet", [*rows(4), (encode(picture(0, 9, (9, 8))), 0)])
    assert "train.parquet, row 8: the image is 9x8" in refusal(tmp_path)


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """(h, w, 3) uint16 as a PNG, which PIL can read and not write."""
    import struct
    import zlib

    h, w, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_colour_images_of_16_bits_give_their_upper_8_with_a_note_and_dark_ones_are_refused(tmp_path):
    pixels = {number: picture(0, number).astype(np.uint16) for number in range(10)}
    bright = [(png_of_16_bits(each * 256 + 7), number % 2) for number, each in pixels.items()]
    write_table(tmp_path / "train.parquet", bright)
    write_table(tmp_path / "test.parquet", bright)
    data = read(tmp_path)
    np.testing.assert_array_equal(data.train.images[3], picture(0, 3).transpose(2, 0, 1))
    assert "10 of 10 images have 16 bits per channel" in data.notes[0]
    write_table(tmp_path / "train.parquet", [(png_of_16_bits(each // 4), n % 2) for n, each in pixels.items()])
    assert "16 bits per channel" in refusal(tmp_path) and "scale" in refusal(tmp_path)
