"""Durations in words, and the words of --time-budget."""

import pytest

from fbpc_ray.core.durations import describe_seconds, parse_duration
from fbpc_ray.core.errors import UserError


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "under a second"), (0.4, "under a second"), (50, "50 s"), (59, "59 s"), (59.6, "1 min"), (160, "2 min 40 s"),
     (200, "3 min 20 s"), (599.4, "9 min 59 s"), (599.6, "10 min"), (1200, "20 min"), (3569, "59 min"), (3571, "1 h"),
     (5400, "1 h 30 min"), (7500, "2 h 5 min"), (35_970, "10 h"), (3600 * 40, "40 h"), (3600 * 48, "2 days"),
     (86400 * 12, "12 days")],
)  # fmt: skip
def test_durations_in_words(seconds, text):
    assert describe_seconds(seconds) == text


@pytest.mark.parametrize(
    "text, seconds",
    [("1s", 1), ("90s", 90), ("20m", 1200), ("20", 1200), ("1.5h", 5400), ("2 H", 7200), ("20min", 1200)],
)
def test_time_budgets(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5m", "0", "0.1s", "20d", "1e3m", "m", "nan", "9" * 400, "2800h"])
def test_refused_time_budgets(text):
    with pytest.raises(UserError, match=r"^--time-budget: must be a duration such as 90s, 20m or 1\.5h, got "):
        parse_duration(text)
