"""`fbpc report`: the page holds what the files say, all of it and as text, and needs nothing else."""

import base64
import io
import json
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.browser import Page as Browser
from support.browser import browsed, visit
from support.runs import flags
from support.stores import BUCKET, s3_server

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import distill_arguments
from fbpc_ray.core import inputs
from fbpc_ray.core.config import Config, read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset, with_method
from fbpc_ray.data import coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.reporting import document, html, markdown, report, run_outputs, run_usage

HOSTILE = '<script>alert("x")</script>|a`b*c_[d](http://evil) & <img src=http://evil>'

TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "dl", "dt", "dd", "div", "table", "thead",
    "tbody", "tr", "th", "td", "pre", "code", "figure", "figcaption", "label", "input", "img", "footer",
}  # fmt: skip
"""All that a page consists of."""


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory) -> dict[str, Path]:
    """Runs that have ended: of FBPC, of a weight-space baseline, and random images."""
    root = tmp_path_factory.mktemp("runs")
    changes = {
        "fbpc": {}, "bpc": with_method(small, "bpc-fkl", 1).updated(steps=2, syn_steps=3, start_epoch=1).flat(),
        "random": {"method": "random", "ipc": 2},
    }  # fmt: skip
    for name, its in changes.items():
        words = flags(small, **its | {"backend": "serial", "device": "cpu", "out": str(root / name)})
        main.main(["distill", *words])
    return {name: root / name for name in changes}


