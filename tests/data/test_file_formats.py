"""Parquet shards, image folders and npz archives: layouts, names, notes."""

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.image_files import (
    channels_first,
    encoded,
    pixels,
    rows,
    well_formed,
    whole_npz,
    write_images,
    write_npz,
    write_pair,
    write_parquet,
)

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.datasets import load

# ---- parquet


def test_parquet_keeps_the_order_of_its_shards(tmp_path):
    images = pixels(36)
    for shard in range(12):  # by name alone, train-10 would come before train-2
        part = [encoded(image) for image in images[3 * shard : 3 * shard + 3]]
        write_parquet(tmp_path / "data" / f"Train-{shard}.parquet", part, [shard % 2] * 3, row_group_size=2)
    write_parquet(tmp_path / "data" / "test.parquet", [encoded(images[0])], [1])
    data = load(f"parquet:{tmp_path}")
    well_formed(data)
    np.testing.assert_array_equal(data.train.images, channels_first(images))
    assert data.train.labels.tolist() == [shard % 2 for shard in range(12) for _ in range(3)]
    assert data.test.labels.tolist() == [1]
    assert len(data.notes) == 1 and "no test image of class 'cat'" in data.notes[0]


@pytest.mark.parametrize("names", [["cat", "dog"], {"1": "dog", "0": "cat"}])
@pytest.mark.parametrize("label", ["label", "fine_label"])
def test_parquet_class_names_and_column_names(names, label, tmp_path):
    blobs = [encoded(image, "JPEG") for image in pixels(4)]
    for file in ("train", "test"):
        write_parquet(
            tmp_path / f"{file}.parquet", blobs, [0, 1, 0, 1], names=names, image="image", label=label, struct=False
        )
    data = load(f"parquet:{tmp_path}")
    assert data.classes == ("cat", "dog")
    for image, blob in zip(data.train.images, blobs, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(blob))).transpose(2, 0, 1))


def test_parquet_without_names_numbers_its_classes(tmp_path):
    for file in ("train", "test"):
        blobs = [encoded(image) for image in pixels(3)]
        write_parquet(tmp_path / f"{file}.parquet", blobs, [2, 0, 1], names=None)
    assert load(f"parquet:{tmp_path}").classes == ("0", "1", "2")


def test_one_parquet_file_gives_a_fifth_as_test(tmp_path):
    name = f"parquet:{write_pair(tmp_path, n=20, all=0) / 'all.parquet'}"
    data = load(name)
    well_formed(data)
    assert np.bincount(data.test.labels).tolist() == [2, 2] and np.bincount(data.train.labels).tolist() == [8, 8]
    assert rows(data.train.images) | rows(data.test.images) == rows(channels_first(pixels(20)))
    assert len(data.notes) == 1 and "4 of 20 images, 20% of each class drawn with seed 0" in data.notes[0]
    assert rows(load(name, seed=1).test.images) != rows(data.test.images)


@pytest.mark.parametrize("word", ["valid", "validation", "val", "VAL"])
def test_a_validation_file_serves_as_test_or_as_validation(word, tmp_path):
    write_pair(tmp_path, **{"train-0": 0, f"{word}-0": 1})
    alone = load(f"parquet:{tmp_path}")
    assert rows(alone.test.images) == rows(channels_first(pixels(10, 1))) and len(alone.validation.labels) == 0
    assert f"no test split in {tmp_path}" in alone.notes[0]
    write_pair(tmp_path, test=2)
    both = load(f"parquet:{tmp_path}", validation=0.3)
    assert rows(both.validation.images) == rows(channels_first(pixels(10, 1)))
    assert rows(both.test.images) == rows(channels_first(pixels(10, 2)))
    assert len(both.train.labels) == 10
    assert len(both.notes) == 1 and "validation=0.3 is ignored" in both.notes[0]
    assert load(f"parquet:{tmp_path}").notes == ()


def test_parquet_files_of_no_split_are_left_out_with_a_note(tmp_path):
    write_pair(tmp_path, train=0, test=1, trainval=2, extra=3)
    data = load(f"parquet:{tmp_path}")
    assert len(data.train.labels) == 10
    assert "extra.parquet, trainval.parquet" in data.notes[0]


def test_images_of_other_modes_become_rgb(tmp_path):
    image = pixels(1)[0]
    rgb = Image.fromarray(image)
    palette = rgb.quantize(16)
    palette.info["transparency"] = bytes(range(16))
    modes = [rgb, rgb.convert("L"), rgb.convert("LA"), rgb.convert("RGBA"), palette, rgb.convert("1")]
    blobs = []
    for mode in modes:
        buffer = io.BytesIO()
        mode.save(buffer, "PNG")
        blobs.append(buffer.getvalue())
    for file in ("train", "test"):
        write_parquet(tmp_path / f"{file}.parquet", blobs, [0, 1] * 3)
    images = load(f"parquet:{tmp_path}").train.images
    grey = np.asarray(rgb.convert("L"))
    np.testing.assert_array_equal(images[0], image.transpose(2, 0, 1))
    for index in (1, 2):
        np.testing.assert_array_equal(images[index], np.stack([grey] * 3))
    np.testing.assert_array_equal(images[3], images[0])
    np.testing.assert_array_equal(images[4], np.asarray(rgb.quantize(16).convert("RGB")).transpose(2, 0, 1))
    assert set(np.unique(images[5])) == {0, 255}


