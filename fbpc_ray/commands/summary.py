"""Summarise a run in sentences: its images against random ones, and the next commands."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from fbpc_ray.core.storage import Place
from fbpc_ray.evaluation.results import ChainScore, mean_scores, select, unique

UNCLEAR = "no clear difference in accuracy"
FAQ = "docs/faq.md#it-is-worse-than-random-images"


def describe(
    scores: Sequence[ChainScore], classes: int, images: int, split: str = "test", *, advice: bool = True
) -> str:
    """Compare the accuracy of the distilled and of the random images, means over networks and chains.

    Args:
        images: those of `split`, on which the chains were scored.
        advice: whether to name settings of a distillation that may help, where there is no clear difference.

    Returns "" for a run that distilled nothing, or whose chains all diverged.
    """
    means = {name: mean_scores(select(scores, name)) for name in unique(score.coreset for score in scores)}
    names = [name for name in means if name != "random"]
    if not names or not all("accuracy" in values for values in means.values()) or "random" not in means:
        return ""
    distilled, random = means[names[0]], means["random"]
    ours, theirs = distilled["accuracy"], random["accuracy"]
    nll = f"NLL {distilled['nll']:.2f} against {random['nll']:.2f} is {_compare(distilled['nll'], random['nll'])}"
    line = (
        f"{names[0]}: {100 * ours:.1f} % of {images:,} {split} images right; as many random real images: "
        f"{100 * theirs:.1f} %; guessing: {100 / classes:.1f} %"
    )
    verdict = _verdict(ours, theirs, images, nll)
    unclear = advice and verdict.startswith(UNCLEAR)
    return "\n".join([line, verdict, *([_advice(names[0])] if unclear else [])])


def _advice(method: str) -> str:
    other = "" if method == "vbpc" else ", or --method vbpc,"
    return f"more test images tell more; a larger --ipc or --time-budget{other} may raise the accuracy"


def _verdict(ours: float, theirs: float, images: int, nll: str) -> str:
    points = 100 * (ours - theirs)
    error = 200 * math.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / max(1, images))
    if abs(points) <= error:
        return f"{UNCLEAR}: on {images:,} images up to {error:.0f} points may be chance; {nll}"
    if points > 0:
        return f"the distilled images are {points:.0f} points better than random ones; {nll}"
    return f"the distilled images are {-points:.0f} points WORSE than random ones; {nll}: see {FAQ}"


def _compare(ours: float, theirs: float) -> str:
    """Compare two NLLs, as printed with two digits."""
    difference = round(ours, 2) - round(theirs, 2)
    if difference == 0:
        return "equal"
    return f"{'better' if difference < 0 else 'worse'} (lower is better)"


def next_steps(run: Place) -> str:
    """Return the commands that a user may want after a run."""
    path = shlex.quote(str(_short(run)))
    return (
        f"next:    fbpc report {path}  # a page: pictures, curves, settings\n"
        f"         fbpc export {path} --format hf  # the images for other programs"
    )


def _short(run: Place) -> Place | Path:
    """Return the path as the current folder sees it, where it lies below."""
    if isinstance(run, Path) and run.is_relative_to(Path.cwd()):
        return run.relative_to(Path.cwd())
    return run