class Page(HTMLParser):
    """What a browser sees of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.source, self.tags, self.tables, self.codes, self.text = path.read_text(), [], [], [], ""
        self._in: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "code":
            self.codes.append("")
        if tag not in ("img", "input", "meta"):
            self._in.append(tag)

    def handle_endtag(self, tag):
        assert self._in.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" in self._in:
            return
        self.text += data
        if {"td", "th"} & set(self._in):
            self.tables[-1][-1][-1] += data
        if "code" in self._in:
            self.codes[-1] += data

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]

    def table(self, *heads: str) -> list[list[str]]:
        """The lines of the first table with these first heads."""
        return next(table[1:] for table in self.tables if tuple(table[0][: len(heads)]) == heads)


def made(tmp_path: Path, *folders: Path | str) -> Page:
    main.main(["report", *map(str, folders), "--out", str(tmp_path / "made.html")])
    return Page(tmp_path / "made.html")


def refused(capsys, *words: str) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main.main(["report", *words])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_the_page_holds_every_value_and_needs_nothing_else(runs, tmp_path, capsys):
    page = made(tmp_path, runs["fbpc"])
    assert str(tmp_path / "made.html") in capsys.readouterr().out
    result = inputs.read_checked_json(runs["fbpc"] / "result.json")
    values = page.table("network", "coreset", "seed")
    wanted = [
        [architecture, name, str(seed), f"{100 * s['accuracy'][seed]:.2f}",
         *(f"{s[quantity][seed]:.4f}" for quantity in ("nll", "ece", "brier"))]
        for name, by_architecture in result["coresets"].items()
        for architecture, s in by_architecture.items()
        for seed in (0, 1)
    ]  # fmt: skip
    assert sorted(values) == sorted(wanted)
    assert len(wanted) == 8
    nll = result["coresets"]["fbpc"]["convnet-bn"]["nll"]
    row = next(row for row in page.table("network", "coreset", "accuracy %") if row[:2] == ["convnet-bn", "fbpc"])
    assert row[3] == f"{statistics.mean(nll):.3f} ± {statistics.stdev(nll):.3f}"
    assert ["commit", result["commit"]] in page.table("", "this run")
    assert ["torch version", result["versions"]["torch"]] in page.table("", "this run")

    pictures = [attrs["src"] for attrs in page.of("img")]
    assert len(pictures) == 10  # after, before, accuracy, NLL, four of the steps, over time, reliability
    for source in pictures:
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))).verify()
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a", "form"} == set()
    assert page.text.index("The coreset: ") < page.text.index("The coreset, after") < page.text.index("Scores")
    assert "default-src 'none'" in page.source and "http://" not in page.source and "https://" not in page.source


@pytest.mark.parametrize(
    "config",
    [
        preset("cifar10-ipc10").updated(chain_augment=False, normalisation="computed", validation=0.1, threads=3),
        with_method(preset("cifar10-ipc1"), "bpc-rkl", 1).updated(seed=7, experts="/some where/it's"),
        with_method(Config(), "bpc-w", 10).updated(data="npz:a b.npz", ipc=10, architectures=("convnet-bn", "lenet")),
        preset("digits").updated(method="random", ipc=5, compiled="off"),
        preset("digits").updated(width=8, inner_alpha=1e-7, backend="serial", out="x", tracking=False),
        preset("tiny-imagenet-ipc1").updated(download=True, steps=3, experiment="other"),
    ],
)
def test_the_command_makes_the_configuration_again(config):
    """As a shell and the command line read it; but for what changes no result."""
    script = f"fbpc() {{ printf '%s\\0' \"$@\"; }}; {run_usage.wrap_command(run_usage.command(config))}"
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=300).stdout
    first, *words = said.split("\0")[:-1]
    assert first == "distill"
    parsed = distill_arguments(words)
    again, before = parsed.config.flat(), config.flat()
    assert {name: value for name, value in again.items() if name not in run_usage.PLACES} == {
        name: value for name, value in before.items() if name not in run_usage.PLACES
    }


def test_the_code_of_the_page_loads_the_coreset(runs, tmp_path):
    outcome = made(tmp_path, runs["fbpc"])
    code = next(code for code in outcome.codes if "safe_open" in code)
    names: dict = {}
    exec(code, names)
    its = coreset.load(RunDirectory(runs["fbpc"]).coreset_path)
    assert torch.equal(names["images"], its.images) and torch.equal(names["labels"], its.labels)
    assert (tuple(names["mean"]), tuple(names["classes"])) == (its.mean, its.classes)
    assert str(tuple(its.images.shape)) in code


def test_several_runs_stand_beside_each_other(runs, tmp_path):
    """Random images that runs share are one line; where settings differ is said, and where scores can't be compared."""
    page = made(tmp_path, runs["fbpc"], runs["bpc"], runs["random"], runs["fbpc"])
    assert [row[0] for row in page.table("run")] == ["A: fbpc", "B: bpc", "C: random"]
    rows = [row[1] for row in page.table("network", "coreset", "accuracy %") if row[0] == "convnet-in"]
    assert rows == ["random (A, B)", "random (C)", "fbpc (A)", "bpc-fkl (B)"]
    differing = {row[0]: row[1:] for row in page.table("setting")}
    assert differing["--method"] == ["fbpc", "bpc-fkl", "random"]
    assert differing["--ipc"] == ["1", "1", "2"]
    assert not {"--out", "--architectures", "--width", "--backend"} & set(differing)
    assert "not scored alike" not in page.text
    conclusion = re.search(r"best NLL|NLL of .* don't differ by more than chains do", page.text)
    assert conclusion is not None
    assert conclusion.start() < page.text.index("Where they differ") < page.text.index("Run B: BPC-fKL on")
    assert len(page.of("img")) == 3 + 8 + 7 + 2  # accuracy, NLL, both by ipc; those of each

    other = shutil.copytree(runs["bpc"], tmp_path / "other")
    config = read_config(other).flat() | {"chain_epochs": 10}
    (other / "config.json").write_text(json.dumps(config))
    text = made(tmp_path, runs["fbpc"], other).text
    assert "not scored alike" in text and "best NLL" not in text
    assert "No conclusion: the runs differ in epochs of a chain (20, 10), so that their scores don't compare." in text


