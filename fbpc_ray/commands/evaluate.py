"""`fbpc evaluate RUN`: SGHMC on the coresets of a run, on networks that need not be those of the run."""

import shlex
from typing import Any, NamedTuple

from fbpc_ray.commands import planning, summary
from fbpc_ray.core import files
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import log, resume_hint
from fbpc_ray.core.provenance import Provenance, capture
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import Place
from fbpc_ray.data import coreset
from fbpc_ray.data.datasets import Dataset, Split
from fbpc_ray.data.ood import check_resize, ood_split
from fbpc_ray.distillation.expert_store import slug
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import calibration, protocols, results
from fbpc_ray.evaluation import evaluate as evaluation
from fbpc_ray.evaluation.calibration import Calibrated
from fbpc_ray.evaluation.evaluate import EvaluationResult, check_split, check_split_name, describe_evaluation
from fbpc_ray.execution import advice, memory_budget, memory_estimate, validation
from fbpc_ray.execution.backends import open_backend
from fbpc_ray.execution.session import Session, load_as_it_is, load_ood, network_specs
from fbpc_ray.execution.worker_group import cpu_threads
from fbpc_ray.models.functional import Spec
from fbpc_ray.reporting.charts import histograms
from fbpc_ray.reporting.run_outputs import draw_reliability
from fbpc_ray.tracking import model_export, run_contents, run_logging
from fbpc_ray.tracking.protocol import Tracker


class Options(NamedTuple):
    """What `fbpc evaluate RUN` takes beside the configuration."""

    split: str = "test"
    """test | validation."""
    ood: str = ""
    """A data set, whose test images the uncertainty should tell from those of the run."""
    ood_resize: bool = False
    save_model: str = ""
    """A folder for the samples of the first chain, as an MLflow model."""
    tracking_uri: str = ""
    """The MLflow store; empty means the default one."""
    protocol: str = "paper"
    """paper | calibrated: also evaluate chains whose temperature and prior the validation split chooses."""


def evaluate(folder: Place, config: Config, options: Options, *, dry_run: bool, json: str) -> None:
    """Evaluate the coreset of the run in `folder` and its random coreset, on the networks of `config`."""
    check_split_name(options.split)
    check_resize(options.ood, options.ood_resize)
    run, config = RunDirectory(folder), validation.validate(config)
    session = _open(run, config.updated(download=False) if dry_run else config)
    config, coresets = session.config, session.coresets
    fix = "distil with --validation 0.1"
    check_split(session.dataset, options.split, fix)
    calibration.check(options.protocol, config.evaluation, session.dataset, fix)
    target = model_export.optional_target(options.save_model, session.specs)
    ood = _ood_images(session, options) if options.ood else None
    if dry_run:
        planning.describe(session, parts=("chains",))
        return
    files.check_folder(run.folder / "evaluations")
    with open_backend(config, Interruption(), log) as workers, resume_hint("nothing was written"):
        provenance = capture(workers.describe())
        path = _next_path(run, options.split, session.specs)
        tags = {"evaluation": path.name, "split": options.split, **({"ood": options.ood} if options.ood else {})}
        name = path.name.removesuffix(".json")
        uri = run_logging.chosen_uri(options.tracking_uri)
        with run_logging.track_evaluation(config, session.dataset, run, name, tags, provenance, log, uri) as tracker:
            log(describe_evaluation(coresets, session.specs, options.split, config.evaluation))
            scored = evaluation.evaluate(
                coresets, session.specs, session.dataset, options.split, config, workers, log, ood,
                keep_samples_of=config.distillation.method if target else "",
            )  # fmt: skip
            result = results.result_of(
                config, session.dataset, [], scored.to_json(), options.split, provenance, cpu_threads(config)
            )
            result |= {"ood": options.ood} if options.ood else {}
            calibrated = None
            if options.protocol == protocols.CALIBRATED:
                calibrated = calibration.calibrated(
                    coresets, session.specs, session.dataset, options.split, config, workers, log
                )
                result |= {"calibrated": calibrated.to_json()}
            if path.exists():  # of an evaluation that began when this one did
                path = _next_path(run, options.split, session.specs)
                tracker.set_tags({"evaluation": path.name})
            paths = _write(path, result, scored, session.dataset, options.ood)
            _log_result(run, session, scored, calibrated, options.split, tracker, paths)
    files.write_output(json, result)
    tables = calibration.tables(protocols.of_result(result), scored.scores, calibrated)
    counts = len(session.dataset.classes), result["images_scored"]
    text = summary.describe(scored.scores, *counts, options.split, advice=False)
    log("\n\n".join(part for part in (tables, text, f"result: {path} (pictures beside it)") if part))
    if target:
        run_id = run_logging.model_run(run, uri, tracker, log)
        _save_model(session, scored, options.split, target, provenance, uri, run_id)


