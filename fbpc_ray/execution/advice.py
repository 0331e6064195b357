"""Notes on a configuration that a run can use, and that is unlikely to give a good coreset."""

import math

from fbpc_ray.core.settings import Distillation
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.expert_training import short_training_note
from fbpc_ray.execution.session import Session, num_steps
from fbpc_ray.execution.used_settings import uses

FEW_SGD_STEPS = 25
"""SGD steps at --start-epoch below which experts hardly differ from their initialisation."""
OFF_BY_DEFAULT = ("views", "gamma_window", "map_init", "rkl_estimator", "alpha_decay")
"""Settings that do nothing at their default, whatever the method."""
WIDE_ERROR = 3.0
"""Standard error of an accuracy in points, above which a note says what may be chance."""


def notes(session: Session) -> list[str]:
    """Return the notes on a run that begins."""
    candidates = (
        _unused(session),
        _start(session),
        *initial_coreset_notes(session),
        _nothing_saved(session),
        _test_images(session),
    )
    return [f"note: {note}" for note in candidates if note]


def _unused(session: Session) -> str:
    """Note settings that are off by default, were turned on, and do nothing in the method."""
    d, usual = session.config.distillation, Distillation()
    names = [
        f"--{name.replace('_', '-')}" for name in OFF_BY_DEFAULT
        if getattr(d, name) != getattr(usual, name) and not uses(session.config, name)
    ]  # fmt: skip
    return f"--method {d.method} does not use {' and '.join(names)}" if names else ""


def training_notes(session: Session) -> list[str]:
    """Return the notes that the training of missing experts logs."""
    count, images = session.config.experts.expert_count, len(session.dataset.train.labels)
    missing = [store for store in session.stores if store.missing(count)]
    return sorted({short_training_note(store.recipe, images) for store in missing} - {""})


def changed_images_note(dataset: Dataset, fingerprint: str, owner: str, consequence: str) -> str:
    """Return the note that the training images had another `fingerprint` earlier; empty where they had not.

    It is a note and no error, since another decoder, or another CPU's rounding of the mean, gives another fingerprint
    to the same files.

    Args:
        fingerprint: that of the data when `owner` was made; empty where its files have none.
        owner: the run or the sweep.
        consequence: what the change means for the command.
    """
    if fingerprint in ("", dataset.fingerprint):
        return ""
    return (
        f"note: the training images of {dataset.name} are not those of {owner} (fingerprint {dataset.fingerprint}, "
        f"then {fingerprint}): the data has changed, a relative path is of another folder, or another version of a "
        f"decoder or another kind of CPU read the files; {consequence}"
    )


def _start(session: Session) -> str:
    """Note snapshots that are too early, for the methods that take those from --start-epoch on."""
    d, e = session.config.distillation, session.config.experts
    per_epoch = -(-len(session.dataset.train.labels) // e.expert_batch_size)
    if not session.stores or d.start_rule != "from" or d.start_epoch * per_epoch >= FEW_SGD_STEPS:
        return ""
    if per_epoch * e.expert_epochs < FEW_SGD_STEPS:
        return ""  # the training's own note says more
    return (
        f"experts have taken only {d.start_epoch * per_epoch} SGD steps at --start-epoch {d.start_epoch} and know "
        f"little by then: try --start-epoch {-(-FEW_SGD_STEPS // per_epoch)}"
    )


def initial_coreset_notes(session: Session) -> list[str]:
    """Note what is assumed of --initial-coreset, and soft labels of it that the method can't use."""
    if session.restored is not None or session.initial_coreset is None:
        return []
    notes = [f"--initial-coreset: {note}" for note in session.initial_coreset.notes]
    if session.initial_coreset.coreset.soft_labels is not None and session.initial[0].soft_labels is None:
        notes.append("--initial-coreset: its soft labels are left out; add --learn-labels to begin with them")
    return notes


def _nothing_saved(session: Session) -> str:
    """Note a coreset that is as large as a good part of the data."""
    images, m = len(session.dataset.train.labels), session.config.distillation.ipc * len(session.dataset.classes)
    if not num_steps(session.config) or 2 * m <= images:
        return ""
    return f"the coreset has {m:,} images, the training set {images:,}: random images do as well there; lower --ipc"


def _test_images(session: Session) -> str:
    """Note a test set that is too small to tell two coresets apart."""
    images = len(session.dataset.test.labels)
    points = accuracy_error(images)
    if not WIDE_ERROR < points <= 50:
        return ""
    # Two standard errors of the difference of two accuracies, as at the end of a run.
    chance = min(100, 2 * math.sqrt(2) * points)
    return f"{images:,} test images are few: accuracies {chance:.0f} points apart may be equal"


def accuracy_error(images: int) -> float:
    """Return the standard error of an accuracy of one half on `images`, in points."""
    return 50 / math.sqrt(images) if images else math.inf
