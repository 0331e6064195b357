"""`--dry-run`: print what a run would do."""

from fbpc_ray.core import config
from fbpc_ray.core.progress import log
from fbpc_ray.execution.session import Session
from fbpc_ray.models.functional import Network


def describe(session: Session) -> None:
    """Print the configuration, the data, the networks and the missing experts."""
    dataset = session.dataset
    log(config.to_json(session.config).rstrip())
    counts = {split: len(getattr(dataset, split).labels) for split in ("train", "validation", "test")}
    log(f"data: {dataset.name}, {len(dataset.classes)} classes, images {dataset.image_shape}, {counts}")
    for spec in session.specs:
        log(f"{spec.architecture}: {Network(spec).parameter_count:,} parameters")
    for store in session.stores:
        missing = len(store.missing(session.config.experts.expert_count))
        log(f"{missing} experts to train in {store.folder}")
    log("dry run: nothing was written")
