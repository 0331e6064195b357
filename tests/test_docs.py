"""README, docs/ and --help say what is so: their commands run, their examples too, and what they name is there.

Commands run in this process, each page's in a folder of its own, with small settings appended: a later flag wins. What
can't run here is in `EXCEPTIONS`, with the reason, and is at least parsed; a command that nobody knows is an error.
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import tyro
from PIL import Image
from safetensors import safe_open
from support.runs import train_experts

from fbpc_ray.commands import help, main
from fbpc_ray.commands.arguments import KINDS
from fbpc_ray.commands.parsing import current_words, parse
from fbpc_ray.core import config
from fbpc_ray.core.config import Sweep
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset, to_preset
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data import coreset_formats, readers
from fbpc_ray.distillation import worker
from fbpc_ray.distillation.expert_format import Recipe
from fbpc_ray.distillation.state import GradientTask, initial_state
from fbpc_ray.distillation.worker import Worker
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial
from fbpc_ray.models import registry
from fbpc_ray.reproduction.rows import SCHEMA
from fbpc_ray.tuning import sweep

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LANGUAGES = ("sh", "python", "text")

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
    "reproduce": "--dry-run --cifar10 digits",
}
"""Command -> what is appended. A sweep and a table are not small: theirs are dry runs, test_sweeps_on_ray.py and
test_reproduce.py run real ones."""

SMALLER = {
    '"width": 16, "steps": 20': '"width": 8, "steps": 2, "expert_count": 1, "expert_epochs": 6, "map_max_steps": 40',
    'posterior(coreset, "convnet-ln")': 'posterior(coreset, "convnet-ln", chain_epochs=20, chain_every=10)',
}
"""The same for Python: what README's calls are given -> what they get here."""