def test_the_markdown_says_the_same(runs, tmp_path):
    outcome = made(tmp_path, runs["fbpc"], runs["random"])
    text = (tmp_path / "made.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(shown) == len(outcome.of("img")) == 13
    for path in shown:
        Image.open(tmp_path / path).verify()
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    for row in outcome.table("network", "coreset", "seed"):
        assert row in lines
    made(tmp_path, runs["fbpc"])  # an earlier report is replaced
    assert "# FBPC on digits" in (tmp_path / "made.md").read_text()


def test_a_chain_that_diverged_is_said(runs, tmp_path):
    """With its seed; the mean is of the others."""
    folder = shutil.copytree(runs["fbpc"], tmp_path / "run")
    result = inputs.read_checked_json(folder / "result.json")
    for values in result["coresets"]["fbpc"]["convnet-in"].values():
        values[1] = None
    result["coresets"]["random"]["convnet-bn"] = {name: [None, None] for name in ("accuracy", "nll", "ece", "brier")}
    (folder / "result.json").write_text(json.dumps(result))
    outcome = made(tmp_path, folder)
    rows = {tuple(row[:2]): row[2:] for row in outcome.table("network", "coreset", "accuracy %")}
    left = result["coresets"]["fbpc"]["convnet-in"]
    assert rows["convnet-in", "fbpc"][1] == f"{left['nll'][0]:.3f} (1 of 2 diverged)"
    assert rows["convnet-bn", "random"] == ["diverged"] * 4
    assert ["convnet-in", "fbpc", "1", *["diverged"] * 4] in outcome.table("network", "coreset", "seed")


def test_the_scores_of_fewer_steps_are_not_those_of_the_coreset(runs, small, tmp_path, monkeypatch):
    """A run that goes on with more steps writes its coreset before it is judged, which takes long and may be killed."""
    folder = tmp_path / "run"
    shutil.copytree(runs["fbpc"], folder)
    words = flags(small, steps=5, backend="serial", device="cpu", out=str(folder))

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(run_outputs, "evaluate", killed)
        main.main(["distill", *words, "--resume"])
    with pytest.raises(UserError, match=r"has not ended \(its result is of step 4, its coreset of step 5\).* --resume"):
        report.report([str(folder)], str(tmp_path / "r.html"), print)
    for name, judged in ((folder, False), (runs["fbpc"], True)):
        main.main(["export", str(name), "--format", "hf", "--out", str(tmp_path / f"{judged}")])
        assert ("accuracy %" in (tmp_path / f"{judged}" / "README.md").read_text()) == judged
    main.main(["distill", *words, "--resume"])
    report.report([str(folder)], str(tmp_path / "r.html"), print)


def test_later_evaluations_are_there(runs, tmp_path):
    """With their AUROC and pictures."""
    folder = shutil.copytree(runs["fbpc"], tmp_path / "run")
    result = inputs.read_checked_json(folder / "result.json")
    for s in (s for each in result["coresets"].values() for s in each.values()):
        s["ood_auroc_entropy"] = [0.25, 0.75]
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "001-test-x.json").write_text(json.dumps(result | {"ood": "strange"}))
    shutil.copy(folder / "reliability.png", folder / "evaluations" / "001-test-x.reliability.png")
    page = made(tmp_path, folder)
    assert "Evaluated later on convnet-in, convnet-bn, test split" in page.text and "strange" in page.text
    table = next(table for table in page.tables if "AUROC OOD entropy" in table[0] and "seed" not in table[0])
    assert {row[-1] for row in table[1:]} == {"0.500 ± 0.354"}
    assert len(page.of("img")) == 11


