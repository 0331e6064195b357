"""The figures that charts save, as matplotlib holds them."""

import pytest
from matplotlib.figure import Figure

from fbpc_ray.reporting.charts import comparison, histograms, reliability, scatter, steps, style


def saved_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return a list that gets each figure that is saved from now on, beside its file."""
    figures: list[Figure] = []
    for module in (comparison, histograms, reliability, scatter, steps):
        monkeypatch.setattr(module, "save", lambda figure, path: (figures.append(figure), style.save(figure, path)))
    return figures
