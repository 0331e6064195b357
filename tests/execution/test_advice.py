"""Where the notes on a run that begins come and where not: at their limits."""

import numpy as np
import pytest
from support.runs import SMALL, SMALL_VBPC, silent

from fbpc_ray.core.config import Config
from fbpc_ray.data.datasets import Split
from fbpc_ray.execution.advice import notes
from fbpc_ray.execution.session import open_session


def notes_of(dataset, settings, **changes) -> str:
    config = Config().updated(**settings | {"backend": "serial"} | changes)
    return "\n".join(notes(open_session(config, silent, dataset)))


@pytest.mark.parametrize(("per_class", "noted"), [(2, False), (1, True)])
def test_a_coreset_of_more_than_half_of_the_images_saves_nothing(digits, per_class, noted):
    rows = np.concatenate([np.flatnonzero(digits.train.labels == label)[:per_class] for label in range(10)])
    few = digits._replace(train=Split(digits.train.images[rows], digits.train.labels[rows]))
    text = f"the coreset has 10 images, the training set {10 * per_class}"
    assert (text in notes_of(few, SMALL_VBPC)) == noted


@pytest.mark.parametrize(
    ("start", "epochs", "noted"), [(12, 20, True), (13, 20, False), (12, 13, True), (12, 12, False)]
)
def test_experts_that_know_little_at_the_start_epoch(digits, tmp_path, start, epochs, noted):
    """Two SGD steps an epoch: 24 by epoch 12, 26 by 13; of 24 in all the note on the training says more."""
    settings = {"expert_batch_size": 1000, "start_epoch": start, "expert_epochs": epochs, "experts": str(tmp_path)}
    text = notes_of(digits, SMALL, **settings)
    assert ("only 24 SGD steps at --start-epoch 12 and know little by then: try --start-epoch 13" in text) == noted
    assert ("know little" in text) == noted
