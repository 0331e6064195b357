"""Folders of images: which folders are splits and classes, which files are read, and what is said of the others."""

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data_files import encode, picture, write_classes, write_image, write_splits

from fbpc_ray.core.errors import UserError
from fbpc_ray.data import images
from fbpc_ray.data.datasets import Dataset, load
from fbpc_ray.data.resize import Resizing


def read(path: Path) -> Dataset:
    return load(f"folder:{path}")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def counts(data: Dataset) -> tuple[list[int], list[int], list[int]]:
    """Images of each class in train, validation and test."""
    splits = data.train, data.validation, data.test
    train, held, test = (np.bincount(split.labels, minlength=len(data.classes)).tolist() for split in splits)
    return train, held if sum(held) else [], test


def notes(data: Dataset) -> str:
    return "\n".join(data.notes)


@pytest.fixture
def good(tmp_path):
    """4 train and 3 test images of each of the classes a and b."""
    return write_splits(tmp_path / "good")


# ---- names of splits


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training", "testing"), ("training_set", "test_set"), ("train_images", "test_images"),
        ("seg_train", "seg_test"),
        ("Train_data", "Test_data"), ("TrainSet", "TestSet"), ("trainset", "testset"), ("Training", "eval"),
        ("images_train", "images_test"), ("mnist_train", "mnist_test"), ("training", "evaluation"),
    ],
)  # fmt: skip
def test_other_names_of_splits_are_read_as_such_with_a_note(tmp_path, train, test):
    data = read(write_splits(tmp_path, train, test))
    plain = read(write_splits(tmp_path / "plain"))
    assert data.classes == ("a", "b") and counts(data) == ([4, 4], [], [3, 3])
    assert data.fingerprint == plain.fingerprint and not plain.notes
    assert f"{train} as the train split, {test} as the test split" in notes(data)


@pytest.mark.parametrize("word", ["validation", "dev", "val_images", "valset"])
def test_a_validation_folder_by_another_name(tmp_path, word):
    write_classes(write_splits(tmp_path) / word, count=2, first=70)
    assert counts(read(tmp_path)) == ([4, 4], [2, 2], [3, 3])


def test_training_and_validation(tmp_path):
    data = read(write_splits(tmp_path, "training", "validation"))
    assert counts(data) == ([4, 4], [], [3, 3])
    assert "validation split serves as test" in notes(data)


def test_dev_and_eval_are_taken_and_said(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "dev", count=2, first=50)
    write_classes(tmp_path / "eval", count=3, first=60)
    data = read(tmp_path)
    assert counts(data) == ([4, 4], [2, 2], [3, 3])
    assert "dev as the validation split, eval as the test split" in notes(data)


@pytest.mark.parametrize("other", ["eval", "train_noisy", "train_masks", "test-small", "store", "train_val"])
def test_a_usual_name_goes_first_and_the_other_folder_is_named(good, other):
    write_classes(good / other, first=80)
    data = read(good)
    assert counts(data) == ([4, 4], [], [3, 3])
    assert f"left out {other}" in notes(data)


@pytest.mark.parametrize(
    "names", [("training", "train_set", "test"), ("train", "Train", "test"), ("train", "val", "valid")]
)
def test_two_folders_of_one_split_are_refused(tmp_path, names):
    for name in names:
        write_classes(tmp_path / name)
    assert "split; keep one" in refusal(tmp_path)


def test_splits_of_several_data_sets_are_refused(tmp_path):
    for name in ("cat_train", "cat_test", "dog_train", "dog_test"):
        write_classes(tmp_path / name)
    assert "splits of several data sets" in refusal(tmp_path)


@pytest.mark.parametrize("word", ["train", "test", "dev", "bullet train"])
def test_a_class_may_have_the_name_of_a_split(tmp_path, word):
    data = read(write_classes(tmp_path, ["car", "plane", word], 5))
    assert data.classes == tuple(sorted(["car", "plane", word])) and len(data.train.labels) == 12
    assert word == "bullet train" or f"read {word} as a class" in notes(data)


