"""Pictures of a run: its images before and after, the course of the steps, reliability."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from fbpc_ray.data import coreset
from fbpc_ray.data.datasets import denormalise
from fbpc_ray.reporting import image_grids, run_figures
from fbpc_ray.reporting.document import Block, Picture
from fbpc_ray.reporting.run_reader import EndedRun, image


def png_of(draw: Callable[[Path], object]) -> bytes:
    """Return the PNG that `draw` writes to its path; empty where it writes none."""
    with tempfile.TemporaryDirectory(prefix="fbpc-") as folder:
        path = Path(folder) / "picture.png"
        draw(path)
        return path.read_bytes() if path.exists() else b""


def run_pictures(ended: EndedRun, number: str) -> list[Block]:
    """Return the pictures that a run has; `number` starts the names of their files."""
    run, blocks = ended.run, list[Block]()
    if ended.method != "random" and run.random_path.exists():
        before = coreset.load(run.random_path)
        if before.images.shape[1] in (1, 3):
            pixels = denormalise(before.images, before.mean, before.std).numpy()
            title = "random real images, before step 1"
            png = png_of(
                lambda path: image_grids.coreset_grid(pixels, before.labels.numpy(), before.classes, path, title)
            )
            blocks.append(Picture(png, f"{number}-before", "Before: the real images that distillation starts from."))
    if run.picture_path.exists():
        what = "The real images." if ended.method == "random" else "After: the coreset."
        blocks.append(Picture(image(run.picture_path), f"{number}-coreset", what))
    if run.over_time_path.exists():
        caption = f"Over the steps: the first image of each class, of at most {run_figures.FOLLOWED}."
        blocks.append(Picture(image(run.over_time_path), f"{number}-over-time", caption))
    if ended.rows:
        blocks += _course(ended, number)
    if run.reliability_path.exists():
        caption = (
            "Reliability, of the predictions of all chains put together (the table has the mean ECE of single chains): "
            "a calibrated model is right as often as it is confident (dashed)."
        )
        blocks.append(Picture(image(run.reliability_path), f"{number}-reliability", caption))
    return blocks


def _course(ended: EndedRun, number: str) -> list[Block]:
    """Draw loss, its terms, MAP solves and validation over the steps."""
    windows: list[int] = []
    png = png_of(lambda path: windows.append(run_figures.course(ended.rows, ended.method, path)))
    if not png:
        return []
    smooth = f" Bold: the mean over {windows[0]} steps; faint: every step." if windows[0] > 1 else ""
    return [Picture(png, f"{number}-steps", f"The course of the distillation, a line for each network.{smooth}")]
