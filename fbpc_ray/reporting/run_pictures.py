"""Pictures of a run: its images after and before, the course of the steps, reliability."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from fbpc_ray.reporting import run_figures
from fbpc_ray.reporting.charts import steps
from fbpc_ray.reporting.document import Block, Picture
from fbpc_ray.reporting.run_reader import EndedRun, image


def png_of(draw: Callable[[Path], object]) -> bytes:
    """Return the PNG that `draw` writes to its path; empty where it writes none."""
    with tempfile.TemporaryDirectory(prefix="fbpc-") as folder:
        path = Path(folder) / "picture.png"
        draw(path)
        return path.read_bytes() if path.exists() else b""


def after_picture(ended: EndedRun, number: str) -> list[Block]:
    """Return the picture of the coreset; `number` starts the name of its file."""
    if not ended.run.picture_path.exists():
        return []
    what = "the real images" if ended.method == "random" else "the coreset, after the last step"
    caption = _sentence(f"{f'{ended.label}: ' if ended.label else ''}{what}.")
    return [Picture(image(ended.run.picture_path), f"{number}-coreset", caption)]


def before_picture(ended: EndedRun, number: str) -> list[Block]:
    """Return the picture of the images that the coreset began as."""
    if ended.method == "random" or not ended.run.before_path.exists():
        return []
    origin = "images of --initial-coreset" if ended.config.distillation.initial_coreset else "real images"
    return [Picture(image(ended.run.before_path), f"{number}-before", f"The {origin} that distillation starts from.")]


def course_pictures(ended: EndedRun, number: str) -> list[Block]:
    """Return the pictures of the steps and of the calibration that a run has."""
    run = ended.run
    blocks = _course(ended, number) if ended.rows else []
    if run.over_time_path.exists():
        caption = f"Over the steps: the first image of each class, of at most {run_figures.FOLLOWED}."
        blocks.append(Picture(image(run.over_time_path), f"{number}-over-time", caption))
    if run.reliability_path.exists():
        blocks.append(Picture(image(run.reliability_path), f"{number}-reliability", RELIABILITY))
    return blocks


RELIABILITY = (
    "Reliability, of the predictions of all chains put together (the table has the mean ECE of single chains): "
    "a calibrated model is right as often as it is confident (dashed)."
)


def caption_of(kind: str) -> str:
    """Describe a picture of an evaluation by the end of its file's name: reliability, fbpc-convnet-in.entropy, ..."""
    if kind == "reliability":
        return RELIABILITY
    subject, _, what = kind.rpartition(".")
    if what == "entropy":
        return f"Entropy of images of the data set and of others, {subject}: the less they overlap, the better."
    return kind.replace(".", ", ")


def _course(ended: EndedRun, number: str) -> list[Block]:
    """Draw loss, its terms, MAP solves and validation over the steps: one picture each, which fits on a phone."""
    courses = run_figures.courses_of(ended.rows, ended.method)
    blocks: list[Block] = []
    for index, course in enumerate(courses, 1):
        png = png_of(lambda path, course=course: steps.over_steps([course], path))
        window = run_figures.window_of([course])
        smooth = f" Bold: the mean over {window} steps; faint: every step." if window > 1 else ""
        caption = _sentence(f"{course.title} over the steps, a line for each network.{smooth}")
        blocks.append(Picture(png, f"{number}-steps-{index}", caption))
    return blocks


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
