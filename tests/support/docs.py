"""The commands of README, docs/ and --help: found in the pages, and run or parsed with small settings.

Commands run in this process with flags appended: a later flag wins. What can't run here is in `EXCEPTIONS`, with the
reason, and is at least parsed; a command that nobody knows is an error.
"""

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from PIL import Image

from fbpc_ray.commands import main
from fbpc_ray.commands.arguments import KINDS
from fbpc_ray.commands.parsing import current_words, parse
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset, to_preset

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
EXPERTS = "--backend serial --width 8 --expert-count 1 --expert-epochs 2 --threads 1"
CHAINS = "--num-chains 1 --chain-epochs 4 --chain-every 2"
SMALL = (
    f"{EXPERTS} {CHAINS} --start-epoch 1 --steps 2 --gamma 0.5 --map-lr 0.02 --map-max-steps 40 --posterior-steps 2 "
    "--real-batch-size 16 --mc-samples 2 --syn-steps 2 --trajectory-cache-gb 0 --no-tracking"
)
RUN = {
    "distill": SMALL,
    "experts": EXPERTS,
    "evaluate": f"--backend serial --width 8 --threads 1 {CHAINS}",
    "export": "",
    "report": "",
    "tune": "--dry-run --data digits --no-tracking",
    "reproduce": "--dry-run --cifar10 digits --cifar100 digits",
}
"""Command -> what is appended. A sweep and a table are not small: theirs are dry runs, test_sweeps_on_ray.py and
test_reproduce.py run real ones."""
HERE = "--data digits --dry-run"
EXCEPTIONS: list[tuple[str, str, str]] = [
    (r"fbpc (distill|experts) .*(--download|parquet:PATH)", HERE, "the data must be downloaded: a dry run, of digits"),
    (r"fbpc evaluate --coreset (images_best.pt|benchmarks/\S+) --data", "parse", "the data must be downloaded"),
    (r"fbpc evaluate .*--protocol calibrated", "parse", "needs a run with a validation split: test_calibration.py"),
    (r"fbpc (distill|evaluate) .*s3://BUCKET", "parse", "needs a bucket: test_stored_runs.py runs them on moto's"),
    (
        r"fbpc reproduce .*--ood",
        "--dry-run --cifar10 digits --cifar100 digits --ood digits",
        "a dry run, of data that exist",
    ),
    (r"fbpc tune .*--resume", "parse", "needs a sweep that was stopped: test_sweeps_on_ray.py has one"),
    (r"fbpc doctor", "parse", "half a minute, and it judges this machine: test_doctor.py"),
    (r"fbpc ui", "parse", "it serves until it is stopped: tested in a browser"),
    (
        r"python jobs/(benchmark|scaling|chaos|kill_runs|fuzz|calibrate_sghmc|gallery)\.py",
        "parse",
        "minutes to hours; each has its test",
    ),
    (r"python jobs/\w+\.py", "as fbpc", "the same command as a file"),
    (r"python examples/\w+\.py", "named files", "minutes; each has its test"),
    (r"ray (start|up|down|dashboard|get-auth-token)", "ray", "needs a cloud, or leaves a cluster: Ray's own parser"),
    (r"ray job submit .* -- python", "ray", "needs a head, which test_jobs.py has: Ray's parser, then ours"),
    (r"kubectl apply -f rayjob.yaml", "named files", "needs Kubernetes: test_deploy.py reads the file"),
    (r"make \w+", "make", "sets up an environment, or runs this very test: make -n"),
    (r"export \w+=\w+", "none", "a setting of the shell"),
    (r"\. \.venv/bin/activate", "none", "a setting of the shell"),
]
"""(pattern, how, why). How: flags appended instead of those of `RUN`; parse: its parser takes it."""


class Fence(NamedTuple):
    language: str
    text: str


def fences(text: str) -> list[Fence]:
    return [Fence(*outcome) for outcome in re.findall(r"^```(\S*)\n(.*?)^```$", text, re.M | re.S)]