@pytest.mark.parametrize("names", [("train", "test"), ("training", "testing"), ("train", "val", "test")])
def test_splits_without_class_folders_are_refused(tmp_path, names):
    assert "no class folders in" in refusal(write_classes(tmp_path, names))


def test_a_test_folder_without_labels_leaves_the_validation_folder_as_test(tmp_path):
    write_splits(tmp_path, "train", "val")
    write_image(tmp_path / "test" / "0.png")
    data = read(tmp_path)
    assert counts(data) == ([4, 4], [], [3, 3])
    assert "left out test (1 images): no class folders" in notes(data)


def test_a_split_within_a_folder_of_its_name(tmp_path):
    write_classes(tmp_path / "seg_train" / "seg_train")
    write_classes(tmp_path / "seg_test" / "seg_test", count=3, first=50)
    assert counts(read(tmp_path)) == ([4, 4], [], [3, 3])


def test_a_wrapped_data_set_is_refused_with_its_inner_folder(tmp_path):
    write_splits(tmp_path / "one" / "dataset")
    assert f"give folder:{tmp_path / 'one' / 'dataset'}" in refusal(tmp_path / "one")
    write_classes(tmp_path / "two" / "dataset")
    assert f"give folder:{tmp_path / 'two' / 'dataset'}" in refusal(tmp_path / "two")


def test_splits_within_the_classes_are_refused(tmp_path):
    for name in ("cat", "dog"):
        write_classes(tmp_path / name, ["train", "test"])
    assert "splits within a class; move them to" in refusal(tmp_path)


def test_a_folder_of_save_to_disk_is_refused(tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert "save_to_disk" in refusal(tmp_path) and "to_parquet" in refusal(tmp_path)


def test_the_root_of_the_file_system_is_refused():
    assert "root of the file system" in refusal(Path("/"))


# ---- classes


def test_one_class_is_refused(tmp_path):
    assert "has 1 class" in refusal(write_splits(tmp_path, names=["a"]))


def test_an_empty_class_is_refused(good):
    (good / "train" / "c").mkdir()
    assert "class 'c' (label 2)" in refusal(good)


def test_a_class_without_test_images_is_named(tmp_path):
    write_classes(tmp_path / "train", ["a", "b", "c"])
    write_classes(tmp_path / "test", ["a", "b"], 3)
    data = read(tmp_path)
    assert counts(data) == ([4, 4, 4], [], [3, 3, 0])
    assert "no test image of class 'c'" in notes(data)


def test_one_spelling_of_accents_is_the_other(tmp_path):
    names = ["café", "über"]
    write_classes(tmp_path / "train", [unicodedata.normalize("NFC", name) for name in names])
    write_classes(tmp_path / "test", [unicodedata.normalize("NFD", name) for name in names], 3, first=50)
    data = read(tmp_path)
    assert counts(data) == ([4, 4], [], [3, 3]) and data.classes == tuple(names)
    write_classes(tmp_path / "train", [unicodedata.normalize("NFD", names[0])])
    assert "differ only in Unicode form" in refusal(tmp_path)


def test_a_class_name_that_is_not_utf8_is_refused_in_printable_text(good):
    folder = os.fsencode(good / "train") + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102  a Path can't hold it printably
    write_image(Path(os.fsdecode(folder)) / "0.png")
    assert "is not UTF-8; rename the class" in refusal(good)
    refusal(good).encode()


@pytest.mark.parametrize("name", ["a\x1b[31mb", "bell\x07", "del\x7f"])
def test_control_characters_in_class_names_are_refused(good, name):
    write_classes(good / "train", [name])
    assert "control characters" in refusal(good) and refusal(good).isprintable()


def test_unusual_names_of_classes_are_read(tmp_path):
    names = ["10", "2", "a b", "日本語", "x$y$", "q,r", "-dash", "<b>&amp;", "100%", "tab\tname", "new\nline", "💡"]
    assert read(write_splits(tmp_path, names=names)).classes == tuple(sorted(names))


def test_images_in_folders_below_their_class(tmp_path):
    for split in ("train", "test"):
        write_classes(tmp_path / split / "animal", ["cat", "dog"])
        write_classes(tmp_path / split / "plant", ["oak"])
    data = read(tmp_path)
    assert data.classes == ("animal", "plant") and counts(data) == ([8, 4], [], [8, 4])
    assert "several folders below animal;" in notes(data)


# ---- walking


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints", ".git", ".thumbnails", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "#recycle"],
)
def test_hidden_and_system_folders_are_left_out(good, name):
    for place in (good, good / "train", good / "train" / "a", good / "test" / "b"):
        write_image(place / name / "x.png")
    data = read(good)
    assert data.classes == ("a", "b") and counts(data) == ([4, 4], [], [3, 3]) and not data.notes


