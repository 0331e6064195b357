"""Write the report of one run or several (`fbpc report`), as one HTML page and as Markdown.

A report is made from the files of runs, which may be foreign: values are validated, and shown as plain text.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from fbpc_ray import __version__
from fbpc_ray.core import files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Place, Remote, place
from fbpc_ray.evaluation.results import unique
from fbpc_ray.reporting.document import GENERATOR, Block, Facts, Heading, Lead, Picture, Text, pictures
from fbpc_ray.reporting.html import to_html
from fbpc_ray.reporting.markdown import to_markdown
from fbpc_ray.reporting.run_comparison import comparison, conclusion
from fbpc_ray.reporting.run_facts import facts_of, heading_of, provenance
from fbpc_ray.reporting.run_pictures import after_picture, before_picture, caption_of, course_pictures
from fbpc_ray.reporting.run_reader import EndedRun, read
from fbpc_ray.reporting.run_usage import how_to_repeat, how_to_use
from fbpc_ray.reporting.score_blocks import (
    all_series,
    bar_charts,
    curve_charts,
    describe_scoring,
    headline,
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
    """Return title and blocks of a report: result and pictures first, then scores, settings and how it was made."""
    series = all_series(ended)
    scores = [Heading("Scores"), Text(describe_scoring(ended)), mean_table(series)]
    charts = [*bar_charts(series), *curve_charts(ended)]
    if len(ended) > 1:
        title = f"{len(ended)} runs compared"
        blocks = [Lead(conclusion(ended)), *(block for run in ended for block in after_picture(run, _number(run)))]
        blocks += [*comparison(ended), *scores, *charts]
    else:
        title = heading_of(ended[0])
        pictures_of_images = [*after_picture(ended[0], "run"), *before_picture(ended[0], "run")]
        blocks = [Lead(headline(ended[0])), *pictures_of_images, *scores, *charts]
    for run in ended:
        blocks += _of_run(run)
    blocks += [Heading("Every value"), Text("One line for each chain, by its seed."), value_table(series)]
    return title, [*blocks, *how_to_use(ended), *provenance(ended)]


def _of_run(run: EndedRun) -> list[Block]:
    """Show how a run was made: settings, calibration, the course of the steps, later evaluations."""
    return [
        Heading(heading_of(run) if run.label else "How it was made"), Facts(facts_of(run)), *mixing_blocks(run.mixing),
        *(before_picture(run, _number(run)) if run.label else []),
        *course_pictures(run, _number(run)), *_later(run, _number(run)), *how_to_repeat(run),
    ]  # fmt: skip


def _number(run: EndedRun) -> str:
    """Return the start of the names of a run's pictures: its letter, in small, or "run"."""
    return run.label.lower() or "run"


def _later(run: EndedRun, number: str) -> list[Block]:
    """Show the evaluations by `fbpc evaluate` after the run."""
    blocks: list[Block] = []
    for index, later in enumerate(run.later, 1):
        series = series_of(later.scores)
        networks = ", ".join(unique(score.architecture for score in later.scores))
        ood = f" AUROC (higher is better): how well uncertainty detects {later.ood}." if later.ood else ""
        protocol = f" Protocol {later.protocol}." if later.protocol else ""
        blocks += [
            Heading(f"Evaluated later on {networks}, {later.split} split", 3),
            Text(f"From evaluations/{later.name}.{protocol}{ood}"),
            mean_table(series), *mixing_blocks(later.mixing), value_table(series),
        ]  # fmt: skip
        if later.calibrated:
            text = f"Protocol calibrated: {later.calibrated_flags}, chosen on the validation split."
            blocks += [Text(text), mean_table(series_of(later.calibrated))]
        for position, (kind, png) in enumerate(later.pictures, 1):
            blocks.append(Picture(png, f"{number}-later-{index:02d}-{position:02d}", caption_of(kind)))
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
