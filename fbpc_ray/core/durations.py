"""Durations: written in words, read from a command line."""

import re

from fbpc_ray.core.errors import UserError

UNITS = {"": 60.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
"""Suffix -> seconds."""


def describe_seconds(seconds: float) -> str:
    """Write a duration in words: 45 s, 3 min 20 s, 20 min, 2 h 5 min, 40 h, 3 days.

    Below ten of a unit, the next smaller unit follows.
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole else "under a second"
    if whole < 600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 600:
        return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    hours = round(whole / 3600)
    return f"{hours} h" if hours < 48 else f"{round(whole / 86400):,} days"


def parse_duration(text: str | float) -> float:
    """Return the seconds of 90s, 20m, 20 (minutes, also as a number) or 1.5h. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *(s|m|min|h|)", str(text).strip().lower())
    if not match or not 1 <= (seconds := float(match[1]) * UNITS[match[2]]) <= 1e7:
        raise UserError(f"--time-budget: must be a duration such as 90s, 20m or 1.5h, got {text!r}")
    return seconds
