"""Draws evaluations side by side: perplexities, and a panel of scores for each number of shots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from tools.common.cli import ToolError
from tools.common.picture import COLOURS, Bars, draw_groups, save
from tools.evaluation.comparison import METRICS, PERPLEXITIES, Evaluation, common_scores, shots_of


def draw(evaluations: Sequence[Evaluation], output: Path) -> None:
    """Draw the picture.

    Args:
        evaluations: at least one.
        output: from `picture_file`.

    Raises:
        ToolError: they have neither perplexities nor scores.
    """
    shots = shots_of(evaluations)
    with_ppl = any(one.content.get("ppl") is not None for one in evaluations)
    panels = len(shots) + with_ppl
    if not panels:
        raise ToolError(f"nothing to draw: no perplexity and no {', '.join(METRICS)}")
    figure, grid = plt.subplots(
        panels, 1, figsize=(13, 0.6 + 3.4 * panels), layout="constrained", squeeze=False
    )
    axes = list(grid[:, 0])
    if with_ppl:
        _draw_perplexities(axes.pop(0), evaluations)
    for panel, number in zip(axes, shots, strict=True):
        _draw_scores(panel, evaluations, number)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    save(figure, output)


def _draw_perplexities(axes: Axes, evaluations: Sequence[Evaluation]) -> None:
    keys = [key for key in PERPLEXITIES if any(one.content.get(key) for one in evaluations)]
    values = [[one.content.get(key) or np.nan for key in keys] for one in evaluations]
    names = [PERPLEXITIES[key] for key in keys]
    _draw_bars(
        axes, evaluations, names, values, None, lambda ppl: f"{ppl:.{0 if ppl >= 1000 else 2}f}"
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(np.nanmin(values) / 2, np.nanmax(values) * 2)
    axes.set_ylabel("perplexity (log scale)")
    axes.set_title("Held-out perplexity by token frequency (lower is better)")


def _draw_scores(axes: Axes, evaluations: Sequence[Evaluation], shots: str) -> None:
    scores = common_scores(evaluations, shots)
    tasks = list(dict.fromkeys(task for found in scores for task in found))
    values = [
        [100 * found[task].value if task in found else np.nan for task in tasks] for found in scores
    ]
    errors = [
        [100 * (found[task].error or 0) if task in found else 0 for task in tasks]
        for found in scores
    ]
    _draw_bars(axes, evaluations, tasks, values, errors, "{:.1f}".format)
    axes.set_ylim(0, min(112, 1.25 * (np.nanmax(values) + np.max(errors))))
    axes.set_ylabel("score (%)")
    axes.set_title(f"{shots}-shot (higher is better; whiskers: one standard error)")


def _draw_bars(
    axes: Axes,
    evaluations: Sequence[Evaluation],
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]] | None,
    form: Callable[[float], str],
) -> None:
    rows = [
        Bars(one.name, COLOURS[i % len(COLOURS)], values[i], errors[i] if errors else None)
        for i, one in enumerate(evaluations)
    ]
    size = 250 / (len(rows) * len(labels))
    draw_groups(axes, labels, rows, form, max(4.0, min(9.0, size)))
    axes.tick_params(axis="x", labelsize=9)
    if len(labels) > 6:
        plt.setp(axes.get_xticklabels(), rotation=20, ha="right")
