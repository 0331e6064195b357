"""--test, and the test split that is drawn without it: stratified, fixed, an image of each class that has two."""

from pathlib import Path

import numpy as np
import pytest
from support.data_files import write_classes, write_splits

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.datasets import Dataset, load


@pytest.fixture
def plain(tmp_path) -> str:
    """Classes of 10, 5, 2 and 1 images, without splits."""
    for name, count in {"a": 10, "b": 5, "c": 2, "d": 1}.items():
        write_classes(tmp_path / "plain", [name], count)
    return f"folder:{tmp_path / 'plain'}"


def counts(data: Dataset) -> tuple[list[int], list[int], list[int]]:
    a, b, c = (
        np.bincount(split.labels, minlength=len(data.classes)).tolist()
        for split in (data.train, data.validation, data.test)
    )
    return a, b, c


def test_a_class_of_two_images_gets_a_test_image_and_one_of_one_is_named(plain):
    data = load(plain)
    assert counts(data) == ([8, 4, 1, 1], [0, 0, 0, 0], [2, 1, 1, 0])
    assert any("4 of 18 images, 20% of each class drawn with seed 0, serve as test" in note for note in data.notes)
    assert any(note.startswith("no test image of class 'd'") for note in data.notes)


def test_the_share_is_chosen_and_a_fifth_is_the_rule_without_it(plain):
    half = load(plain, test=0.5)
    assert counts(half) == ([5, 3, 1, 1], [0, 0, 0, 0], [5, 2, 1, 0])
    fifth, rule = load(plain, test=0.2), load(plain)
    assert fifth.fingerprint == rule.fingerprint != half.fingerprint
    np.testing.assert_array_equal(fifth.test.images, rule.test.images)
    assert any("50% of each class drawn with seed 0" in note for note in half.notes)


def test_test_images_do_not_depend_on_the_validation_split(plain):
    """So that a test score with and without --validation is of the same images."""
    alone, both = load(plain, test=0.3), load(plain, test=0.3, validation=0.25)
    np.testing.assert_array_equal(alone.test.images, both.test.images)
    assert counts(both) == ([5, 2, 1, 1], [2, 1, 0, 0], [3, 2, 1, 0])


def test_a_test_split_of_the_data_goes_before(tmp_path):
    data = load(f"folder:{write_splits(tmp_path)}", test=0.5)
    assert counts(data)[0::2] == ([4, 4], [3, 3])
    assert "has a test split of its own: test=0.5 is ignored" in data.notes[0]


def test_with_a_validation_split_the_test_split_is_drawn_from_train(tmp_path):
    """Without --test the validation split serves as test, as before."""
    root = write_splits(Path(tmp_path), test="val")
    assert counts(load(f"folder:{root}")) == ([4, 4], [0, 0], [3, 3])
    assert counts(load(f"folder:{root}", test=0.25)) == ([3, 3], [3, 3], [1, 1])


def test_classes_of_one_image_have_none_to_hold_out(tmp_path):
    """A larger share would not help."""
    data = f"folder:{write_classes(tmp_path, count=1)}"
    for share in (0.0, 0.9):
        with pytest.raises(UserError, match="each class has one image, so none can be held out; add images"):
            load(data, test=share)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_that_leave_nothing_are_refused(plain, share):
    with pytest.raises(UserError, match="test must be a share of the train split"):
        load(plain, test=share)