def test_what_files_say_is_text(runs, tmp_path):
    """Names with markup, in every file: shown as they are, in both forms."""
    folder = shutil.copytree(runs["fbpc"], tmp_path / "<b>run</b>`|")
    result = inputs.read_checked_json(folder / "result.json")
    result |= {"data": HOSTILE, "commit": HOSTILE, "device": f"\x1b[31m{HOSTILE}", "map_endings": {HOSTILE: HOSTILE}}
    result["versions"] = {HOSTILE: HOSTILE}
    result["coresets"] = {
        HOSTILE if name == "fbpc" else name: {HOSTILE if each == "convnet-in" else each: s for each, s in its.items()}
        for name, its in result["coresets"].items()
    }
    (folder / "result.json").write_text(json.dumps(result))
    config = read_config(folder).flat() | {"experts": f"{HOSTILE}\n```\n# heading", "data": f"npz:{HOSTILE}"}
    (folder / "config.json").write_text(json.dumps(config))
    for path in (RunDirectory(folder).coreset_path, RunDirectory(folder).random_path):
        coreset.save(coreset.load(path)._replace(classes=(HOSTILE, *"123456789")), path)

    page = made(tmp_path, folder)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in page.of("img"))
    assert all(set(attrs) <= {"src", "width", "height", "class", "alt"} for attrs in page.of("img"))
    assert "\x1b" not in page.source
    assert [row[0] for row in page.table("network", "coreset", "accuracy %")].count(HOSTILE) == 2

    text = (tmp_path / "made.md").read_text()
    outside = re.sub(r"(?ms)^(`{3,})\w*$.*?^\1$", "", text)
    assert not re.search(r"(?<!\\)<(?!!-- fbpc)", outside.replace("&lt;", ""))
    assert "](http" not in outside.replace(r"\]", "") and "\n# heading" not in outside
    header = next(line for line in text.splitlines() if line.startswith("| network"))
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if "convnet-bn | random" in line]
    assert set(bars) <= {len(re.findall(r"\|", header)), 1 + len(re.findall(r"\|", header))}