def test_system_files_are_left_out(good):
    for name in (".DS_Store", "a/Thumbs.db", "a/._000.png", "a/desktop.ini", "b/.hidden.png"):
        (good / "train" / name).write_bytes(b"x")
    assert counts(read(good)) == ([4, 4], [], [3, 3]) and not read(good).notes


def test_flat_classes_beside_a_macos_folder(tmp_path):
    write_classes(tmp_path, count=5)
    (tmp_path / "__MACOSX" / "a").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "a" / "._000.png").write_bytes(b"x")
    assert counts(read(tmp_path)) == ([4, 4], [], [1, 1])


@pytest.mark.parametrize(
    ("link", "target"),
    [("train/a/up", ".."), ("train/b/here", "."), ("train/a/top", "../.."), ("train/loop", "."), ("train/loop", ".."),
     ("train/a/b", "../b"), ("train/b/copy.png", "../a/000.png"), ("train/a/sub/up", "..")],
)  # fmt: skip
def test_links_neither_multiply_nor_mix_images(good, link, target):
    plain = read(good).fingerprint
    (good / link).parent.mkdir(exist_ok=True)
    (good / link).symlink_to(target)
    data = read(good)
    assert counts(data) == ([4, 4], [], [3, 3]) and data.fingerprint == plain
    assert link == "train/loop" or "links to files that are read under another path" in notes(data)


def test_links_between_classes_end(good):
    (good / "train" / "a" / "x").symlink_to("../b")
    (good / "train" / "b" / "y").symlink_to("../a")
    assert counts(read(good)) == ([4, 4], [], [3, 3])


def test_links_to_a_store_are_read_and_broken_ones_refused(good, tmp_path):
    store = write_classes(tmp_path / "store", count=6, first=20)
    (good / "test" / "a" / "more").symlink_to(store / "a")
    (good / "train" / "b" / "one.png").symlink_to(store / "b" / "020.png")
    (good / "train" / "a" / "one.png").symlink_to(store / "a" / "020.png")
    data = read(good)
    assert counts(data) == ([5, 5], [], [9, 3])
    assert "1 images of the test split are the same files as train images" in notes(data)
    (good / "train" / "a" / "broken.png").symlink_to(store / "gone.png")
    assert "broken.png" in refusal(good)
    (good / "train" / "a" / "broken.png").unlink()
    (good / "train" / "c").symlink_to(store / "c")
    assert "train/c: the target of the link doesn't exist" in refusal(good)


def test_folders_too_deep_are_refused(good):
    write_image(Path(good, "train", "a", *"bcdefghijklmnopqrst", "0.png"))
    assert "folders below its class" in refusal(good)


def test_a_fifo_is_refused_without_waiting(good):
    os.mkfifo(good / "train" / "a" / "pipe.png")
    assert "pipe.png is missing or not a regular file" in refusal(good)


