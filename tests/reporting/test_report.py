"""`fbpc report`: the page holds what the files say, all of it and as text, and needs nothing else."""

import base64
import io
import json
import re
import shutil
import statistics
import subprocess

import pytest
import torch
from PIL import Image
from support.browser import Page as Browser
from support.browser import browsed, visit
from support.report_page import report_page
from support.runs import SMALL_VBPC, flags_of

from fbpc_ray.commands import main, parsing
from fbpc_ray.commands.parsing import distill_arguments
from fbpc_ray.core import inputs
from fbpc_ray.core.config import Config, read_config
from fbpc_ray.core.presets import preset, with_method
from fbpc_ray.data import coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.execution.used_settings import uses
from fbpc_ray.reporting import document, html, markdown, run_usage

HOSTILE = '<script>alert("x")</script>|a`b*c_[d](http://evil) & <img src=http://evil>'
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "dl", "dt", "dd", "div", "table", "thead",
    "tbody", "tr", "th", "td", "pre", "code", "figure", "figcaption", "label", "input", "img", "footer",
}  # fmt: skip
"""All that a page consists of."""


def test_the_page_holds_every_value_and_needs_nothing_else(ended_runs, tmp_path, capsys):
    page = report_page(tmp_path, ended_runs["fbpc"])
    assert str(tmp_path / "made.html") in capsys.readouterr().out
    result = inputs.read_checked_json(ended_runs["fbpc"] / "result.json")
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
        with_method(preset("digits"), "vbpc", 1).updated(
            expert_count=3, gamma=9.0, mc_samples=4, chain_epochs=7, seed=2
        ),
        Config().updated(data="folder:x"),
        preset("digits").updated(width=8, inner_alpha=1e-7, backend="serial", out="x", tracking=False),
        preset("tiny-imagenet-ipc1").updated(download=True, steps=3, experiment="other"),
    ],
)
def test_the_command_makes_the_configuration_again(config):
    """As a shell and the command line read it, with all of its sizes; but for what changes no result."""
    script = f"fbpc() {{ printf '%s\\0' \"$@\"; }}; {run_usage.wrap_command(run_usage.command(config))}"
    output = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=300).stdout
    first, *words = output.split("\0")[:-1]
    assert first == "distill"
    arguments = distill_arguments(words)
    again, before = arguments.config.flat(), config.flat()
    counting = [name for name in before if name not in run_usage.PLACES and uses(config, name)]
    assert {name: again[name] for name in counting} == {name: before[name] for name in counting}
    assert parsing.start_of(words)[1] is None  # nothing is left to be chosen from the data
    assert all(uses(config, name) for name in parsing.flags_in(words))


def test_a_run_without_experts_that_began_as_another_coreset(ended_runs, tmp_path):
    """The page has no experts that the method doesn't use, and as the first images those of --initial-coreset."""
    run, settings = tmp_path / "run", SMALL_VBPC | {"steps": 2, "num_chains": 1, "net_steps": 2, "backend": "serial"}
    main.main(["distill", *flags_of(settings), "--initial-coreset", str(ended_runs["bpc"]), "--out", str(run)])
    page = report_page(tmp_path, run)
    assert f"Begun as{ended_runs['bpc']}" in page.text and "Experts" not in page.text
    assert "The images of --initial-coreset that distillation starts from." in page.text
    before = base64.b64encode((run / "before.png").read_bytes()).decode()
    assert f"data:image/png;base64,{before}" in [attrs["src"] for attrs in page.of("img")]
    page = report_page(tmp_path, ended_runs["fbpc"])
    assert "Experts2 for each network, of 3 epochs" in page.text and "Begun as" not in page.text
    assert "The real images that distillation starts from." in page.text


