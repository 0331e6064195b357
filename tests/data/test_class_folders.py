"""Folders of images: which folders are classes, and where the walk through them ends."""

import os
import unicodedata
from pathlib import Path

import pytest
from support.data_files import write_classes, write_image, write_splits
from support.folders import counts, notes, read, refusal


def test_one_class_is_refused(tmp_path):
    assert "has 1 class" in refusal(write_splits(tmp_path, names=["a"]))


def test_an_empty_class_is_refused(class_folders):
    (class_folders / "train" / "c").mkdir()
    assert "class 'c' (label 2)" in refusal(class_folders)


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


def test_a_class_name_that_is_not_utf8_is_refused_in_printable_text(class_folders):
    folder = os.fsencode(class_folders / "train") + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102  a Path can't hold it printably
    write_image(Path(os.fsdecode(folder)) / "0.png")
    assert "is not UTF-8; rename the class" in refusal(class_folders)
    refusal(class_folders).encode()


@pytest.mark.parametrize("name", ["a\x1b[31mb", "bell\x07", "del\x7f"])
def test_control_characters_in_class_names_are_refused(class_folders, name):
    write_classes(class_folders / "train", [name])
    assert "control characters" in refusal(class_folders) and refusal(class_folders).isprintable()


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


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints", ".git", ".thumbnails", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "#recycle"],
)
def test_hidden_and_system_folders_are_left_out(class_folders, name):
    for place in (class_folders, class_folders / "train", class_folders / "train" / "a", class_folders / "test" / "b"):
        write_image(place / name / "x.png")
    data = read(class_folders)
    assert data.classes == ("a", "b") and counts(data) == ([4, 4], [], [3, 3]) and not data.notes


def test_system_files_are_left_out(class_folders):
    for name in (".DS_Store", "a/Thumbs.db", "a/._000.png", "a/desktop.ini", "b/.hidden.png"):
        (class_folders / "train" / name).write_bytes(b"x")
    assert counts(read(class_folders)) == ([4, 4], [], [3, 3]) and not read(class_folders).notes


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
def test_links_neither_multiply_nor_mix_images(class_folders, link, target):
    plain = read(class_folders).fingerprint
    (class_folders / link).parent.mkdir(exist_ok=True)
    (class_folders / link).symlink_to(target)
    data = read(class_folders)
    assert counts(data) == ([4, 4], [], [3, 3]) and data.fingerprint == plain
    assert link == "train/loop" or "links to files that are read under another path" in notes(data)


def test_links_between_classes_end(class_folders):
    (class_folders / "train" / "a" / "x").symlink_to("../b")
    (class_folders / "train" / "b" / "y").symlink_to("../a")
    assert counts(read(class_folders)) == ([4, 4], [], [3, 3])


def test_links_to_a_store_are_read_and_broken_ones_refused(class_folders, tmp_path):
    store = write_classes(tmp_path / "store", count=6, first=20)
    (class_folders / "test" / "a" / "more").symlink_to(store / "a")
    (class_folders / "train" / "b" / "one.png").symlink_to(store / "b" / "020.png")
    (class_folders / "train" / "a" / "one.png").symlink_to(store / "a" / "020.png")
    data = read(class_folders)
    assert counts(data) == ([5, 5], [], [9, 3])
    assert "1 images of the test split are the same files as train images" in notes(data)
    (class_folders / "train" / "a" / "broken.png").symlink_to(store / "gone.png")
    assert "broken.png" in refusal(class_folders)
    (class_folders / "train" / "a" / "broken.png").unlink()
    for number in range(9):
        (class_folders / "train" / f".{number}").symlink_to(store / "gone")
    (class_folders / "train" / "c").symlink_to(store / "c")
    assert "train/c: the target of the link doesn't exist" in refusal(class_folders)


def test_folders_too_deep_are_refused(class_folders):
    write_image(Path(class_folders, "train", "a", *"bcdefghijklmnopqrst", "0.png"))
    assert "folders below its class" in refusal(class_folders)


def test_a_fifo_is_refused_without_waiting(class_folders):
    os.mkfifo(class_folders / "train" / "a" / "pipe.png")
    assert "pipe.png is missing or not a regular file" in refusal(class_folders)


def test_a_long_walk_prints_progress(class_folders, monkeypatch, capsys):
    monkeypatch.setattr("fbpc_ray.core.progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr("fbpc_ray.core.progress.LINE_SHARE", 0.0)
    for number in range(130):
        (class_folders / "train" / "a" / f"{number}.txt").touch()
    read(class_folders)
    lines = capsys.readouterr().out.splitlines()
    assert f"{class_folders / 'train'}: files seen: 64 so far" in lines
    assert any(line.startswith(f"{class_folders / 'train'}: images decoded: image 4/8 (50 %), ") for line in lines)