def test_a_long_walk_prints_progress(good, monkeypatch, capsys):
    monkeypatch.setattr("fbpc_ray.core.progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr("fbpc_ray.core.progress.LINE_SHARE", 0.0)
    for number in range(130):
        (good / "train" / "a" / f"{number}.txt").touch()
    read(good)
    lines = capsys.readouterr().out.splitlines()
    assert f"{good / 'train'}: files seen: 64 so far" in lines
    assert any(line.startswith(f"{good / 'train'}: images decoded: image 4/8 (50 %), ") for line in lines)


# ---- what is read of a class


@pytest.mark.parametrize("suffix", [".jfif", ".JFIF", ".jpe", ".JPG"])
def test_jpeg_by_its_other_names(good, suffix):
    write_image(good / "train" / "a" / f"x{suffix}", form="JPEG")
    assert counts(read(good)) == ([5, 4], [], [3, 3]) and not read(good).notes


def test_files_that_are_not_read_are_counted_by_suffix_and_class(good):
    for name in ("a/1.heic", "a/2.HEIC", "b/1.heic", "b/1.avif", "b/nosuffix", "b/x.npy"):
        (good / "train" / name).write_bytes(b"x")
    said = notes(read(good))
    assert "left out 6 files" in said
    for text in ("3 .heic (a 2, b 1)", "1 .avif (b 1)", "1 without suffix (b 1)", "1 .npy (b 1)"):
        assert text in said


def test_a_class_of_unread_files_alone_is_refused_with_their_suffix(good):
    (good / "train" / "c").mkdir()
    (good / "train" / "c" / "x.heic").write_bytes(b"x")
    assert "class 'c'" in refusal(good) and ".heic" in refusal(good)


def test_images_in_no_class_folder_are_named(good):
    write_image(good / "train" / "stray.png")
    assert counts(read(good)) == ([4, 4], [], [3, 3])
    assert "left out 1 images in no class folder (stray.png)" in notes(read(good))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.66, 0.9])
def test_a_cut_image_is_refused_with_its_name(good, form, share):
    data = encode(picture(0, 9, (16, 16)), form)
    (good / "train" / "a" / "000.png").write_bytes(data[: int(len(data) * share)])
    assert "000.png: not a readable image" in refusal(good)
    assert "0x" not in refusal(good)


def test_a_git_lfs_pointer_is_named(good):
    (good / "train" / "a" / "000.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(good)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The image that a viewer shows, by the definition of the EXIF tag."""
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90,
    }  # fmt: skip
    return turns[orientation](pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_are_upright_as_their_exif_orientation_says(tmp_path, form, orientation):
    stored = (12, 8) if orientation < 5 else (8, 12)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"lossless": True} if form == "WEBP" else {})
    data = encode(picture(0, 1, stored), form, **options)
    for split in ("train", "test"):
        for label, name in enumerate("ab"):
            at = tmp_path / split / name
            at.mkdir(parents=True)
            (at / "0.png").write_bytes(encode(picture(label, 5, (12, 8))))
    (tmp_path / "train" / "a" / "turned.png").write_bytes(data)
    pixels = np.asarray(Image.open(tmp_path / "train" / "a" / "turned.png"))
    if form == "TIFF":  # PIL turns these itself
        pixels = picture(0, 1, stored)
    np.testing.assert_array_equal(read(tmp_path).train.images[1], upright(pixels, orientation).transpose(2, 0, 1))


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
def test_a_turned_image_agrees_with_torchvision(tmp_path):
    """`decode_image` without and with the orientation; Hugging Face datasets calls PIL's exif_transpose as well."""
    import torch
    from torchvision.io import decode_image

    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(0, 1, (8, 12)), "PNG", exif=exif)
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    known = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), apply_exif_orientation=True)
    np.testing.assert_array_equal(read(tmp_path).train.images[0], known.numpy())
    assert "2 of 2 images are turned as their EXIF orientation says" in notes(read(tmp_path))