HERE = "--data digits --dry-run"
EXCEPTIONS: list[tuple[str, str, str]] = [
    (r"fbpc (distill|experts) .*--download", HERE, "the data must be downloaded: a dry run, of digits"),
    (r"fbpc evaluate --coreset (images_best.pt|benchmarks/\S+) --data", "parse", "the data must be downloaded"),
    (r"fbpc evaluate .*--protocol calibrated", "parse", "needs a run with a validation split: test_calibration.py"),
    (r"fbpc (distill|evaluate) .*s3://BUCKET", "parse", "needs a bucket: test_stored_runs.py runs them on moto's"),
    (r"fbpc tune .*--resume", "parse", "needs a sweep that was stopped: test_sweeps_on_ray.py has one"),
    (r"fbpc doctor", "parse", "half a minute, and it judges this machine: test_doctor.py"),
    (r"fbpc ui", "parse", "it serves until it is stopped: tested in a browser"),
    (
        r"python jobs/(benchmark|scaling|chaos|kill_runs|fuzz|calibrate_sghmc)\.py",
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


def settled(command: str) -> tuple[list[str], str]:
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
    words, how = settled(command)
    if how == "none":
        return
    if (best := "sweeps/first/best.json") in words:  # of a sweep that was no more than a dry run here
        Path(best).parent.mkdir(parents=True)
        Path(best).write_text(to_preset(preset("digits")))
    if how == "as fbpc":
        (name,) = re.findall(r'main\(\["(\w+)"', (ROOT / words[1]).read_text())
        run(shlex.join(["fbpc", name, *words[2:]]))
    elif how == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert not done.returncode, done.stderr
    elif how == "named files":
        assert all((ROOT / word).is_file() for word in words if re.search(r"\.(py|yaml)$", word))
    elif how == "ray":
        parsed_by_ray(words[1:])
    elif how == "parse" and words[0] == "python":
        assert parsed_by_job(words)
    elif how == "parse":
        assert parsed(words[1], words[2:])
    else:
        called([*words[1:], *shlex.split(how)])


def called(words: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main.main(words)
        except SystemExit as end:
            assert not end.code, f"status {end.code}: {said.getvalue()}"


def parsed(command: str, words: list[str]) -> Any:
    if command not in main.COMMANDS:
        raise AssertionError(f"no command {command}")
    kind = KINDS[command]["--coreset" in words]
    try:
        return parse(kind, current_words(words, KINDS[command]), f"fbpc {command}")
    except UserError as error:
        raise AssertionError(str(error)) from None


def parsed_by_job(words: list[str]) -> Any:
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


def parsed_by_ray(words: list[str]) -> None:
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
        assert parsed(name, ours[2:])


# ---- a folder in which a newcomer works


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of one's own, and a run on digits."""
    folder = tmp_path_factory.mktemp("desk")
    source = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cats", "dogs", "owls")):
            (folder / "my-images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = source.integers(0, 128, (16, 16, 3), dtype=np.uint8)
                pixels[:, :, label] += 100
                Image.fromarray(pixels).save(folder / "my-images" / split / name / f"{number}.png")
    with contextlib.chdir(folder):
        called(["distill", "--out", "runs/first", *shlex.split(SMALL), "--architectures", "convnet-in", "convnet-bn"])
    return folder


@contextlib.contextmanager
def at(desk: Path, place: Path, told: list[str]) -> Iterator[None]:
    """A copy of the desk, with the runs that the commands `told` take for given; what they register is undone."""
    shutil.copytree(desk / "my-images", place / "my-images")
    made = {word for each in told for word, flag in zip(words_of(each)[1:], words_of(each), strict=False)
            if flag == "--out" and "distill" in each and "--resume" not in each}  # fmt: skip
    for name in ("first", "second", "mine", "other"):
        if f"runs/{name}" not in made:
            shutil.copytree(desk / "runs" / "first", place / "runs" / name)
    shutil.copytree(desk / "experts", place / "experts")
    shutil.copytree(ROOT / "benchmarks" / "coresets", place / "benchmarks" / "coresets")
    registers: list[dict[str, Any]] = [worker.METHODS, readers.NAMED, registry.ARCHITECTURES]
    before, modules, paths = [dict(each) for each in registers], set(sys.modules), list(sys.path)
    try:
        with contextlib.chdir(place):
            yield
    finally:
        for register, entries in zip(registers, before, strict=True):
            register.clear()
            register.update(entries)
        sys.path[:] = paths
        for name in set(sys.modules) - modules:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(place):
                del sys.modules[name]


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Files go to the current folder, and nothing is asked of the network."""
    monkeypatch.delenv("FBPC_HOME", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_can_be_done(page, desk, tmp_path):
    """Its commands and its Python, in order. Python that begins with `# NAME.py` is that file."""
    blocks = fences((ROOT / page).read_text())
    told = [each for language, text in blocks if language == "sh" for each in commands(text)]
    names: dict[str, Any] = {"__name__": "page"}
    broken = []
    with at(desk, tmp_path, told):
        for language, text in blocks:
            if language == "sh":
                for command in commands(text):
                    broken += tried(command, lambda command=command: run(command))
            elif language == "python" and (outcome := re.match(r"# (\w+\.py)\n", text)):
                Path(outcome[1]).write_text(text)
            elif language == "python":
                for given, small in SMALLER.items():
                    text = text.replace(given, small)
                broken += tried(text, lambda text=text: exec(compile(text, page, "exec"), names))
    assert not broken, "\n\n".join(broken)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", *help.PAGES])
def test_the_examples_of_help_can_be_done(command, desk, tmp_path):
    told = [example for example, _ in (help.PAGES[command].examples if command else help.FIRST)]
    with at(desk, tmp_path, told):
        if command == "evaluate --coreset":
            called(["export", "runs/first", "--format", "hf", "--out", "my-coreset"])
        broken = [line for each in told for line in tried(each, lambda each=each: run(each))]
    assert not broken, "\n\n".join(broken)


def test_what_is_made_smaller_is_in_readme():
    text = (ROOT / "README.md").read_text()
    assert all(given in text for given in SMALLER)


def tried(what: str, doing: Callable[[], object]) -> list[str]:
    """Why it can't be done, if it can't."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            doing()
    except BaseException as error:  # noqa: BLE001  whatever a page breaks with
        return [f"{what}\n{type(error).__name__}: {error}"]
    return []


# ---- what pages name


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_its_language(page):
    assert {language for language, _ in fences((ROOT / page).read_text())} <= set(LANGUAGES)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    """Files, and headings in them."""
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, heading = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "benchmarks/README.md"])
def test_files_of_this_repository_that_are_named_exist(page):
    """`fbpc_ray/core/rng.py` as it stands; in the table of equations also `bpc.py`, beside another."""
    text = prose((ROOT / page).read_text())
    known = {path.name for path in (ROOT / "fbpc_ray").rglob("*.py")}
    for token in re.findall(r"`([\w./-]+)`", text):
        if re.match(r"(fbpc_ray|jobs|tests|docs|benchmarks|examples)/[\w/-]+", token):
            assert (ROOT / token).exists(), f"{page}: {token}"
    rows = [line for line in text.splitlines() if re.match(r"\| (Eq|Alg|App|Table|Fig)", line)]
    assert len(rows) > 20 or page != "docs/paper.md"
    for row in rows:
        for token in re.findall(r"`([\w-]+\.py)`", row):
            assert token in known, row


def flags_of(kind: type) -> set[str]:
    hints, outcome = get_type_hints(kind), set()
    for each in fields(kind):
        nested = [t for t in (hints[each.name], *get_args(hints[each.name])) if isinstance(t, type) and is_dataclass(t)]
        if nested:
            outcome |= flags_of(nested[0])
        else:
            name = each.name.replace("_", "-")
            outcome |= {f"--{name}", f"--no-{name}"}
    return outcome


FOREIGN = {
    "--help", "--version", "--runtime-env-json", "--working-dir", "--again", "--repo-type", "--target",
}  # fmt: skip
"""Of Ray's and the Hub's commands and of jobs/kill_runs.py, those that all have, and one of earlier code."""


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_flags_that_the_text_names_exist(page):
    kinds = [each for each in vars(main).values() if isinstance(each, type) and each.__name__.endswith("Arguments")]
    known = FOREIGN.union(*map(flags_of, kinds))
    named = {flag for code in re.findall(r"`([^`]+)`", prose((ROOT / page).read_text()))
             for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}  # fmt: skip
    assert named <= known


def test_a_command_that_nobody_knows_is_an_error():
    """The lists above can fail: an unknown program, command or flag, and a file that isn't there."""
    for command in ("fbcp distill", "fbpc destil", "fbpc distill --stepps 3 --dry-run", "python jobs/tune_.py",
                    "python jobs/chaos.py --stepps 3", "ray start --heed", "make tset"):  # fmt: skip
        assert tried(command, lambda command=command: run(command)), command


# ---- --help


def test_help_has_a_page_with_examples_for_every_command():
    assert {*main.COMMANDS} == {name for name in help.PAGES if " " not in name}
    assert all(page.examples for page in help.PAGES.values())
    assert {name for name, _ in config.Config().flat().items()} >= {"data", "steps"}


@pytest.mark.parametrize("command", list(main.COMMANDS))
def test_help_is_whole_sentences_with_examples_first(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main.main([command, "--help"])
    text = capsys.readouterr().out
    assert text.index("For example") < text.index("-h, --help")
    assert help.PAGES[command].examples[0][0] in text
    joined = " ".join(re.sub("[│|]", " ", text).split())
    if command == "distill":
        assert "a JSON file, such as the best.json of a sweep; other flags change it." in joined
        assert "config.data" not in text
        assert re.search(r"best\.json of a +sweep", re.sub(r"[│|]\s+[│|]", " ", text))  # no break amid the sentence


# ---- the files of a run


def tabled(section: str) -> list[str]:
    """The names in the first columns of the tables below a heading of docs/formats.md."""
    (text,) = re.findall(
        rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", (ROOT / "docs/formats.md").read_text(), re.M | re.S
    )
    rows = [line.split("|")[1] for line in text.splitlines() if re.match(r"\| `", line)]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def told_in(section: str, row: str) -> list[str]:
    """The names in the second column of one row there."""
    (text,) = re.findall(
        rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", (ROOT / "docs/formats.md").read_text(), re.M | re.S
    )
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{row}`")]
    return re.findall(r"`([^`]+)`", line.split("|")[2])


def test_formats_names_what_was_renamed():
    assert set(tabled("Names of earlier code")) - {"--again"} >= set(config.RENAMED)
    text = (ROOT / "docs/formats.md").read_text().partition("## Names of earlier code")[2]
    assert all(f"| `{old}`" in text and f"| `{new}`" in text for old, new in config.RENAMED.items())


def test_formats_says_what_a_run_leaves(desk):
    run = desk / "runs" / "first"
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert set(tabled("A run")) <= files
    extra = {name for name in files - set(tabled("A run")) if not name.endswith(".png") and name != "mlflow.json"}
    assert not extra, "docs/formats.md does not name them"
    for name in ("coreset", "random"):
        with safe_open(run / "coreset" / f"{name}.safetensors", "pt") as file:
            assert {*file.keys()} | {*file.metadata()} == set(tabled("coreset.safetensors"))
    with safe_open(run / "checkpoint" / "state.safetensors", "pt") as file:
        assert {*file.keys()} == set(tabled("state.safetensors"))
        assert {*file.metadata()} == {"step", "checksum"}
    assert pq.read_schema(run / "metrics.parquet").names == tabled("metrics.parquet")
    result = json.loads((run / "result.json").read_text())
    scores = next(iter(next(iter(result["coresets"].values())).values()))
    assert sorted([*result, *scores]) == sorted(tabled("result.json"))


def test_formats_says_what_experts_and_tables_are_made_of(desk):
    (folder,) = (desk / "experts" / "digits").glob("convnet-in-*")
    store = json.loads((folder / "store.json").read_text())
    assert {*store["recipe"], "precision"} == {*Recipe._fields} == set(told_in("Experts", "store.json"))
    assert {*json.loads((folder / "00000.json").read_text())} == set(told_in("Experts", "00000.json"))
    assert tabled("rows.parquet of a reproduction") == SCHEMA.names


def test_formats_says_what_exports_are_made_of(desk, tmp_path):
    assert set(tabled("Exports")) - {"--format"} == set(coreset_formats.FORMATS)
    for kind in coreset_formats.FORMATS:
        out = tmp_path / f"as-{kind}{coreset_formats.SINGLE.get(kind, '')}"
        with contextlib.chdir(desk):
            called(["export", "runs/first", "--format", kind, "--out", str(out)])
        named = set(told_in("Exports", kind))
        if kind == "npz":
            with np.load(out) as archive:
                assert set(archive.files) == named
        elif kind != "safetensors":
            files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
            general = {re.sub(r"^\d+-[\w-]+/\d+\.png$", "LABEL-NAME/INDEX.png", name) for name in files}
            assert general == named
            assert {*json.loads((out / "coreset.json").read_text())} == {"mean", "std", "classes", "made_by"}
        if kind == "hf":
            assert set(pq.read_schema(out / coreset_formats.SHARD).names) == {"pixels", "label", "image"}


def test_formats_says_what_a_sweep_leaves(tmp_path):
    """Its plan; the rest is what a sweep of test_sweeps_on_ray.py is asked for."""
    base = preset("digits").updated(validation=0.1, out=str(tmp_path / "sweep"), width=8, tracking=False)
    outcome = sweep._prepare(base, Sweep(grid=("alpha=1,10",)), tmp_path / "sweep", False, False, False)
    sweep._write_plan(outcome)
    assert {path.name for path in (tmp_path / "sweep").iterdir()} <= set(tabled("A sweep"))


# ---- docs/extending.md, taken at its word


def test_the_method_of_extending_learns(small, digits, tmp_path):
    """Its block as it stands, as a worker of a run would call it: its images are what the experts are surer of."""
    (block,) = [text for language, text in fences((ROOT / "docs/extending.md").read_text())
                if language == "python" and "worker.METHODS[" in text]  # fmt: skip
    before = dict(worker.METHODS)
    try:
        exec(compile(block, "extending", "exec"), {})
        settings = replace(small.distillation, method="confident")
        specs = session.network_specs(small, digits)
        stores = train_experts(small, digits, Serial("cpu", Interruption()))
        state, labels = initial_state(digits, 1, 0)
        gradients_of = Worker(specs, stores, digits, labels.numpy(), settings, "dsa", 2, device="cpu", threads=1)
        images, losses = state.images.clone(), []
        for _ in range(10):
            value, stats, *_ = gradients_of.gradient(GradientTask(0, 0), 0, images.numpy(), 0.0)
            again = gradients_of.gradient(GradientTask(0, 0), 0, images.numpy(), 0.0)
            assert (again[0] == value).all()
            losses.append(stats.loss)
            images = images - 0.1 * torch.from_numpy(value)
        assert losses[-1] < losses[0]
    finally:
        worker.METHODS.clear()
        worker.METHODS.update(before)