def commands(text: str) -> list[str]:
    """The commands of a block: continued lines joined, comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def words_of(command: str) -> list[str]:
    """Without settings of the environment before it."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def resolve(command: str) -> tuple[list[str], str]:
    """The words of a command, and how it is run."""
    words = words_of(command)
    for pattern, how, _ in EXCEPTIONS:
        if re.match(pattern, shlex.join(words).replace("'", "")):
            return words, how
    if words[0] == "fbpc" and {"--help", "-h"} & set(words):
        return words, ""
    if words[0] == "fbpc" and words[1] in RUN:
        return words, RUN[words[1]]
    raise AssertionError(f"nothing here runs this command: give it a line in EXCEPTIONS, or in RUN: {command}")


def run(command: str) -> None:
    """Run a command of a page, or as much of it as there can be here."""
    words, how = resolve(command)
    if how == "none":
        return
    if (best := "sweeps/first/best.json") in words:  # of a sweep that was no more than a dry run here
        Path(best).parent.mkdir(parents=True)
        Path(best).write_text(to_preset(preset("digits")))
    if how == "as fbpc":
        (name,) = re.findall(r'main\(\["(\w+)"', (ROOT / words[1]).read_text())
        run(shlex.join(["fbpc", name, *words[2:]]))
    elif how == "make":
        process = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert not process.returncode, process.stderr
    elif how == "named files":
        assert all((ROOT / word).is_file() for word in words if re.search(r"\.(py|yaml)$", word))
    elif how == "ray":
        parse_as_ray(words[1:])
    elif how == "parse" and words[0] == "python":
        assert parse_as_job(words)
    elif how == "parse":
        assert parse_command(words[1], words[2:])
    else:
        run_here([*words[1:], *shlex.split(how)])


def run_here(words: list[str]) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main.main(words)
        except SystemExit as end:
            assert not end.code, f"status {end.code}: {output.getvalue()}"


def parse_command(command: str, words: list[str]) -> Any:
    if command not in main.COMMANDS:
        raise AssertionError(f"no command {command}")
    kind = KINDS[command]["--coreset" in words]
    try:
        return parse(kind, current_words(words, KINDS[command]), f"fbpc {command}")
    except UserError as error:
        raise AssertionError(str(error)) from None


def parse_as_job(words: list[str]) -> Any:
    """By the `Arguments` of a program in jobs/."""
    path = ROOT / words[1]
    spec = importlib.util.spec_from_file_location(f"job_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        return tyro.cli(tyro.conf.OmitArgPrefixes[module.Arguments], args=words[2:])
    finally:
        sys.path[:] = before
        del sys.modules[spec.name]


def parse_as_ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli as ray

    ours: list[str] = []
    if "--" in words:
        words, ours = words[: words.index("--")], words[words.index("--") + 1 :]
    command: Any = ray
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, [*words, *(["--", *ours] if ours else [])])  # raises for what it doesn't take
    for name in words:
        assert not name.endswith(".yaml") or (ROOT / name).is_file()
    if ours:
        (name,) = re.findall(r'main\(\["(\w+)"', (ROOT / ours[1]).read_text())
        assert parse_command(name, ours[2:])


def failures_of(label: str, doing: Callable[[], object]) -> list[str]:
    """Why it can't be done, if it can't."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            doing()
    except BaseException as error:  # noqa: BLE001  whatever a page breaks with
        return [f"{label}\n{type(error).__name__}: {error}"]
    return []


def fill_desk(folder: Path) -> Path:
    """Write images of one's own into the folder, and distil a run on digits there; return the folder."""
    source = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cats", "dogs", "owls")):
            (folder / "my-images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = source.integers(0, 128, (16, 16, 3), dtype=np.uint8)
                pixels[:, :, label] += 100
                Image.fromarray(pixels).save(folder / "my-images" / split / name / f"{number}.png")
    with contextlib.chdir(folder):
        run_here(["distill", "--out", "runs/first", *shlex.split(SMALL), "--architectures", "convnet-in", "convnet-bn"])
    return folder
