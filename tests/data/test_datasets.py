"""Every source is read from real files, made here or in the shared data; every bad one gives one clear line."""

import hashlib
import http.server
import io
import json
import pickle
import tarfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.datasets import KNOWN, Dataset, Split, denormalise, load, normalise, tensors

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside this checkout")


# ---- makers of real files


def pixels(n: int, seed: int = 0, size: int = 8) -> np.ndarray:
    """(n, size, size, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def encoded(image: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


def huggingface(names: Any, label: str = "label") -> dict[bytes, bytes]:
    features = {"img": {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write_parquet(
    path: Path,
    blobs: Sequence[bytes | None],
    labels: Sequence[int | None],
    *,
    names: Any = ("cat", "dog"),
    image: str = "img",
    label: str = "label",
    struct: bool = True,
    **options: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": b, "path": None} for b in blobs], kind) if struct else pa.array(blobs, pa.binary())
    table = pa.table({image: column, label: pa.array(labels, pa.int64())})
    pq.write_table(table.replace_schema_metadata(huggingface(names, label) if names else None), path, **options)
    return path


def write_pair(folder: Path, n: int = 10, **splits: int) -> Path:
    """Parquet files of n images with labels 0, 1, 0, 1, ...: splits maps a file's name to the seed of its pixels."""
    for name, seed in splits.items():
        write_parquet(folder / f"{name}.parquet", [encoded(x) for x in pixels(n, seed)], [i % 2 for i in range(n)])
    return folder


