"""Hit a driver, or the Ray cluster that it started, at random moments; compare the outcome with an undisturbed run's.

One trial is one run: it is started, hit at a random moment, started again with `--resume auto`, hit again, until an
attempt ends by itself. Whatever was hit, the run must then have the bits of an undisturbed run, no attempt may have
printed a traceback, and no process of Ray may be left.
"""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.processes import alive, descendants, kill, soon
from support.runs import ENVIRONMENT, SMALL, flags, images_of

from fbpc_ray.core.config import Config
from fbpc_ray.core.presets import preset
from fbpc_ray.distillation.run_directory import RunDirectory

SIGNALS = {"SIGKILL": 5, "SIGTERM": 2, "SIGINT": 2, "SIGSTOP": 1}
"""Signal -> how often it is drawn. A stopped driver goes on after a second, as after a laptop's sleep."""
RAY_PROCESSES = {"worker": 4, "raylet": 1, "gcs_server": 1}
"""Process of a local cluster -> how often it is drawn. A run goes on without a worker, and ends without the others."""
PHASES = {
    "start": "", "data": "run: ", "experts": "trajectories are there", "distillation": "after the last epoch",
    "chains": "evaluating on", "results": "architecture  coreset",
}  # fmt: skip
"""Phase of a run -> a word that the driver prints as it begins."""
MAX_HITS = 12
"""Hits of one run, after which it is left alone."""


def small_config(**changes: Any) -> Config:
    """A tracked run on digits whose phases (experts, steps, chains, results, MLflow) take about as long as a start."""
    return preset("digits").updated(
        **{**SMALL, "steps": 8, "tracking": True, "backend": "serial", "num_chains": 1, **changes}
    )


@dataclass
class Report:
    """Counts of all hits, and what went wrong. Several workers that are hit in an attempt count as one in its phase."""

    runs: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    """What was hit last, and the exit status, of each attempt that was hit."""
    faults: list[str] = field(default_factory=list)
    """One line for each run that ended otherwise than an undisturbed one, or printed a traceback."""

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        counters = {name: dict(sorted(getattr(self, name).items())) for name in ("hits", "phases", "endings")}
        return {"runs": self.runs, "kills": sum(self.hits.values()), **counters, "faults": self.faults}


class Place:
    """The folders of one run: nothing in them is shared with another."""

    def __init__(self, folder: Path, config: Config):
        self.folder, self.run = folder, RunDirectory(folder / "run")
        self.words = [*flags(config, out=str(folder / "run"), experts=str(folder / "experts")), "--resume", "auto"]
        self.environment = {
            **ENVIRONMENT,
            "FBPC_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": str(folder / "ray"),
        }
        self.output = folder / "output.txt"
        folder.mkdir(parents=True)

    def start(self) -> subprocess.Popen[bytes]:
        """Start an attempt, whose output is appended to that of the attempts before."""
        with self.output.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "fbpc_ray", "distill", *self.words],
                env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def has_printed(self, word: str, after: int) -> bool:
        """Return whether the driver printed `word` after the first `after` bytes of the output."""
        return word.encode() in self.output.read_bytes()[after:]

    def outcome(self) -> dict[str, Any]:
        """Return all that must not depend on interruptions: images, scores, and the runs that MLflow lists."""
        result = json.loads(self.run.result_path.read_text())
        return {
            "images": images_of(self.run.folder), "scores": result["coresets"], "steps": result["steps"],
            "tracked": tracked_runs(self.folder / "home" / "mlflow.db"),
        }  # fmt: skip

    def scratch(self) -> list[str]:
        """Return the names of scratch files that nobody removed."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.tmp*"))


def tracked_runs(database: Path) -> list[tuple[str, int]]:
    """Return (status, number of loss values) of each run in an MLflow database."""
    import sqlite3

    with sqlite3.connect(database) as connection:
        return connection.execute(
            "select status, (select count(distinct step) from metrics where metrics.run_uuid = runs.run_uuid and "
            "metrics.key = 'loss') from runs"
        ).fetchall()


def undisturbed(place: Place) -> tuple[dict[str, Any], dict[str, float]]:
    """Run to the end; return the outcome and the seconds of each phase."""
    starts, process = {}, place.start()
    while process.poll() is None:
        for phase, word in PHASES.items():
            if phase not in starts and place.has_printed(word, 0):
                starts[phase] = time.monotonic()
        time.sleep(0.01)
    assert process.returncode == 0, place.output.read_text()
    ends = [*list(starts.values())[1:], time.monotonic()]
    return place.outcome(), {phase: end - starts[phase] for phase, end in zip(PHASES, ends, strict=True)}


Strike = Callable[[subprocess.Popen[bytes], random.Random], list[str]]
"""Hits a run and waits for its driver where that ends; returns what was hit."""


def hit_driver(process: subprocess.Popen[bytes], draw: random.Random) -> list[str]:
    """Send a signal to the driver, and kill it where it has not ended within a minute."""
    name = draw.choices(list(SIGNALS), list(SIGNALS.values()))[0]
    number = getattr(signal, name)
    kill(process.pid, number)
    if number == signal.SIGSTOP:
        time.sleep(1)
        kill(process.pid, signal.SIGCONT)
        process.wait(600)
        return [name]
    try:
        process.wait(60)
    finally:
        for pid in descendants(process.pid):
            kill(pid)
        kill(process.pid)
    return [name]


def hit_ray(process: subprocess.Popen[bytes], draw: random.Random) -> list[str]:
    """Kill processes of the run's own cluster until the driver ends, by itself or with status 1.

    The driver goes on without a worker, which is hit again and again, and ends without the others.
    """
    names: list[str] = []
    titles: dict[int, str] = {}
    while process.poll() is None:
        name = draw.choices(list(RAY_PROCESSES), list(RAY_PROCESSES.values()))[0]
        titles |= descendants(process.pid)
        word = {"worker": "ray::"}.get(name, f"/{name} ")
        targets = sorted(pid for pid, title in descendants(process.pid).items() if word in title)
        if targets and kill(draw.choice(targets)):
            names.append(name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(1, 6) if name == "worker" and len(names) < MAX_HITS else 600)
    if process.returncode not in (0, 1):
        raise AssertionError(f"{names} were killed, and the driver ended with {process.returncode}")
    if not soon(lambda: not any(map(alive, titles)), 60):
        left = [_program(titles[pid]) for pid in titles if alive(pid)]
        raise AssertionError(f"{names} were killed, and processes are left: {left}")
    return names


def _program(title: str) -> str:
    """Return the program of a command line, without this machine's paths, which would stand in the report."""
    words = title.split()
    script = next((word for word in words if word.endswith(".py")), words[0])
    return "/".join(script.split("/")[-2:])


