"""Write the outputs of an ended run: coresets, pictures, scores, result.json; log them to MLflow."""

from typing import Any, NamedTuple

import numpy as np

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import log
from fbpc_ray.core.provenance import Provenance
from fbpc_ray.data import coreset
from fbpc_ray.data.datasets import Dataset, denormalise
from fbpc_ray.distillation.loop import Row
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import State, coreset_images
from fbpc_ray.distillation.worker import Backend
from fbpc_ray.evaluation import results
from fbpc_ray.evaluation.evaluate import EvaluationResult, describe_evaluation, evaluate
from fbpc_ray.execution.session import Session
from fbpc_ray.execution.worker_group import cpu_threads
from fbpc_ray.reporting import image_grids, run_figures
from fbpc_ray.reporting.charts import reliability
from fbpc_ray.tracking import run_logging
from fbpc_ray.tracking.protocol import Tracker


class LiveRun(NamedTuple):
    """A run at work: its session, and what the session is connected to."""

    session: Session
    run: RunDirectory
    workers: Backend
    provenance: Provenance
    tracker: Tracker


def evaluate_run(live: LiveRun, state: State, rows: list[Row]) -> dict[str, Any]:
    """Write coresets and pictures, evaluate both coresets, write and log the result; return it."""
    session, run = live.session, live.run
    coresets = _write_coresets(live, state)
    _draw_pictures(live, state, rows)
    log(describe_evaluation(coresets, session.specs, "test", session.config.evaluation))
    scored = evaluate(coresets, session.specs, session.dataset, "test", session.config, live.workers, log)
    draw_reliability(scored, run.reliability_path, len(session.dataset.test.labels))
    result = results.result_of(
        session.config, session.dataset, rows, scored.to_json(), "test", live.provenance, cpu_threads(session.config)
    )
    run.write_result(result)
    run_logging.log_result(
        live.tracker, run, session.config, session.dataset.name, scored.scores, scored.mixing, state.step
    )
    return result


def _write_coresets(live: LiveRun, state: State) -> dict[str, coreset.Coreset]:
    """Write the distilled coreset, and random images, as which it began by default; return both by name."""
    session, run, method = live.session, live.run, live.session.config.distillation.method
    coresets = {"random": session.coreset(session.real[0]), method: session.coreset(state)}
    facts = {"commit": live.provenance.commit}
    coreset.save(coresets[method], run.coreset_path, facts)
    coreset.save(coresets["random"], run.random_path, {**facts, "method": "random", "step": "0"})
    return coresets


def _draw_pictures(live: LiveRun, state: State, rows: list[Row]) -> None:
    """Draw the images, and what the steps did to them."""
    session, run, d = live.session, live.run, live.session.config.distillation
    dataset, labels = session.dataset, session.labels
    title = f"{d.method}, {dataset.name}, {d.ipc} per class, step {state.step}"
    image_grids.coreset_grid(pixels_of(state, dataset), labels.numpy(), dataset.classes, run.picture_path, title)
    if rows:
        if not run.before_path.exists():
            _draw_initial(live)
        run_figures.over_time(run, labels, dataset.classes, f"{d.method}, {dataset.name}, over the steps")
        run_figures.course(rows, d.method, run.course_path)


def _draw_initial(live: LiveRun) -> None:
    """Draw the images before step 1; log a note where --initial-coreset can't be read any more."""
    session, run, d = live.session, live.run, live.session.config.distillation
    try:
        first = pixels_of(session.initial[0], session.dataset)
    except UserError as error:
        log(f"note: {run.before_path.name} is left out: {error}")
        return
    origin = "images of --initial-coreset" if d.initial_coreset else "real images"
    title = f"{origin}, before step 1 of {d.method}"
    image_grids.coreset_grid(first, session.labels.numpy(), session.dataset.classes, run.before_path, title)


def draw_reliability(scored: EvaluationResult, path: Any, images: int) -> None:
    """Draw confidence against accuracy of every coreset and architecture on `images`, all chains together."""
    if scored.stats:
        panels = {f"{name} on {network}": stats for (name, network), stats in scored.stats.items()}
        reliability.reliability_diagram(panels, path, images=images)


def pixels_of(state: State, dataset: Dataset) -> np.ndarray:
    """Return the pseudocoreset as (m, c, h, w) uint8."""
    return denormalise(coreset_images(state), dataset.mean, dataset.std).numpy()
