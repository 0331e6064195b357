"""Columns of the grid beside the scores: inference by its column, OOD AUROC, corrupted images, CPU seconds."""

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.chains import brief_context

from fbpc_ray.core.rng import generator
from fbpc_ray.data.corruptions import CORRUPTIONS, FROST_NOTE, SEVERITIES, corrupt
from fbpc_ray.data.datasets import Split
from fbpc_ray.evaluation.chains import Chain, on_device, run_chain, values
from fbpc_ray.evaluation.last_layer import PREDICTORS, RUNNERS
from fbpc_ray.evaluation.scoring import score
from fbpc_ray.inference.uncertainty import auroc
from fbpc_ray.models.functional import specify
from fbpc_ray.reproduction.cost import CpuClock
from fbpc_ray.reproduction.extras import Extras, extra_columns, extra_notes, score_chain
from fbpc_ray.reproduction.rows import SCHEMA, Rows
from fbpc_ray.reproduction.summaries import summary


@pytest.fixture(scope="module")
def few(digits):
    """60 test images of digits."""
    return digits._replace(test=Split(digits.test.images[:60], digits.test.labels[:60]))


@pytest.mark.parametrize("inference", ["sghmc", "last-layer", "mse", "ensemble"])
def test_a_column_is_judged_by_its_own_inference(few, inference):
    """The scores of `fbpc evaluate --inference`; of 60 other images the AUROC, and the accuracy on corrupted ones."""
    shared, chain = brief_context(few, inference), Chain("x", specify("convnet-in", few.image_shape, 10, 8, 0), 1)
    noise = np.random.default_rng(0).integers(0, 256, (60, *few.image_shape), dtype=np.uint8)
    ood = Split(noise, np.zeros(60, np.int64))
    extras = Extras(ood, Split(few.test.images[::-1].copy(), few.test.labels[::-1].copy()))
    row = score_chain(shared, chain, extras, "cpu")
    expected = values(RUNNERS.get(inference, run_chain)(shared, chain, "cpu"))
    assert {name: row[name] for name in expected} == expected
    assert row["corruption_accuracy"] == pytest.approx(expected["accuracy"])  # the same images in another order
    assert 0 < row["judge_seconds"] < 60
    predictor = PREDICTORS[inference](shared, chain, "cpu")
    assert predictor is not None
    inside, outside = (
        score(predictor.logits, on_device(split, shared, "cpu")).uncertainty.entropy for split in (few.test, ood)
    )
    assert row["ood_auroc_entropy"] == auroc(inside, outside)
    assert set(row) <= set(SCHEMA.names)


def test_a_corrupted_image_is_that_of_the_whole_split_and_each_pair_has_its_own(digits):
    """100 images for 50 pairs of a corruption and a severity: two each, all of them different."""
    columns = extra_columns(digits, None, False, None, 100)
    corrupted = columns.images().corrupted
    assert corrupted is not None
    assert corrupted.images.shape == (100, *digits.image_shape)
    order = torch.randperm(len(digits.test.labels), generator=generator(0, "grid", "corrupted"))[:100]
    assert torch.equal(torch.as_tensor(corrupted.labels), torch.as_tensor(digits.test.labels)[order])
    pairs = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    for number in (0, 17, 49):
        whole = corrupt(digits.test.images, *pairs[number], 0)
        assert np.array_equal(corrupted.images[2 * number : 2 * number + 2], whole[order[2 * number : 2 * number + 2]])


def test_a_test_split_smaller_than_the_pairs_repeats_its_images(few):
    tiny = few._replace(test=Split(few.test.images[:7], few.test.labels[:7]))
    corrupted = extra_columns(tiny, None, False, None, 1000).images().corrupted
    assert corrupted is not None
    assert np.bincount(corrupted.labels, minlength=10).sum() == 50


def test_a_row_is_made_again_for_other_images_alone(digits, few):
    """Rows without --ood, or of earlier versions, stay where none is asked."""
    plain = extra_columns(digits, None, False, None, 100)
    other = extra_columns(digits, few._replace(name="parquet:data/few"), False, None, 100)
    assert other.row()["ood"] == f"60 of few, {digits.fingerprint[:8]}"
    assert other.ood is not None and len(other.ood.labels) == 60
    part = extra_columns(digits, few, False, None, 20)
    assert part.ood is not None and len(part.ood.labels) == 20 and part.row()["ood"].startswith("20 of ")
    old = {"ood": None, "corruptions": None}
    assert plain.describes(old) and plain.describes(plain.row()) and plain.describes(other.row())
    assert other.describes(other.row()) and not other.describes(plain.row()) and not other.describes(old)
    official = {"ood": None, "corruptions": "1000 images of /c10c, seed 0"}
    assert not plain.describes(official)
    notes = extra_notes([old, other.row()])
    assert FROST_NOTE in notes and FROST_NOTE not in extra_notes([official])
    assert [note for note in notes if "60 of few" in note]
    assert [note for note in notes if note.startswith("corrupted images: 100 images generated")]


def test_rows_of_earlier_versions_are_read(tmp_path):
    """A file without the later columns, of a chain that ended well: the columns are null, not diverged."""
    names = SCHEMA.names[: SCHEMA.names.index("logit") + 1]
    old = pa.schema([SCHEMA.field(name) for name in names if name not in ("ood", "corruptions")])
    row = {"key": "k", "eval_seed": 0, "distill_seed": 0, "row": "FBPC", "column": "c", "accuracy": 0.5, "nll": 2.0}
    pq.write_table(pa.Table.from_pylist([row], schema=old), tmp_path / "k-0.parquet")
    new = {**row, "eval_seed": 1, "make_seconds": 10.0, "ood": "x"}
    Rows(tmp_path).write([new])
    rows = Rows(tmp_path).read()
    assert [(row["accuracy"], row["make_seconds"], row["ood"]) for row in rows] == [(0.5, None, None), (0.5, 10.0, "x")]
    result = summary(rows, "make_seconds")
    assert result is not None
    assert (result.mean, result.values, result.diverged) == (10.0, 1, 0)


def test_cpu_seconds_add_up_over_processes(tmp_path):
    path = tmp_path / "run" / "cpu-seconds.txt"
    path.parent.mkdir()
    path.write_text("100.5\n")
    clock, start = CpuClock(path), time.process_time()
    while time.process_time() - start < 0.05:
        pass
    clock.save()
    assert 100.55 <= float(path.read_text()) < 110
    path.write_text("damaged")
    assert CpuClock(path).seconds() < 1
