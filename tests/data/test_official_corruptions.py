"""Corrupted test images of CIFAR-10-C's layout: the folder is mapped, and one that is wrong is one line."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.image_files import coloured

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.corrupted_splits import corrupted_test, notes, official
from fbpc_ray.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from fbpc_ray.data.datasets import Dataset


def folder_for(dataset: Dataset, at: Path, names: tuple[str, ...] = tuple(CORRUPTIONS)) -> Path:
    """A folder in the layout of CIFAR-10-C: images and labels (uint8) of severity 1, then of severity 2, ..."""
    at.mkdir()
    for name in names:
        made = [corrupt(dataset.test.images, name, severity, 11) for severity in SEVERITIES]
        np.save(at / f"{name}.npy", np.ascontiguousarray(np.concatenate(made).transpose(0, 2, 3, 1)))
    np.save(at / "labels.npy", np.tile(dataset.test.labels, 5).astype(np.uint8))
    return at


def test_official_files_are_mapped_and_split(tmp_path):
    data = coloured(tmp_path)
    folder = folder_for(data, tmp_path / "CIFAR-10-C")
    opened = official(folder, data)
    assert set(opened.arrays) == set(CORRUPTIONS)
    for name in CORRUPTIONS:
        assert isinstance(opened.arrays[name], np.memmap) and not opened.arrays[name].flags.writeable
        for severity in SEVERITIES:
            split = opened.split(name, severity)
            assert np.array_equal(split.images, corrupt(data.test.images, name, severity, 11))
            assert np.array_equal(split.labels, data.test.labels) and split.labels.dtype == np.int64
            assert split.images.flags.c_contiguous and split.images.dtype == np.uint8
            again = corrupted_test(data, name, severity, source=folder, seed=0, cache=tmp_path / "unused")
            assert np.array_equal(again.images, split.images)
    assert not (tmp_path / "unused").exists()
    for severity in (0, 6):
        with pytest.raises(UserError, match="severity must be"):
            opened.split("snow", severity)
    assert notes(folder, 0) == (f"corrupted images from {folder}",)


def test_one_official_file_is_enough_for_one_corruption(tmp_path):
    data = coloured(tmp_path)
    folder = folder_for(data, tmp_path / "c", ("snow",))
    assert len(corrupted_test(data, "snow", 2, source=folder, seed=0, cache=tmp_path).labels) == 6
    with pytest.raises(UserError, match=r"c lacks brightness\.npy, defocus_blur\.npy.*CIFAR-10-C\.tar"):
        official(folder, data)
    with pytest.raises(UserError, match="unknown corruption 'fog'"):
        official(folder, data, ("fog",))


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, at: Path):
        self.at = at

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.at,)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def cut(folder: Path) -> None:
    data = (folder / "frost.npy").read_bytes()
    (folder / "frost.npy").write_bytes(data[: len(data) // 2])


def archived(folder: Path) -> None:
    with (folder / "frost.npy").open("wb") as file:
        np.savez(file, a=np.zeros(3))


BAD_OFFICIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "frost.npy").unlink(), r"CIFAR-10-C lacks frost\.npy; name the folder"),
    "no labels": (lambda f: (f / "labels.npy").unlink(), r"lacks labels\.npy; "),
    "cut": (cut, r"frost\.npy: not a readable \.npy array"),
    "empty": (lambda f: (f / "frost.npy").write_bytes(b""), r"frost\.npy: not a readable \.npy array"),
    "text": (lambda f: (f / "frost.npy").write_text("<html>404"), r"frost\.npy: not a readable"),
    "archive": (archived, r"frost\.npy: not a readable \.npy array \(the magic string"),
    "half an archive": (lambda f: (f / "frost.npy").write_bytes(b"PK\x03\x04abc"), r"frost\.npy: not a readable"),
    "pickle": (
        lambda f: (f / "frost.npy").write_bytes(pickle.dumps(Trap(f / "sprung"))),
        r"frost\.npy: not a readable",
    ),
    "objects": (
        lambda f: np.save(f / "frost.npy", np.array([Trap(f / "sprung")], object), allow_pickle=True),
        r"frost\.npy: not a readable",
    ),
    "floats": (
        replaced("frost.npy", lambda a: a / 255),
        r"frost\.npy: expected uint8 \(30.*, got float64 \(30, ",
    ),
    "few": (
        replaced("frost.npy", lambda a: a[:24]),
        r"expected uint8 \(30, 8, 8, 3\), five severities of the 6 test images .*, got uint8 \(24, 8, 8, 3\)",
    ),
    "channels first": (replaced("frost.npy", lambda a: a.transpose(0, 3, 1, 2)), r"got uint8 \(30, 3, 8, 8\)"),
    "size": (replaced("frost.npy", lambda a: a[:, :7]), r"got uint8 \(30, 7, 8, 3\)"),
    "grey": (replaced("frost.npy", lambda a: a[..., 0]), r"got uint8 \(30, 8, 8\)"),
    "few labels": (
        replaced("labels.npy", lambda a: a[:6]),
        r"labels\.npy: expected 30 integers, five times the 6 test labels of .*, got uint8 \(6,\)",
    ),
    "float labels": (replaced("labels.npy", lambda a: a * 1.0), r"labels\.npy: .*, got float64"),
    "other labels": (
        replaced("labels.npy", lambda a: np.where(np.arange(30) == 13, 0, a)),
        r"labels\.npy, row 13: expected label 1, that of test image 1 of .*, got 0 \(1 of 30 differ\).*CIFAR-10 itself",
    ),
    "other order": (replaced("labels.npy", np.sort), r"labels\.npy, row 1: expected label 1, that of test image 1"),
}


@pytest.mark.parametrize("case", BAD_OFFICIAL)
def test_a_bad_official_folder_is_one_clear_line(case, tmp_path):
    data = coloured(tmp_path)
    folder = folder_for(data, tmp_path / "CIFAR-10-C", ("frost", "snow"))
    spoil, pattern = BAD_OFFICIAL[case]
    spoil(folder)
    with pytest.raises(UserError, match=pattern) as caught:
        official(folder, data, ("frost", "snow"))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not (folder / "sprung").exists()


def test_a_damaged_header_is_one_clear_line(tmp_path):
    """Every byte of a .npy header, changed in two ways: the array is refused, or is the same."""
    data = coloured(tmp_path)
    folder = folder_for(data, tmp_path / "c", ("snow",))
    content = (folder / "snow.npy").read_bytes()
    assert len(content) == 128 + 30 * 8 * 8 * 3
    for place in range(128):
        for change in (1, 128):
            (folder / "snow.npy").write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
            try:
                assert official(folder, data, ("snow",)).arrays["snow"].shape == (30, 8, 8, 3)
            except UserError as error:
                assert "snow.npy" in str(error) and "\n" not in str(error)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a folder; name the one that CIFAR-10-C\.tar"):
        official(tmp_path / "nowhere", coloured(tmp_path))