def write_images(folder: Path, images: np.ndarray, form: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        (folder / f"{index:03d}.{form}").write_bytes(encoded(image, {"JPEG": "JPEG"}.get(form, "PNG")))


def write_npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


def whole_npz(path: Path, **replaced: Any) -> str:
    arrays = {"x_train": pixels(8), "y_train": np.arange(8) % 2, "x_test": pixels(4, 1), "y_test": np.arange(4) % 2}
    return write_npz(path, **(arrays | replaced))


def write_tiny_imagenet(base: Path) -> Path:
    """Two classes, three train images and one val image each; the first image of n02 is grey."""
    for number, wnid in enumerate(("n02", "n01")):
        write_images(base / "train" / wnid / "images", pixels(3, number), "JPEG")
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text("000.JPEG\t0\t0\t7\t7\n")
    grey = base / "train" / "n02" / "images" / "000.JPEG"
    Image.fromarray(pixels(1)[0, :, :, 0]).save(grey)
    write_images(base / "val" / "images", pixels(2, 5), "JPEG")
    (base / "val" / "val_annotations.txt").write_text("000.JPEG\tn02\t0\t0\t7\t7\n001.JPEG\tn01\t0\t0\t7\t7\n")
    write_images(base / "test" / "images", pixels(2, 6), "JPEG")
    (base / "wnids.txt").write_text("n02\nn01\n")
    (base / "words.txt").write_text("n01\tgoldfish\nn02\tnewt\n")
    return base


def rows(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def channels_first(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2)


def well_formed(data: Dataset) -> None:
    for split in (data.train, data.validation, data.test):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int64
        assert split.images.flags.c_contiguous and split.images.shape[1:] == data.image_shape
        assert split.labels.shape == (len(split.images),)
        assert np.all((split.labels >= 0) & (split.labels < len(data.classes)))
    assert len(data.mean) == len(data.std) == data.image_shape[0] and min(data.std) > 0
    assert len(data.fingerprint) == 16 and int(data.fingerprint, 16) >= 0


# ---- the shared data


@pytest.mark.slow
@needs_shared
def test_cifar10_as_jpeg_parquet():
    data = load(f"parquet:{SHARED / 'cifar10-jpeg'}")
    well_formed(data)
    assert data.train.images.shape == (50_000, 3, 32, 32) and data.test.images.shape == (10_000, 3, 32, 32)
    assert data.validation.images.shape == (0, 3, 32, 32) and data.notes == ()
    assert data.classes[0] == "airplane" and data.classes[9] == "truck" and len(data.classes) == 10
    assert np.all(np.bincount(data.train.labels) == 5000) and np.all(np.bincount(data.test.labels) == 1000)
    # the data set's well-known statistics of all pixels; JPEG moves them little
    np.testing.assert_allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=1e-3)
    np.testing.assert_allclose(data.std, (0.2470, 0.2435, 0.2616), atol=3e-3)
    table = pq.read_table(next((SHARED / "cifar10-jpeg").glob("train*.parquet"))).slice(43_210, 1).to_pylist()[0]
    image = np.asarray(Image.open(io.BytesIO(table["img"]["bytes"])))
    np.testing.assert_array_equal(data.train.images[43_210], image.transpose(2, 0, 1))
    assert data.train.labels[43_210] == table["label"]


@needs_shared
def test_tiny_imagenet_100_parquet_tests_on_its_validation_file():
    data = load(f"parquet:{SHARED / 'tiny-imagenet-100'}", normalisation="tiny-imagenet")
    well_formed(data)
    assert data.image_shape == (3, 64, 64) and len(data.train.labels) == 20_000 and len(data.test.labels) == 5_000
    assert len(data.validation.labels) == 0
    assert len(data.notes) == 1 and "tiny-imagenet-100: its validation split serves as test" in data.notes[0]
    # "100" is the number of train images of each of the 200 classes
    assert np.all(np.bincount(data.train.labels) == 100) and np.all(np.bincount(data.test.labels) == 25)
    assert len(data.classes) == 200 and data.classes[0] == "n01443537" and list(data.classes) == sorted(data.classes)
    grey = (data.train.images == data.train.images[:, :1]).all((1, 2, 3))
    assert grey.sum() >= 370  # that many of its JPEGs have one channel
    assert (data.mean, data.std) == KNOWN["tiny-imagenet"]


# ---- named data


def test_digits():
    from sklearn.datasets import load_digits

    data, known = load("digits"), load_digits(return_X_y=True)
    well_formed(data)
    assert data.image_shape == (1, 8, 8) and len(data.train.labels) == 1437 and len(data.test.labels) == 360
    assert data.classes == tuple("0123456789")
    np.testing.assert_array_equal(data.test.labels, known[1][::5])
    np.testing.assert_allclose(data.test.images.reshape(-1, 64), known[0][::5] / 16 * 255, atol=0.5)
    assert data.train.images.max() == 255


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The batches of CIFAR-10 in small; only the checksums in torchvision are replaced by those of these files."""
    import torchvision.datasets

    images = np.random.default_rng(0).integers(0, 256, (6, 4, 3, 32, 32), dtype=np.uint8)
    contents = {
        name: {"data": images[i].reshape(4, -1), "labels": [0, 1, 2, i % 3]}
        for i, name in enumerate([*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"])
    } | {"batches.meta": {"label_names": ["plane", "car", "bird"]}}
    sums = {}
    for name, content in contents.items():
        file = root / "cifar-10-batches-py" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5(file.read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[f"data_batch_{j}", sums[f"data_batch_{j}"]] for j in range(1, 6)])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["batches.meta"]})
    return images


def test_cifar10_from_torchvisions_root(tmp_path, monkeypatch):
    images = write_cifar10(tmp_path, monkeypatch)
    data = load("cifar10", root=tmp_path)
    well_formed(data)
    np.testing.assert_array_equal(data.train.images, images[:5].reshape(20, 3, 32, 32))
    np.testing.assert_array_equal(data.test.images, images[5])
    assert data.test.labels.tolist() == [0, 1, 2, 2] and data.classes == ("plane", "car", "bird")
    assert (data.mean, data.std) == KNOWN["cifar10"]
    assert load("cifar10", root=tmp_path, normalisation="computed").mean != data.mean


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_names_both_options(name, tmp_path):
    with pytest.raises(UserError, match=rf"no whole {name} in {tmp_path}.*--download.*--data-root"):
        load(name, root=tmp_path)


def test_two_downloads_at_once_do_not_spoil_each_other(tmp_path, monkeypatch):
    """The second one begins when the first one has most of the file; without a lock it would empty it."""
    import torchvision.datasets

    images = write_cifar10(tmp_path / "there", monkeypatch)
    with tarfile.open(tmp_path / "there.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "there" / "cifar-10-batches-py", "cifar-10-batches-py")
    content, asked, first_over = (tmp_path / "there.tar.gz").read_bytes(), [], threading.Event()
    locked_temp_file, second = threading.Event(), threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            if "Method" in self.headers:  # torchvision's word for a look at where the file is
                return
            asked.append(len(asked))
            half = len(content) // 2
            if asked[-1] == 0:
                self.wfile.write(content[:half])
                locked_temp_file.set()
                second.wait(1)
                time.sleep(0.2)  # the second one opens its file
                self.wfile.write(content[half:])
            else:
                self.wfile.write(content[:9])
                second.set()
                first_over.wait(60)
                self.wfile.write(content[9:])

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/x.tar.gz")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(load, "cifar10", root=tmp_path / "new", download=True)
        locked_temp_file.wait(60)
        other = pool.submit(load, "cifar10", root=tmp_path / "new", download=True)
        one.add_done_callback(lambda _: first_over.set())
        for each in (one, other):
            np.testing.assert_array_equal(each.result().test.images, images[5])
    server.shutdown()
    server.server_close()
    assert asked == [0]


def test_failed_download_is_one_line(tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match=r"cannot download cifar10 to .*check the connection") as caught:
        load("cifar10", root=tmp_path, download=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inner", ["tiny-imagenet-200", "."])
@pytest.mark.parametrize("listed", [True, False])
def test_tiny_imagenet_tree(inner, listed, tmp_path):
    base = write_tiny_imagenet(tmp_path / inner)
    if not listed:
        (base / "wnids.txt").unlink()
    data = load("tiny-imagenet", root=tmp_path)
    well_formed(data)
    assert data.classes == ("n01", "n02") and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [1, 0]  # as val_annotations.txt says
    assert "validation split serves as test" in data.notes[0]
    assert (data.mean, data.std) == KNOWN["tiny-imagenet"]
    stored = np.asarray(Image.open(base / "train" / "n01" / "images" / "002.JPEG"))
    np.testing.assert_array_equal(data.train.images[2], stored.transpose(2, 0, 1))
    grey = (data.train.images == data.train.images[:, :1]).all((1, 2, 3))
    assert grey.tolist() == [False, False, False, True, False, False]


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
    for each in modes:
        buffer = io.BytesIO()
        each.save(buffer, "PNG")
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
    made = [change.get(layout, lambda x: x)(x) for x in (train, test)]
    keys = ("x_train", "y_train", "x_test", "y_test")
    if layout == "medmnist":
        keys, labels = ("train_images", "train_labels", "test_images", "test_labels"), labels[:, None].astype(np.uint8)
    name = write_npz(tmp_path / "a.npz", **dict(zip(keys, (made[0], labels, made[1], labels[:4]), strict=True)))
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


# ---- validation, normalisation, fingerprint


def test_validation_is_stratified_seeded_and_disjoint(tmp_path):
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    name = whole_npz(tmp_path / "a.npz", x_train=pixels(70), y_train=labels)
    first, again, other = (load(name, validation=0.3, seed=seed) for seed in (5, 5, 6))
    well_formed(first)
    assert np.bincount(first.validation.labels).tolist() == [12, 6, 3]
    assert np.bincount(first.train.labels).tolist() == [28, 14, 7]
    held, kept = rows(first.validation.images), rows(first.train.images)
    assert not held & kept and held | kept == rows(channels_first(pixels(70)))
    np.testing.assert_array_equal(first.validation.images, again.validation.images)
    assert first.fingerprint == again.fingerprint
    assert held != rows(other.validation.images) and first.fingerprint != other.fingerprint
    of_image = {image.tobytes(): label for image, label in zip(channels_first(pixels(70)), labels, strict=True)}
    for split in (first.train, first.validation):
        assert [of_image[image.tobytes()] for image in split.images] == split.labels.tolist()
    whole = load(name)
    assert whole.validation.images.shape == (0, 3, 8, 8) and len(whole.train.labels) == 70
    np.testing.assert_array_equal(whole.test.images, first.test.images)


def test_validation_never_takes_the_last_image_of_a_class(tmp_path):
    name = whole_npz(tmp_path / "a.npz", x_train=pixels(12), y_train=np.array([0] * 11 + [1]))
    data = load(name, validation=0.9)
    assert np.bincount(data.train.labels).tolist() == [1, 1]
    assert data.validation.labels.tolist() == [0] * 10


def test_computed_constants_are_those_of_the_remaining_train_images(tmp_path):
    name = whole_npz(
        tmp_path / "a.npz", x_train=pixels(2050, size=4), y_train=np.arange(2050) % 2, x_test=pixels(4, 1, 4)
    )
    for share in (0.0, 0.5):
        data = load(name, validation=share)
        scaled = data.train.images / 255
        np.testing.assert_allclose(data.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(data.std, scaled.std((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("known", ["cifar10", "cifar100", "tiny-imagenet"])
def test_named_constants_serve_any_three_channels(known, tmp_path):
    data = load(whole_npz(tmp_path / "a.npz"), normalisation=known)
    assert (data.mean, data.std) == KNOWN[known]


@pytest.mark.parametrize("known", [*KNOWN, None])
def test_normalise_and_back_is_exact(known):
    mean, std = KNOWN[known] if known else ((0.1, 0.2, 0.97), (0.003, 0.5, 0.02))
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    normalised = normalise(images, mean, std)
    assert normalised.dtype == torch.float32
    assert torch.equal(denormalise(normalised, mean, std), images)
    expected = (200 / 255 - mean[1]) / std[1]
    assert normalised[0, 1].flatten()[200].item() == pytest.approx(expected, rel=1e-5)


def test_denormalise_clamps_and_rounds():
    images = torch.tensor([-9.0, 0.0, 0.6 / 255, 1.4 / 255, 1.0, 9.0], requires_grad=True).reshape(1, 1, 1, 6)
    result = denormalise(images, (0.0,), (1.0,))
    assert result.flatten().tolist() == [0, 0, 1, 1, 255, 255] and result.dtype == torch.uint8


def test_normalise_refuses_other_channels_and_types():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(UserError, match="1 normalisation constants for images of 3 channels"):
        normalise(images, (0.5,), (0.5,))
    with pytest.raises(UserError, match="3 normalisation constants for images of 1 channels"):
        denormalise(torch.zeros(2, 1, 4, 4), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(TypeError, match="float32"):
        normalise(images.float(), (0.5,) * 3, (0.5,) * 3)


def test_tensors_of_read_only_arrays_share_memory_without_a_warning():
    split = Split(channels_first(pixels(4)).copy(), np.arange(4))
    split.images.flags.writeable = split.labels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, labels = tensors(split, "cpu")
    assert images.data_ptr() == split.images.ctypes.data and labels.data_ptr() == split.labels.ctypes.data
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    np.testing.assert_array_equal(images.numpy(), split.images)
    empty = tensors(Split(split.images[:0], split.labels[:0]), "cpu")
    assert empty[0].shape == (0, 3, 8, 8) and empty[1].shape == (0,)


def test_fingerprint_is_of_what_the_experts_saw(tmp_path):
    def print_of(normalisation: str = "cifar10", **replaced: Any) -> str:
        return load(whole_npz(tmp_path / "a.npz", **replaced), normalisation=normalisation).fingerprint

    plain = print_of()
    assert plain == print_of()
    pixel, label = pixels(8), np.arange(8) % 2
    pixel[3, 2, 1, 0] ^= 1
    label[7] = 0
    assert plain != print_of(x_train=pixel)
    assert plain != print_of(y_train=label)
    assert plain != print_of("computed")
    assert plain != print_of("tiny-imagenet")
    assert plain != print_of(x_train=pixels(8).reshape(8, 4, 16, 3), x_test=pixels(4).reshape(4, 4, 16, 3))
    assert plain == print_of(x_test=pixels(4, 9), y_test=np.zeros(4, np.int64))


# ---- bad input: one line with the cause and the place


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
    pq.write_table(pa.table({"img": [b"x"], "label": ["cat"]}), folder / "train.parquet")
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
    "path without kind": (lambda at: str(at), {}, r"is a path: say of what, e\.g\. folder:/"),
    "unknown kind": (lambda at: f"zip:{at}", {}, r"unknown data 'zip:"),
    "missing path": (lambda at: f"parquet:{at / 'none'}", {}, r"none does not exist"),
    "validation one": (lambda at: "digits", {"validation": 1.0}, r"0 <= validation < 1, got 1\.0"),
    "validation negative": (lambda at: "digits", {"validation": -0.1}, r"validation must .*, got -0\.1"),
    "validation nan": (lambda at: "digits", {"validation": float("nan")}, r"validation must .*, got nan"),
    "validation of no image": (lambda at: "digits", {"validation": 0.001}, r"0.001 of each class .* larger share"),
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
    "text labels": (text_labels, {}, r"train\.parquet: column label is string; it must hold integers"),
    "paths for images": (path_images, {}, r"train\.parquet: column img is string; it must hold the bytes"),
    "no image column": (other_columns, {}, r"no column img or image \(found picture, label\)"),
    "no label column": (no_label_column, {}, r"no column label or fine_label or labels \(found img, kind\)"),
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
        r"no row in .*a\.parquet",
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
        r"x_train holds values outside 0\.\.1",
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
    with pytest.raises(UserError, match=r"no column coarse \(found img, .*name it by --label-column"):
        load(name, label_column="coarse")
    with pytest.raises(UserError, match="--label-column, --image-column: 'digits' has no columns"):
        load("digits", label_column="coarse_label")
