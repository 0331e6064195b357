"""Folders of images: which folders are training, validation and test splits."""

from pathlib import Path

import pytest
from support.data_files import write_classes, write_image, write_splits
from support.folders import counts, notes, read, refusal

from fbpc_ray.data import splits


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


def test_dev_and_eval_are_taken_with_a_note(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "dev", count=2, first=50)
    write_classes(tmp_path / "eval", count=3, first=60)
    data = read(tmp_path)
    assert counts(data) == ([4, 4], [2, 2], [3, 3])
    assert "dev as the validation split, eval as the test split" in notes(data)


@pytest.mark.parametrize("other", ["eval", "train_noisy", "train_masks", "test-small", "store", "train_val"])
def test_a_usual_name_goes_first_and_the_other_folder_is_named(class_folders, other):
    write_classes(class_folders / other, first=80)
    data = read(class_folders)
    assert counts(data) == ([4, 4], [], [3, 3])
    assert f"left out {other}" in notes(data)


@pytest.mark.parametrize("name", ["train_val", "TestVal", "dev-test", "bullet", ""])
def test_a_name_of_several_splits_or_of_none_is_no_split(name):
    assert splits.parse(name) is None


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


@pytest.mark.parametrize("names", [("train", "training"), ("val", "valid")])
def test_two_names_of_one_split_within_a_class_are_folders_of_the_class(tmp_path, names):
    for name in ("cat", "dog"):
        write_classes(tmp_path / name, names)
    assert "images lie in several folders below cat, dog" in notes(read(tmp_path))


def test_a_folder_of_save_to_disk_is_refused(tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert "save_to_disk" in refusal(tmp_path) and "to_parquet" in refusal(tmp_path)


def test_the_root_of_the_file_system_is_refused():
    assert "root of the file system" in refusal(Path("/"))