def _open(run: RunDirectory, config: Config) -> Session:
    """Open a session of the run's coresets, without experts. Raises UserError if they don't fit the data set."""
    learned = run.read_coreset(config)
    coresets = {"random": coreset.load(run.random_path), config.distillation.method: learned}
    dataset = load_as_it_is(config, log)
    specs, m = network_specs(config, dataset), max(len(one.labels) for one in coresets.values())
    images = len(dataset.train.labels)
    words = shlex.join(["fbpc", "evaluate", "--coreset", str(run.folder), "--data", config.data.data])
    fix = f"score the coreset alone, without the run's chunks: `{words}`"
    config = memory_budget.with_chunks(config, specs, images=images, coreset=m, distils=False, fix=fix)
    chains, source = len(coresets) * len(specs) * config.evaluation.num_chains, str(run.coreset_path)
    memory_estimate.check(config, specs, ["evaluation"], coreset=m, chains=chains, source=source)
    session = Session(config, dataset, specs, [], coresets=coresets)
    for name, one in coresets.items():
        if tuple(one.images.shape[1:]) != dataset.image_shape or one.classes != dataset.classes:
            raise UserError(
                f"the {name} coreset of {run.folder} was not distilled from {dataset.name}: give a run on this data set"
            )
    fingerprint = coresets[config.distillation.method].facts.get("fingerprint", "")
    if note := advice.changed_images_note(dataset, fingerprint, "the run", "test images may be others too"):
        log(note)
    return session


def _ood_images(session: Session, options: Options) -> Split:
    other = load_ood(session.config, options.ood, session.dataset, options.ood_resize, log)
    return ood_split(session.dataset, other, options.ood_resize)


def _next_path(run: RunDirectory, split: str, specs: list[Spec]) -> Place:
    """Return a path for the result; its number is above those of all other evaluations."""
    folder, suffix = run.folder / "evaluations", f"{split}-{'-'.join(spec.architecture for spec in specs)[:80]}"
    numbers = [path.name.partition("-")[0] for path in folder.glob("*.json")]
    return folder / f"{1 + max((int(number) for number in numbers if number.isdecimal()), default=0):03d}-{suffix}.json"


def _write(path: Place, result: dict[str, Any], scored: EvaluationResult, dataset: Dataset, ood: str) -> list[Place]:
    """Write the result with its pictures beside it; return their paths."""
    files.write_checked_json(path, result)
    images = len(getattr(dataset, result["split"]).labels)
    draw_reliability(scored, path.with_suffix(".reliability.png"), images)
    paths = [path, path.with_suffix(".reliability.png")]
    for (name, architecture), (inside, outside) in scored.uncertainty.items():
        paths.append(path.with_suffix(f".{slug(f'{name}-{architecture}')}.entropy.png"))
        histograms.entropy_histogram(
            inside.entropy.numpy(), outside.entropy.numpy(), paths[-1],
            f"{name} on {architecture}", len(dataset.classes), names=(dataset.name, ood),
        )  # fmt: skip
    return [file for file in paths if file.exists()]


def _log_result(
    run: RunDirectory, session: Session, scored: EvaluationResult, calibrated: Calibrated | None, split: str,
    tracker: Tracker, paths: list[Place],
) -> None:  # fmt: skip
    """Log scores, description and files to MLflow."""
    step = coreset.metadata(run.coreset_path).get("step", "")
    metrics = run_contents.score_metrics(scored.scores, scored.mixing, session.config.distillation.method, split)
    if calibrated:
        metrics |= run_contents.calibrated_metrics(calibrated.result.scores, session.config.distillation.method, split)
    tracker.log_metrics(metrics, int(step) if step.isdecimal() else 0)
    tracker.set_tags(run_contents.description_tag(session.config, session.dataset.name, scored.scores, calibrated))
    for path in paths:
        tracker.log_artifact(path)


def _save_model(
    session: Session, scored: EvaluationResult, split: str, target: Any, provenance: Provenance, uri: str, run_id: str
) -> None:  # fmt: skip
    """Save the samples of the first chain as an MLflow model: in its folder, and in the run `run_id` of the store `uri`
    unless `run_id` is empty."""
    config, spec, images = session.config, session.specs[0], session.dataset.test.images[:2]
    method = config.distillation.method
    samples = model_export.ensemble_of(scored, session.coresets[method], method, spec, config.evaluation)
    samples_score = results.select(scored.scores, method, spec.architecture)[0]
    facts = model_export.facts(config, split, samples_score, provenance)
    command = model_export.save(samples, target, facts, images)
    log(f"model:  {target}, which this serves: {command}")
    if run_id:
        address = model_export.log_to_run(samples, uri, run_id, facts, images, log)
        log(f"MLflow: {address}" if address else "note: the model is in its folder alone")
