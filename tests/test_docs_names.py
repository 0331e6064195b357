"""What README, docs/ and --help name is there: files, headings, flags, languages; each command has examples."""

import ast
import re
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
from support.docs import (
    PAGES,
    ROOT,
    fences,
)

from fbpc_ray.commands import help, main
from fbpc_ray.core import config

LANGUAGES = ("sh", "python", "text")


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_its_language(page):
    assert {language for language, _ in fences((ROOT / page).read_text())} <= set(LANGUAGES)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    """Files, and headings in them; the text of a link to a module is the end of its path."""
    for text, target in re.findall(r"\[([^]]*)\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        assert not text.endswith(".py`") or target.endswith(text.strip("`")), f"{page}: {text} is {target}"
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


def numbers_of(text: str) -> set[str]:
    """Equations and algorithms that a text names: "Eqs. 5-7, Algorithm 1" are 5, 6, 7 and Algorithm 1."""
    numbers = set(re.findall(r"Algorithm 1|App\. C\.\d", text))
    for listed in re.findall(r"Eqs?\. ([\d, -]*\d)", text):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", listed):
            numbers |= {str(number) for number in range(int(first), int(last or first) + 1)}
    return numbers


def test_functions_that_hold_an_equation_exist_and_name_it():
    """Rows of docs/paper.md: each function stands in its file, whose docstring or its own names the row's equation."""
    rows = re.findall(r"^\| (.*) \| (.*) \| `(\S+\.py)` \|$", (ROOT / "docs/paper.md").read_text(), re.M)
    assert len(rows) > 15
    for title, functions, file in rows:
        tree = ast.parse((ROOT / file).read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        definitions = {node.name: node for node in nodes}
        for name in re.findall(r"`(\w+)`", functions):
            assert name in definitions, f"{file} has no {name}"
            text = f"{ast.get_docstring(tree)} {ast.get_docstring(definitions[name])}"
            of_row = numbers_of(title)
            assert not of_row or of_row & numbers_of(text), f"{file}: {name} does not name {title}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_pseudocode_names_exist(page):
    known = [f"/{path}" for folder in ("fbpc_ray", "jobs", "tests") for path in (ROOT / folder).rglob("*.py")]
    for language, block in fences((ROOT / page).read_text()):
        for token in re.findall(r"[\w/]+\.py\b", block if language == "text" else ""):
            assert any(path.endswith(f"/{token}") for path in known), f"{page}: {token}"


def flags_of(kind: type) -> set[str]:
    hints, outcome = get_type_hints(kind), set()
    for field in fields(kind):
        nested = [
            t for t in (hints[field.name], *get_args(hints[field.name])) if isinstance(t, type) and is_dataclass(t)
        ]
        if nested:
            outcome |= flags_of(nested[0])
        else:
            name = field.name.replace("_", "-")
            outcome |= {f"--{name}", f"--no-{name}"}
    return outcome


FOREIGN = {
    "--help", "--version", "--runtime-env-json", "--working-dir", "--again", "--repo-type", "--target", "--baseline",
}  # fmt: skip
"""Of Ray's and the Hub's commands, of kill_runs.py and compare_rows.py, those that all have, one of earlier code."""


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_flags_that_the_text_names_exist(page):
    kinds = [kind for kind in vars(main).values() if isinstance(kind, type) and kind.__name__.endswith("Arguments")]
    known = FOREIGN.union(*map(flags_of, kinds))
    flags = {flag for code in re.findall(r"`([^`]+)`", prose((ROOT / page).read_text()))
             for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}  # fmt: skip
    assert flags <= known


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
    flat_text = " ".join(re.sub("[│|]", " ", text).split())
    if command == "distill":
        assert "a JSON file, such as the best.json of a sweep; other flags change it." in flat_text
        assert "config.data" not in text
        assert re.search(r"best\.json of a +sweep", re.sub(r"[│|]\s+[│|]", " ", text))  # no break amid the sentence
