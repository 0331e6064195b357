"""Named data sets, splits, normalisation and fingerprints."""

import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.image_files import (
    channels_first,
    pixels,
    rows,
    well_formed,
    whole_npz,
    write_tiny_imagenet,
)

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.datasets import KNOWN, Split, denormalise, load, normalise, tensors

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside this checkout")


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
    with pytest.raises(UserError, match=rf"{name} is missing or incomplete in {tmp_path}.*--download.*--data-root"):
        load(name, root=tmp_path)


def test_two_downloads_at_once_do_not_spoil_each_other(tmp_path, monkeypatch):
    """The second one begins when the first one has most of the file; without a lock it would empty it."""
    import torchvision.datasets

    images = write_cifar10(tmp_path / "there", monkeypatch)
    with tarfile.open(tmp_path / "there.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "there" / "cifar-10-batches-py", "cifar-10-batches-py")
    content, requests, first_over = (tmp_path / "there.tar.gz").read_bytes(), [], threading.Event()
    locked_temp_file, second = threading.Event(), threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            if "Method" in self.headers:  # torchvision's word for a look at where the file is
                return
            requests.append(len(requests))
            half = len(content) // 2
            if requests[-1] == 0:
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
        for download in (one, other):
            np.testing.assert_array_equal(download.result().test.images, images[5])
    server.shutdown()
    server.server_close()
    assert requests == [0]


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


# ---- validation, normalisation, fingerprint


def test_validation_is_stratified_seeded_and_disjoint(tmp_path):
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    name = whole_npz(tmp_path / "a.npz", x_train=pixels(70), y_train=labels)
    first, again, other = (load(name, validation=0.3, seed=seed) for seed in (5, 5, 6))
    well_formed(first)
    assert np.bincount(first.validation.labels).tolist() == [12, 6, 3]
    assert np.bincount(first.train.labels).tolist() == [28, 14, 7]
    validation_rows, training_rows = rows(first.validation.images), rows(first.train.images)
    assert not validation_rows & training_rows and validation_rows | training_rows == rows(channels_first(pixels(70)))
    np.testing.assert_array_equal(first.validation.images, again.validation.images)
    assert first.fingerprint == again.fingerprint
    assert validation_rows != rows(other.validation.images) and first.fingerprint != other.fingerprint
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
