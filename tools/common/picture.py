"""Writes the tools' pictures, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from tools.common.cli import ToolError
from tools.common.files import whole_file
from tools.common.outputs import output_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; grey in place of black.
COLOURS = ("#595959", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FORMATS = (".png", ".svg", ".pdf")


def picture_file(flag: str, path: str | Path, inputs: Iterable[str | Path]) -> Path:
    """Check, before anything is drawn, that a picture can be written; otherwise as `output_file`.

    Raises:
        ToolError: also where the name has another suffix than .png, .svg or .pdf.
    """
    if Path(path).suffix not in FORMATS:
        raise ToolError(f"{flag} {path}: expected a name that ends in {', '.join(FORMATS)}")
    return output_file(flag, path, inputs)


class Bars(NamedTuple):
    """What is drawn of one run or evaluation: a bar in each group."""

    name: str
    colour: str
    values: Sequence[float]
    """NaN for no bar."""
    errors: Sequence[float] | None = None
    """Half the length of the whiskers."""


def draw_groups(
    axes: Axes,
    labels: Sequence[str],
    rows: Sequence[Bars],
    form: Callable[[float], str],
    fontsize: float,
) -> None:
    """Draw a group of bars for each label, the value of each written at its end.

    Args:
        axes: to draw on.
        labels: of the groups.
        rows: one bar of each in every group.
        form: writes a value.
        fontsize: of the values.
    """
    width = 0.86 / len(rows)
    for index, row in enumerate(rows):
        bars = axes.bar(
            np.arange(len(labels)) + (index - (len(rows) - 1) / 2) * width,
            row.values,
            width * 0.92,
            color=row.colour,
            label=row.name,
            yerr=row.errors,
            error_kw={"elinewidth": 0.8, "ecolor": "black"},
        )
        texts = ["" if np.isnan(value) else form(value) for value in row.values]
        axes.bar_label(bars, texts, padding=2, fontsize=fontsize)
    axes.set_xticks(range(len(labels)), labels)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, output: Path, dpi: int = 150) -> None:
    """Write the picture and close the figure.

    Args:
        figure: of pyplot.
        output: from `picture_file`, or a path with such a suffix.
        dpi: pixels an inch.

    Raises:
        ToolError: matplotlib takes a name in it for a formula that it cannot set, such as `$_$`.
    """
    try:
        with whole_file(output) as partial:
            figure.savefig(partial, dpi=dpi, format=output.suffix[1:])
    except ValueError as error:
        raise ToolError(f"{output}: {error}") from error
    finally:
        plt.close(figure)