def test_a_turned_image_of_another_size_says_so(good):
    exif = Image.Exif()
    exif[0x0112] = 6
    (good / "train" / "b" / "x.jpg").write_bytes(encode(picture(0, 1, (8, 12)), "JPEG", exif=exif))
    assert "x.jpg: the image is 12x8 (turned as its EXIF orientation 6 says)" in refusal(good)


def test_pictures_in_the_transparency_are_named(good):
    alpha = np.zeros((8, 8, 4), np.uint8)
    alpha[..., 3] = picture(0, 1)[..., 0]
    (good / "train" / "a" / "000.png").write_bytes(encode(alpha))
    assert "1 of 8 images have all of their picture in the transparency" in notes(read(good))
    for path in good.rglob("*.png"):
        path.write_bytes(encode(alpha))
    assert "transparency, which is not read" in refusal(good)


def test_modes_and_animations(good):
    image, at = Image.fromarray(picture(0, 9)), good / "train" / "a"
    other = Image.fromarray(picture(1, 9))
    for mode, name in (
        ("L", "l.png"),
        ("LA", "la.png"),
        ("P", "p.png"),
        ("1", "one.png"),
        ("CMYK", "c.jpg"),
        ("RGBA", "r.png"),
    ):
        image.convert(mode).save(at / name)
    image.save(at / "anim.webp", save_all=True, append_images=[other], lossless=True)
    image.save(at / "pages.tif", save_all=True, append_images=[other])
    data = read(good)
    assert counts(data) == ([12, 4], [], [3, 3])
    files = sorted(path.name for path in at.iterdir())
    for name in ("anim.webp", "pages.tif", "r.png"):
        np.testing.assert_array_equal(data.train.images[files.index(name)], picture(0, 9).transpose(2, 0, 1))


def test_grey_images_of_16_bits_are_refused(good):
    (good / "train" / "a" / "x16.png").write_bytes(
        encode(Image.fromarray(picture(0, 9)[..., 0].astype(np.uint16) * 257))
    )
    assert "x16.png" in refusal(good) and "8 bits" in refusal(good)


# ---- damaged TIFF files


@pytest.mark.parametrize("compression", ["tiff_deflate", "tiff_lzw"])
def test_what_libtiff_prints_of_a_damaged_file_stands_in_the_one_line(good, capfd, compression):
    whole = encode(picture(0, 7, (64, 64)), "TIFF", compression=compression)
    damaged = bytes(byte ^ 0x55 if 300 <= at < 900 and at % 7 == 0 else byte for at, byte in enumerate(whole))
    path = good / "train" / "a" / "x.tif"
    path.write_bytes(damaged)
    said = refusal(good)
    assert re.match(rf"{path}: not a readable image \(.+; \w.*\)", said), said
    assert capfd.readouterr().err == ""


def test_a_damaged_tiff_that_is_read_is_noted_and_a_whole_one_is_silent(good, capfd, monkeypatch):
    """libtiff prints an error of the second file, which Pillow reads all the same."""
    read_one = images._read

    def read_and_print(data: bytes, resizing: Resizing) -> images.Pixels:
        if data.endswith(b"damaged"):
            os.write(2, b"Fax3Decode2D: Line length mismatch.\n")
        if data.startswith(b"II"):
            os.write(2, b"TIFFReadDirectory: Warning, Unknown field with tag 37724.\n")
        return read_one(data, resizing)

    monkeypatch.setattr(images, "_read", read_and_print)
    tiff = encode(picture(0, 7), "TIFF", compression="tiff_deflate")
    (good / "train" / "a" / "x.tif").write_bytes(tiff)
    assert not read(good).notes
    (good / "train" / "a" / "y.tif").write_bytes(tiff + b"damaged")
    assert "1 of 10 images are damaged TIFF files, read as far as they go" in notes(read(good))
    assert capfd.readouterr().err == ""