def test_the_code_of_the_page_loads_the_coreset(ended_runs, tmp_path):
    outcome = report_page(tmp_path, ended_runs["fbpc"])
    code = next(code for code in outcome.codes if "safe_open" in code)
    names: dict = {}
    exec(code, names)
    pseudocoreset = coreset.load(RunDirectory(ended_runs["fbpc"]).coreset_path)
    assert torch.equal(names["images"], pseudocoreset.images) and torch.equal(names["labels"], pseudocoreset.labels)
    assert (tuple(names["mean"]), tuple(names["classes"])) == (pseudocoreset.mean, pseudocoreset.classes)
    assert str(tuple(pseudocoreset.images.shape)) in code


def test_several_runs_stand_beside_each_other(ended_runs, tmp_path):
    """Random images that runs share are one line; where settings differ is said, and where scores can't be compared."""
    page = report_page(tmp_path, ended_runs["fbpc"], ended_runs["bpc"], ended_runs["random"], ended_runs["fbpc"])
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

    other = shutil.copytree(ended_runs["bpc"], tmp_path / "other")
    config = read_config(other).flat() | {"chain_epochs": 10}
    (other / "config.json").write_text(json.dumps(config))
    text = report_page(tmp_path, ended_runs["fbpc"], other).text
    assert "not scored alike" in text and "best NLL" not in text
    assert "No conclusion: the runs differ in epochs of a chain (20, 10), so that their scores don't compare." in text


def test_the_markdown_says_the_same(ended_runs, tmp_path):
    outcome = report_page(tmp_path, ended_runs["fbpc"], ended_runs["random"])
    text = (tmp_path / "made.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(shown) == len(outcome.of("img")) == 13
    for path in shown:
        Image.open(tmp_path / path).verify()
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    for row in outcome.table("network", "coreset", "seed"):
        assert row in lines
    report_page(tmp_path, ended_runs["fbpc"])  # an earlier report is replaced
    assert "# FBPC on digits" in (tmp_path / "made.md").read_text()


def test_what_files_say_is_text(ended_runs, tmp_path):
    """Names with markup, in every file: shown as they are, in both forms."""
    folder = shutil.copytree(ended_runs["fbpc"], tmp_path / "<b>run</b>`|")
    result = inputs.read_checked_json(folder / "result.json")
    result |= {"data": HOSTILE, "commit": HOSTILE, "device": f"\x1b[31m{HOSTILE}", "map_endings": {HOSTILE: HOSTILE}}
    result["versions"] = {HOSTILE: HOSTILE}
    result["coresets"] = {
        HOSTILE if name == "fbpc" else name: {
            HOSTILE if each == "convnet-in" else each: s for each, s in scores.items()
        }
        for name, scores in result["coresets"].items()
    }
    (folder / "result.json").write_text(json.dumps(result))
    config = read_config(folder).flat() | {"experts": f"{HOSTILE}\n```\n# heading", "data": f"npz:{HOSTILE}"}
    (folder / "config.json").write_text(json.dumps(config))
    for path in (RunDirectory(folder).coreset_path, RunDirectory(folder).random_path):
        coreset.save(coreset.load(path)._replace(classes=(HOSTILE, *"123456789")), path)

    page = report_page(tmp_path, folder)
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


CUT = """[...document.querySelectorAll('body *')].filter(each => {
  const box = each.getBoundingClientRect(), style = getComputedStyle(each)
  if (each.tagName == 'INPUT' || !box.width) return false
  return box.right > innerWidth + 1 || (style.display != 'inline' && each.scrollWidth > each.clientWidth + 1)
}).map(each => `${each.tagName}: ${each.scrollWidth} in ${each.clientWidth}`)"""
"""Elements that a reader would have to scroll sideways to see whole."""


@browsed
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_everything_whole(ended_runs, tmp_path, width):
    """No table, picture or line of code is cut; a tap shows a picture that a phone shrinks in full size."""
    long = shutil.copytree(ended_runs["bpc"], tmp_path / "a-run-of-a-very-long-name-without-any-space-in-it")
    for name, folders in (("one", [ended_runs["fbpc"]]), ("several", [ended_runs["fbpc"], long, ended_runs["random"]])):
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
