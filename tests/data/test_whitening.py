"""The whitening of coresets that others made: its file, and the images that scores see."""

import re

import numpy as np
import pytest
import torch
from support.chains import context_of

from fbpc_ray.core.config import Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.data import whitening
from fbpc_ray.data.datasets import normalise
from fbpc_ray.data.whitening import Whitening
from fbpc_ray.evaluation.chains import on_device

SHAPE = (1, 8, 8)


def draw(seed: int) -> Whitening:
    source = np.random.default_rng(seed)
    return Whitening(source.normal(size=64).astype(np.float32), source.normal(size=(64, 64)).astype(np.float32))


def test_images_are_normalised_and_then_mapped(digits, tmp_path):
    """(x - mean) matrix with x in the order channel, row, column; read back from its file to the bit."""
    made = draw(0)
    whitening.save(made, tmp_path / "zca.npz")
    back = whitening.load(tmp_path / "zca.npz", SHAPE)
    assert np.array_equal(back.mean, made.mean) and np.array_equal(back.matrix, made.matrix)
    assert back.digest() == made.digest() != draw(1).digest()
    context = context_of(digits, "test", Evaluation(), np.zeros((1, *SHAPE), np.float32), np.zeros(1, np.int64))
    index = torch.tensor([5, 2])
    images, labels = on_device(digits.test, context._replace(whitening=back), "cpu").batch(index)
    x = normalise(torch.tensor(digits.test.images[[5, 2]]), digits.mean, digits.std).double().reshape(2, 64)
    expected = (x - torch.tensor(made.mean).double()) @ torch.tensor(made.matrix).double()
    torch.testing.assert_close(images.double(), expected.view(2, *SHAPE), rtol=1e-4, atol=1e-4)
    assert labels.tolist() == digits.test.labels[[5, 2]].tolist()
    plain, _ = on_device(digits.test, context, "cpu").batch(index)
    torch.testing.assert_close(plain.double(), x.view(2, *SHAPE))


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        (None, "not found; give"),
        (b"no archive", "no whitening"),
        ({"mean": np.zeros(64)}, "no whitening"),
        ({"mean": np.zeros(3), "matrix": np.eye(3)}, "expected mean (64,) and matrix (64, 64) for images (1, 8, 8)"),
        ({"mean": np.full(64, np.nan), "matrix": np.eye(64)}, "not finite"),
    ],
)  # fmt: skip
def test_a_file_without_a_whitening_of_these_images_is_refused(tmp_path, arrays, line):
    path = tmp_path / "zca.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=re.escape(line)) as error:
        whitening.load(path, SHAPE)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
