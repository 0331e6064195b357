"""Write the report of one run or several (`fbpc report`), as one HTML page and as Markdown.

A report is made from the files of runs, which may be foreign: values are validated, and shown as plain text.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from fbpc_ray import __version__
from fbpc_ray.core import files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Place, Remote, place
from fbpc_ray.reporting.document import GENERATOR, Block, Facts, Heading, Picture, Text, pictures
from fbpc_ray.reporting.html import to_html
from fbpc_ray.reporting.markdown import to_markdown
from fbpc_ray.reporting.run_facts import comparison, facts_of, method_name, provenance
from fbpc_ray.reporting.run_pictures import run_pictures
from fbpc_ray.reporting.run_reader import EndedRun, read
from fbpc_ray.reporting.run_usage import how_to_repeat, how_to_use
from fbpc_ray.reporting.score_blocks import (
    all_series,
    bar_charts,
    curve_charts,
    describe_scoring,
    mean_table,
    mixing_blocks,
    series_of,
    value_table,
)


def report(runs: Sequence[str], out: str, log: Callable[[str], None]) -> None:
    """Write `out`, an HTML file, and beside it the same report as Markdown with its pictures.

    Raises:
        UserError: a folder holds no ended run, a file is damaged, or `out` exists and is not a report.
    """
    target = place(out).absolute()
    if not out.endswith(".html"):
        raise UserError(f"--out {out}: must end in .html; the Markdown is written beside it")
    texts = target, target.with_suffix(".md")
    for path in texts:
        _refuse_others(path)
    folders = list(dict.fromkeys(place(run).absolute() for run in runs))
    ended = [read(folder, _letter(index) if len(folders) > 1 else "") for index, folder in enumerate(folders)]
    title, blocks = document(ended)
    foot = f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by fbpc-ray {__version__}."
    folder = f"{target.name.removesuffix('.html')}-files"
    for picture in pictures(blocks):
        files.write_bytes(_beside(target, folder) / f"{picture.name}.png", picture.png)
    files.write_text(texts[1], to_markdown(title, blocks, foot, folder))
    files.write_text(texts[0], to_html(title, blocks, foot))
    log(f"report:   {texts[0]}\nMarkdown: {texts[1]}, its pictures in {folder}")


def document(ended: Sequence[EndedRun]) -> tuple[str, list[Block]]:
    """Return title and blocks of a report."""
    several = len(ended) > 1
    first = ended[0]
    title = f"{len(ended)} runs compared" if several else f"{method_name(first)} on {first.result['data']}"
    series = all_series(ended)
    blocks: list[Block] = [*(comparison(ended) if several else [Facts(facts_of(first))])]
    blocks += [
        Heading("Scores"),
        Text(describe_scoring(ended)),
        mean_table(series),
        *bar_charts(series),
        *curve_charts(ended),
    ]
    for number, run in enumerate(ended, 1):
        if several:
            blocks += [Heading(run.name), Facts(facts_of(run)), *mixing_blocks(run.mixing)]
        else:
            blocks += [*mixing_blocks(run.mixing), Heading("Pictures")]
        blocks += [*run_pictures(run, f"{number:02d}"), *_later(run, f"{number:02d}"), *how_to_repeat(run)]
    blocks += [Heading("Every value"), Text("One line for each chain, by its seed."), value_table(series)]
    return title, [*blocks, *how_to_use(ended), *provenance(ended)]


def _later(ended: EndedRun, number: str) -> list[Block]:
    """Show the evaluations by `fbpc evaluate` after the run."""
    blocks: list[Block] = []
    for index, later in enumerate(ended.later, 1):
        series = series_of(later.scores)
        ood = f"; AUROC (higher is better): how well uncertainty detects {later.ood}" if later.ood else ""
        blocks += [Heading(f"Evaluated later: {later.name}", 3), Text(f"On the {later.split} split{ood}.")]
        blocks += [mean_table(series), *mixing_blocks(later.mixing), value_table(series)]
        for position, (kind, png) in enumerate(later.pictures, 1):
            blocks.append(Picture(png, f"{number}-later-{index:02d}-{position:02d}", kind.replace(".", ", ")))
    return blocks


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"A{index}"


def _beside(path: Place, name: str) -> Place:
    if isinstance(path, Remote):
        return Remote(path.scheme, f"{path.key.rpartition('/')[0]}/{name}")
    return path.with_name(name)


def _refuse_others(path: Place) -> None:
    if path.exists() and (not path.is_file() or GENERATOR.encode() not in path.read_bytes()[:300]):
        raise UserError(f"{path} exists and is not a report: give another --out")
