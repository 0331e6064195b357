"""Columns of a grid beside the scores: OOD AUROC, accuracy on corrupted images, CPU seconds.

Both image sets are small, so that they cost little beside a chain, and the same for all rows. Each pair of a corruption
and a severity takes its own test images: no image is counted twice, and the mean over pairs is the published one's.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fbpc_ray.core.rng import generator
from fbpc_ray.data.corrupted_splits import official
from fbpc_ray.data.corruptions import CORRUPTIONS, FROST_NOTE, PAIRS, RECIPE, SEVERITIES, corrupt
from fbpc_ray.data.datasets import Dataset, Split
from fbpc_ray.data.ood import ood_split
from fbpc_ray.evaluation.chains import Chain, EvaluationContext, on_device, scored_result, values
from fbpc_ray.evaluation.last_layer import PREDICTORS
from fbpc_ray.evaluation.scoring import score
from fbpc_ray.inference.metrics import scores

SEED = 0
"""Of the choice of images and of the corruptions: the same for all rows."""


class Extras(NamedTuple):
    """Images that a grid scores beside the test split."""

    ood: Split | None = None
    corrupted: Split | None = None


class ExtraColumns(NamedTuple):
    """The image sets of a grid, and their descriptions in its rows."""

    dataset: Dataset
    ood: Split | None
    source: Path | None
    """Official CIFAR-10-C folder; None generates the images."""
    most_images: int
    ood_name: str | None

    def row(self) -> dict[str, Any]:
        """Return the descriptions as columns of a row."""
        origin = f"of {self.source}" if self.source else f"generated, recipe {RECIPE}"
        count = len(PAIRS) * self._images_a_pair()
        return {"ood": self.ood_name, "corruptions": f"{count} images {origin}, seed {SEED}"}

    def describes(self, row: dict[str, Any]) -> bool:
        """Return whether `row` was scored on these image sets, or by an earlier version on none."""
        own_row = self.row()
        return row["ood"] == (own_row["ood"] or row["ood"]) and row["corruptions"] in (None, own_row["corruptions"])

    def images(self) -> Extras:
        """Draw the out-of-distribution images, and corrupt test images."""
        return Extras(self.ood, self._corrupted())

    def _images_a_pair(self) -> int:
        return max(1, min(self.most_images, len(self.dataset.test.labels)) // len(PAIRS))

    def _corrupted(self) -> Split:
        test, size = self.dataset.test, self._images_a_pair()
        order = torch.randperm(len(test.labels), generator=generator(SEED, "grid", "corrupted")).numpy()
        folder = official(self.source, self.dataset) if self.source else None
        images, labels = [], []
        for number, (name, severity) in enumerate(PAIRS):
            index = np.take(order, range(number * size, (number + 1) * size), mode="wrap")
            if folder:
                images.append(folder.split(name, severity).images[index])
            else:
                parts = [corrupt(test.images[i : i + 1], name, severity, SEED, first=int(i)) for i in index]
                images.append(np.concatenate(parts))
            labels.append(test.labels[index])
        return Split(np.concatenate(images), np.concatenate(labels))


def extra_columns(
    dataset: Dataset, other: Dataset | None, resize: bool, source: Path | None, most_images: int
) -> ExtraColumns:
    """Describe the image sets of a grid on `dataset`. Raises UserError for images of another size without `resize`.

    Args:
        other: the data set whose test images are out of distribution.
        resize: see `ood_split`.
        source: official CIFAR-10-C folder; None generates the corruptions.
        most_images: of each set.
    """
    if other is None:
        return ExtraColumns(dataset, None, source, most_images, None)
    total = len(other.test.labels)
    index = torch.randperm(total, generator=generator(SEED, "grid", "ood"))[:most_images].numpy()
    chosen = other._replace(test=Split(other.test.images[index], other.test.labels[index]))
    name = f"{len(index)} of {other.name.rstrip('/').split('/')[-1]}, {other.fingerprint[:8]}"
    return ExtraColumns(dataset, ood_split(dataset, chosen, resize), source, most_images, name)


def extra_notes(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Describe the image sets of the rows of a grid, for the table."""
    ood, corruptions = ({row[name] for row in rows if row[name]} for name in ("ood", "corruptions"))
    lines = [f"OOD AUROC of the predictive entropy: test images against {line}" for line in sorted(ood)]
    if corruptions:
        pairs = f"{len(CORRUPTIONS)} corruptions x {len(SEVERITIES)} severities"
        lines += [f"corrupted images: {line}, {pairs}, each pair on its own images" for line in sorted(corruptions)]
        lines += [FROST_NOTE] if any("generated" in line for line in corruptions) else []
    return (*lines, "CPU seconds to judge: training or sampling, and predicting the test split once")


def score_chain(context: EvaluationContext, chain: Chain, extras: Extras, device: str) -> dict[str, float]:
    """Run the inference of a row; return its quantities by column, empty for one that diverged."""
    start = time.process_time()
    predictor = PREDICTORS[context.settings.inference](context, chain, device)
    if predictor is None:
        return {}
    inside = score(predictor.logits, on_device(context.split, context, device))
    seconds = time.process_time() - start
    outside = None if extras.ood is None else score(predictor.logits, on_device(extras.ood, context, device))
    result = scored_result(inside, outside)
    if result.stats is None:
        return {}
    row = values(result) | {"judge_seconds": seconds}
    if extras.corrupted is not None:
        corrupted = score(predictor.logits, on_device(extras.corrupted, context, device))
        if not corrupted.finite:
            return {}
        row["corruption_accuracy"] = scores(corrupted.stats).accuracy
    return row
