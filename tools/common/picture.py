"""Writes the tools' pictures, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib

from tools.common.cli import ToolError
from tools.common.files import whole_file
from tools.common.outputs import output_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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