def attempts(
    place: Place, draw: random.Random, seconds: dict[str, float], report: Report, strike: Strike
) -> Iterator[int]:
    """Start and hit one run until an attempt ends by itself; yield the status of each attempt.

    Each attempt is hit in a phase drawn at random, at a random moment of it; an attempt that has passed this phase ends
    by itself.
    """
    for number in range(MAX_HITS + 1):
        phase = draw.choice(list(PHASES))
        moment = draw.uniform(0, seconds[phase])
        before = place.output.stat().st_size if number else 0
        process = place.start()
        while process.poll() is None and not (number < MAX_HITS and place.has_printed(PHASES[phase], before)):
            time.sleep(0.005)
        try:
            yield process.wait(moment)
            return
        except subprocess.TimeoutExpired:
            if names := strike(process, draw):
                report.hits.update(names)
                report.phases[phase] += 1
                report.endings[f"{names[-1]}: {process.returncode}"] += 1
            yield process.wait(600)
            if process.returncode == 0:
                return


def compare(place: Place, expected: dict[str, Any], status: int) -> list[str]:
    """Return one line for each thing that differs from an undisturbed run."""
    text = place.output.read_text(errors="replace")
    wrong = ["a traceback"] if "Traceback" in text else []
    if status != 0:
        return [*wrong, f"the last attempt ended with status {status}: {text.strip().splitlines()[-1]}"]
    actual = place.outcome()
    if not torch.equal(actual["images"], expected["images"]):
        wrong.append("other images")
    wrong += [
        f"other {name}: {actual[name]}" for name in ("scores", "steps", "tracked") if actual[name] != expected[name]
    ]
    if left := place.scratch():
        wrong.append(f"scratch files: {left}")
    return wrong


def hit_runs(folder: Path, kills: int, seed: int, strike: Strike, **changes: Any) -> Iterator[Report]:
    """Hit runs of `small_config(**changes)` `kills` times or a few more; yield the report after each run.

    Folders of runs with a fault are kept.
    """
    config = small_config(**changes)
    expected, seconds = undisturbed(Place(folder / "undisturbed", config))
    report, draw = Report(), random.Random(seed)
    while sum(report.hits.values()) < kills:
        place = Place(folder / f"run{report.runs}", config)
        try:
            *_, status = attempts(place, draw, seconds, report, strike)
            wrong = compare(place, expected, status)
        except AssertionError as error:
            wrong = [str(error)]
        if wrong:
            report.faults.append(f"run {report.runs}: {'; '.join(wrong)}")
        else:
            shutil.rmtree(place.folder)
        report.runs += 1
        yield report
