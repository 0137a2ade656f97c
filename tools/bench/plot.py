"""Draws the benchmark's table: time of each loss as a share of Megatron's plain cross-entropy.

    python tools/bench/plot.py

One picture per device and size, with a panel for each precision and number of ranks. Bars are the
median over the rounds of forward + backward divided by Megatron's in the same round, the stroke in
a bar is the ratio of the minima, and the grey text is the peak of extra memory. Where a case was
run more than once the last run counts. Losses that were not timed are named with the reason if
they were tried and failed; those that could not run there are left out.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from _cli import ToolError, new_parser, one_line_errors  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

PROG = "tools/bench/plot.py"
HERE = Path(__file__).resolve().parent
OURS, CROSS_ENTROPY, OTHER = "#D55E00", "#9E9E9E", "#0072B2"
Row = dict[str, str]
Panel = tuple[str, str]


def read(path: Path) -> dict[Path, dict[Panel, list[Row]]]:
    """Sort the table into pictures (file name) and panels (dtype, tp), slowest loss first.

    Raises:
        ToolError: the file is no table of the benchmark, or has nothing to draw.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return _pictures(rows, path)
    except KeyError as error:
        raise ToolError(f"--input {path} has no column {error}; make it with run.py") from error


def _pictures(rows: Sequence[Row], path: Path) -> dict[Path, dict[Panel, list[Row]]]:
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        timed = row["ratio_to_megatron"] and row["phase"] == "both"
        if timed or row["status"].startswith("failed"):
            keys = ("device", "tokens", "vocab", "dtype", "tp", "provider")
            last[tuple(row[key] for key in keys)] = row
    if not last:
        raise ToolError(f"--input {path} has no ratios to draw; run tools/bench/run.py first")
    pictures: dict[Path, dict[Panel, list[Row]]] = {}
    for (device, tokens, vocab, dtype, tp, _), row in last.items():
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "")).strip("-")
        panels = pictures.setdefault(Path(f"{slug}_{tokens}x{vocab}.png"), {})
        panels.setdefault((dtype, tp), []).append(row)
    for panels in pictures.values():
        for panel in panels.values():
            panel.sort(key=lambda row: -float(row["ratio_to_megatron"] or "inf"))
    return pictures


def draw(panels: dict[Panel, list[Row]], output: Path) -> None:
    """Draw one picture.

    Args:
        panels: (dtype, tp) -> its rows, from the top.
        output: file to write.
    """
    columns = min(2, len(panels))
    height = 0.36 * max(map(len, panels.values())) + 1.1
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(6.6 * columns, height * lines + 0.6), layout="constrained"
    )
    places = list(getattr(grid, "flat", [grid]))
    for axes, (key, rows) in zip(places, panels.items(), strict=False):
        _draw_panel(axes, key, rows)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    row = next(iter(panels.values()))[0]
    figure.suptitle(
        f"Forward + backward of [{row['tokens']}, {row['vocab']}] logits, {row['device']}: time "
        "relative to Megatron's plain cross-entropy"
    )
    partial = output.with_name(f"{output.stem}.partial.{os.getpid()}{output.suffix}")
    figure.savefig(partial, dpi=130)
    partial.replace(output)
    plt.close(figure)


def _draw_panel(axes: Axes, key: Panel, rows: Sequence[Row]) -> None:
    """Draw one bar a row."""
    ratios = [float(row["ratio_to_megatron"] or 0) for row in rows]
    largest = max(*ratios, 1.0)
    axes.barh(range(len(rows)), ratios, color=[_colour(row) for row in rows], height=0.72)
    for place, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        minima = float(row["ratio_of_minima"] or 0)
        if ratio:
            axes.plot([minima] * 2, [place - 0.36, place + 0.36], color="black", linewidth=1.2)
        end = max(ratio, minima) + 0.02 * largest
        axes.text(end, place, f"{ratio:.2f}" if ratio else "", va="center")
        note = _memory(row) if ratio else row["status"]
        end += 0.13 * largest if ratio else 0
        axes.text(end, place, note, color="#707070", fontsize=8, va="center")
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xlim(0, 1.7 * largest)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{key[0]}, tensor parallel {key[1]}, threads per rank: {rows[0]['threads']}")


def _memory(row: Row) -> str:
    calls = int(row["collectives"])
    exchanged = f", {calls} collective{'s' * (calls != 1)}" if row["tp"] != "1" else ""
    return f"+{float(row['extra_mib']):.0f} MiB{exchanged}" if row["extra_mib"] else exchanged[2:]


def _label(row: Row) -> str:
    kind = "MiLe" if row["objective"] == "mile" else "CE"
    return f"{row['provider']} ({kind})"


def _colour(row: Row) -> str:
    if row["provider"].startswith("ours"):
        return OURS
    return CROSS_ENTROPY if row["objective"] == "ce" else OTHER


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (default: that of the process)."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--input", default=str(HERE / "results.csv"), help="table (default: results.csv beside it)")
    add("--output", default=str(HERE / "figures"), help="folder (default: figures beside it)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    args = parse_args(argv)
    with one_line_errors(PROG):
        folder = Path(args.output)
        pictures = read(Path(args.input))
        folder.mkdir(parents=True, exist_ok=True)
        for name, panels in pictures.items():
            draw(panels, folder / name)
            print(folder / name)


if __name__ == "__main__":
    main()