# ---- folders and npz


@pytest.mark.parametrize("word", ["test", "val", "valid", "Validation"])
def test_image_folder(word, tmp_path):
    for label, name in enumerate(("zebra", "ant")):
        write_images(tmp_path / "train" / name, pixels(3, label))
        write_images(tmp_path / "store" / name, pixels(2, 10 + label))
        (tmp_path / word / name).mkdir(parents=True)
        (tmp_path / word / name / "deeper").symlink_to(tmp_path / "store" / name)
    (tmp_path / "train" / "ant" / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / "train" / "ant" / "._000.png").write_bytes(b"no image")
    (tmp_path / "train" / ".cache").mkdir()
    data = load(f"folder:{tmp_path}")
    well_formed(data)
    assert data.classes == ("ant", "zebra") and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(data.train.images[:3], channels_first(pixels(3, 1)))
    np.testing.assert_array_equal(data.test.images, channels_first(np.concatenate([pixels(2, 11), pixels(2, 10)])))
    assert "left out store" in data.notes[0]
    assert len(data.notes) == (1 if word == "test" else 2)


def test_plain_class_folders_give_a_fifth_as_test(tmp_path):
    for label, name in enumerate(("ant", "zebra")):
        write_images(tmp_path / name, pixels(10 + 10 * label, label))
    data = load(f"folder:{tmp_path}", seed=3)
    assert np.bincount(data.test.labels).tolist() == [2, 4] and np.bincount(data.train.labels).tolist() == [8, 16]
    assert not rows(data.test.images) & rows(data.train.images)
    assert "drawn with seed 3, serve as test" in data.notes[0]


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "floats", "int64", "medmnist"])
def test_npz_layouts_give_the_same_images(layout, tmp_path):
    train, test, labels = pixels(8), pixels(4, 1), np.arange(8) % 2
    change: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "NCHW": channels_first,
        "floats": lambda x: (x / 255).astype(np.float32),
        "int64": lambda x: x.astype(np.int64),
    }
    splits = [change.get(layout, lambda x: x)(x) for x in (train, test)]
    keys = ("x_train", "y_train", "x_test", "y_test")
    if layout == "medmnist":
        keys, labels = ("train_images", "train_labels", "test_images", "test_labels"), labels[:, None].astype(np.uint8)
    name = write_npz(tmp_path / "a.npz", **dict(zip(keys, (splits[0], labels, splits[1], labels[:4]), strict=True)))
    data = load(name)
    well_formed(data)
    np.testing.assert_array_equal(data.train.images, channels_first(train))
    np.testing.assert_array_equal(data.test.images, channels_first(test))
    assert data.train.labels.tolist() == [0, 1] * 4 and data.classes == ("0", "1")


def test_npz_grey_images_and_single_split(tmp_path):
    grey = pixels(10)[..., 0]
    data = load(write_npz(tmp_path / "a.npz", images=grey, labels=np.arange(10) % 2))
    assert data.image_shape == (1, 8, 8) and len(data.test.labels) == 2
    assert rows(data.train.images) | rows(data.test.images) == rows(grey[:, None])
    assert "serve as test" in data.notes[0]


def test_npz_validation_arrays(tmp_path):
    data = load(whole_npz(tmp_path / "a.npz", x_val=pixels(2, 7), y_val=np.arange(2)))
    np.testing.assert_array_equal(data.validation.images, channels_first(pixels(2, 7)))


def test_columns_are_chosen_and_another_column_is_another_data_set(tmp_path):
    """Two columns of labels and of images in one file: each choice gives its labels, classes and a fingerprint."""
    images = pixels(10)
    blobs, other = pa.array([encoded(image) for image in images]), pa.array([encoded(255 - image) for image in images])
    fine, coarse = [i % 5 for i in range(10)], [i % 2 for i in range(10)]
    columns = {"img": blobs, "negative": other, "fine_label": fine, "coarse_label": coarse}
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    name = f"parquet:{tmp_path}"
    usual = load(name)
    by_coarse = load(name, label_column="coarse_label")
    negative = load(name, image_column="negative")
    assert usual.train.labels.tolist() == fine and len(usual.classes) == 5
    assert by_coarse.train.labels.tolist() == coarse and len(by_coarse.classes) == 2
    assert np.array_equal(negative.train.images, 255 - usual.train.images)
    assert load(name, label_column="fine_label").fingerprint == usual.fingerprint
    assert len({usual.fingerprint, by_coarse.fingerprint, negative.fingerprint}) == 3
    with pytest.raises(UserError, match=r"no column coarse \(found img, .*name the column with --label-column"):
        load(name, label_column="coarse")
    with pytest.raises(UserError, match="--label-column, --image-column: 'digits' has no columns"):
        load("digits", label_column="coarse_label")