def test_what_is_no_ended_run_is_one_line(runs, tmp_path, capsys):
    out = ("--out", str(tmp_path / "r.html"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no run" in refused(capsys, str(empty), *out)
    assert "holds no run" in refused(capsys, str(tmp_path / "nowhere"), *out)

    def broken(name: str, content: bytes | None) -> str:
        folder = shutil.copytree(runs["fbpc"], tmp_path / f"broken-{len(list(tmp_path.iterdir()))}")
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        return refused(capsys, str(runs["random"]), str(folder), *out)

    said = broken("result.json", None)
    assert "has not ended" in said and "--resume" in said
    assert "is a sweep" in broken("sweep.json", b"{}")
    trial = shutil.copytree(runs["fbpc"], tmp_path / "trial")
    (trial / "trial.json").write_text("{}")
    (trial / "result.json").unlink()
    assert "is a trial" in refused(capsys, str(trial), *out)
    assert "coreset not found" in broken("coreset/coreset.safetensors", None)
    result = inputs.read_checked_json(runs["fbpc"] / "result.json")
    for content in (b"{", b"[]", b'{"steps": 1, "coresets": {}}', json.dumps(result | {"data": 1}).encode()):
        assert "result.json" in broken("result.json", content)
    infinite = {"a": {"b": {"accuracy": [float("inf")], "nll": [1], "ece": [1], "brier": [1]}}}
    for scores in ({}, {"a": {"b": {}}}, {"a": {"b": {"accuracy": 1}}}, {"a": []}, infinite):
        assert "result.json" in broken("result.json", json.dumps(result | {"coresets": scores}).encode())
    assert "metrics.parquet is damaged" in broken("metrics.parquet", b"PAR1")
    assert "is not a PNG" in broken("coreset.png", b"GIF89a")
    assert "config.json" in broken("config.json", b"[]")
    assert not (tmp_path / "r.html").exists() and not (tmp_path / "r.md").exists()


def test_nothing_else_is_overwritten(runs, tmp_path, capsys):
    run = str(runs["random"])
    assert ".html" in refused(capsys, run, "--out", str(tmp_path / "report.txt"))
    for name in ("mine.html", "mine.md"):
        (tmp_path / name).write_text("my own")
        assert "is not a report" in refused(capsys, run, "--out", str(tmp_path / "mine.html"))
        assert (tmp_path / name).read_text() == "my own"
        (tmp_path / name).unlink()
    assert "name a run" in refused(capsys)


def test_a_run_in_an_object_store(runs, tmp_path, monkeypatch):
    """Read from S3 and written to it, the same page as from the disk."""
    from fbpc_ray.core import storage

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "me")
    with s3_server() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        away = storage.place(f"s3://{BUCKET}/runs/fbpc")
        (away / "evaluations/001-test.json").write_bytes((runs["fbpc"] / "result.json").read_bytes())
        (away / "evaluations/001-test.reliability.png").write_bytes((runs["fbpc"] / "coreset.png").read_bytes())
        for path in runs["fbpc"].rglob("*"):
            if path.is_file():
                (away / str(path.relative_to(runs["fbpc"]))).write_bytes(path.read_bytes())
        here = made(tmp_path, str(away))
        main.main(["report", str(away), "--out", f"s3://{BUCKET}/pages/it.html"])
        written = storage.place(f"s3://{BUCKET}/pages/it.html").read_text()
        assert storage.place(f"s3://{BUCKET}/pages/it-files/run-steps-1.png").is_file()
    near = made(tmp_path, runs["fbpc"])
    assert all(table in here.tables for table in near.tables) and "evaluations/001-test.json" in here.text
    assert len(here.of("img")) == len(near.of("img")) + 1 == written.count("<img")
    assert f"place('{away}/coreset" in here.codes[1]


CUT = """[...document.querySelectorAll('body *')].filter(each => {
  const box = each.getBoundingClientRect(), style = getComputedStyle(each)
  if (each.tagName == 'INPUT' || !box.width) return false
  return box.right > innerWidth + 1 || (style.display != 'inline' && each.scrollWidth > each.clientWidth + 1)
}).map(each => `${each.tagName}: ${each.scrollWidth} in ${each.clientWidth}`)"""
"""Elements that a reader would have to scroll sideways to see whole."""


@browsed
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_everything_whole(runs, tmp_path, width):
    """No table, picture or line of code is cut; a tap shows a picture that a phone shrinks in full size."""
    long = shutil.copytree(runs["bpc"], tmp_path / "a-run-of-a-very-long-name-without-any-space-in-it")
    for name, folders in (("one", [runs["fbpc"]]), ("several", [runs["fbpc"], long, runs["random"]])):
        main.main(["report", *map(str, folders), "--out", str(tmp_path / f"{name}.html")])

    def look(page: Browser) -> None:
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        for name in ("one", "several"):
            page.open(f"file://{tmp_path}/{name}.html")
            page.until("document.readyState == 'complete' && document.images.length > 5")
            assert page.ask("[...document.images].every(each => each.complete && each.naturalWidth > 50)")
            assert page.ask(CUT) == []
            page.picture(tmp_path / f"{name}-{width}.png")
        if width == 390:
            image = "document.querySelector('img.big')"
            assert page.ask(f"{image}.width") <= 390
            page.ask(f"{image}.click()")
            assert page.ask(f"{image}.width") > 390

    visit(tmp_path, look)


def test_both_forms_hold_every_kind_of_block():
    """And code that holds a fence keeps it."""
    blocks = [document.Heading("a"), document.Text("1. b"), document.Facts([("c", "d")]), document.Code("```\ne", "sh")]
    blocks.append(document.Table([["f", "g"], ["h|", "1.0 ± 0.1"]]))
    text = markdown.to_markdown("t", blocks, "end", "files")
    assert "````sh\n```\ne\n````" in text and r"| h\| | 1.0 ± 0.1 |" in text and r"\1. b" in text
    assert '<td class="number">1.0 ± 0.1</td>' in html.to_html("t", blocks, "end")
