"""Folders of images: which files of a class are read, and what is said of the others."""

import os
import re
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from support.data_files import encode, picture, write_image
from support.folders import counts, notes, read, refusal

from fbpc_ray.data import images
from fbpc_ray.data.resize import Resizing


@pytest.mark.parametrize("suffix", [".jfif", ".JFIF", ".jpe", ".JPG"])
def test_jpeg_by_its_other_names(class_folders, suffix):
    write_image(class_folders / "train" / "a" / f"x{suffix}", form="JPEG")
    assert counts(read(class_folders)) == ([5, 4], [], [3, 3]) and not read(class_folders).notes


def test_files_that_are_not_read_are_counted_by_suffix_and_class(class_folders):
    for name in ("a/1.heic", "a/2.HEIC", "b/1.heic", "b/1.avif", "b/nosuffix", "b/x.npy"):
        (class_folders / "train" / name).write_bytes(b"x")
    lines = notes(read(class_folders))
    assert "left out 6 files" in lines
    for text in ("3 .heic (a 2, b 1)", "1 .avif (b 1)", "1 without suffix (b 1)", "1 .npy (b 1)"):
        assert text in lines


def test_a_class_of_unread_files_alone_is_refused_with_their_suffix(class_folders):
    (class_folders / "train" / "c").mkdir()
    (class_folders / "train" / "c" / "x.heic").write_bytes(b"x")
    assert "class 'c'" in refusal(class_folders) and ".heic" in refusal(class_folders)


def test_an_image_of_many_pixels_is_read_without_a_warning(class_folders, monkeypatch):
    """Pillow warns above a size and refuses above twice that size."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert counts(read(class_folders)) == ([4, 4], [], [3, 3])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert "exceeds limit of 40 pixels" in refusal(class_folders)


def test_images_in_no_class_folder_are_named(class_folders):
    write_image(class_folders / "train" / "stray.png")
    assert counts(read(class_folders)) == ([4, 4], [], [3, 3])
    assert "left out 1 image in no class folder (stray.png)" in notes(read(class_folders))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.66, 0.9])
def test_a_cut_image_is_refused_with_its_name(class_folders, form, share):
    data = encode(picture(0, 9, (16, 16)), form)
    (class_folders / "train" / "a" / "000.png").write_bytes(data[: int(len(data) * share)])
    assert "000.png: not a readable image" in refusal(class_folders)
    assert "0x" not in refusal(class_folders)


def test_a_git_lfs_pointer_is_named(class_folders):
    (class_folders / "train" / "a" / "000.png").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    assert "git lfs pull" in refusal(class_folders)


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


def test_a_turned_image_of_another_size_says_so(class_folders):
    exif = Image.Exif()
    exif[0x0112] = 6
    (class_folders / "train" / "b" / "x.jpg").write_bytes(encode(picture(0, 1, (8, 12)), "JPEG", exif=exif))
    assert "x.jpg: the image is 12x8 (turned as its EXIF orientation 6 says)" in refusal(class_folders)


def test_pictures_in_the_transparency_are_named(class_folders):
    alpha = np.zeros((8, 8, 4), np.uint8)
    alpha[..., 3] = picture(0, 1)[..., 0]
    (class_folders / "train" / "a" / "000.png").write_bytes(encode(alpha))
    assert "1 of 8 images have all of their picture in the transparency" in notes(read(class_folders))
    for path in class_folders.rglob("*.png"):
        path.write_bytes(encode(alpha))
    assert "transparency, which is not read" in refusal(class_folders)


def test_modes_and_animations(class_folders):
    image, at = Image.fromarray(picture(0, 9)), class_folders / "train" / "a"
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
    data = read(class_folders)
    assert counts(data) == ([12, 4], [], [3, 3])
    files = sorted(path.name for path in at.iterdir())
    for name in ("anim.webp", "pages.tif", "r.png"):
        np.testing.assert_array_equal(data.train.images[files.index(name)], picture(0, 9).transpose(2, 0, 1))


def test_grey_images_of_16_bits_are_refused(class_folders):
    (class_folders / "train" / "a" / "x16.png").write_bytes(
        encode(Image.fromarray(picture(0, 9)[..., 0].astype(np.uint16) * 257))
    )
    assert "x16.png" in refusal(class_folders) and "8 bits" in refusal(class_folders)


@pytest.mark.parametrize("compression", ["tiff_deflate", "tiff_lzw"])
def test_what_libtiff_prints_of_a_damaged_file_stands_in_the_one_line(class_folders, capfd, compression):
    content = encode(picture(0, 7, (64, 64)), "TIFF", compression=compression)
    damaged = bytes(byte ^ 0x55 if 300 <= at < 900 and at % 7 == 0 else byte for at, byte in enumerate(content))
    path = class_folders / "train" / "a" / "x.tif"
    path.write_bytes(damaged)
    lines = refusal(class_folders)
    assert re.match(rf"{path}: not a readable image \(.+; \w.*\)", lines), lines
    assert capfd.readouterr().err == ""


def test_a_damaged_tiff_that_is_read_is_noted_and_a_whole_one_is_silent(class_folders, capfd, monkeypatch):
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
    (class_folders / "train" / "a" / "x.tif").write_bytes(tiff)
    assert not read(class_folders).notes
    (class_folders / "train" / "a" / "y.tif").write_bytes(tiff + b"damaged")
    assert "1 of 10 images are damaged TIFF files, read as far as they go" in notes(read(class_folders))
    assert capfd.readouterr().err == ""
