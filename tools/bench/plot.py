"""Draws the benchmark's table: time of each loss as a share of Megatron's plain cross-entropy.

    python tools/bench/plot.py

One picture per device and size, with a panel for each precision and number of ranks. Bars are the
median over the rounds of forward + backward divided by Megatron's in the same round, the stroke in
a bar is the ratio of the minima, and the grey text is the peak of extra memory. Where a case was
run more than once the last run counts. Losses that were not timed are named with the reason if
they were tried and failed; those that could not run there are left out.

Losses with the output layer have pictures of their own, and one more where they were run with
several numbers of tokens: the peak of extra memory over that number.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megatron_mile.objectives import OBJECTIVES
from tools.common.cli import ToolError, new_parser, run_tool
from tools.common.picture import picture_file, save

PROG = "tools/bench/plot.py"
HERE = Path(__file__).resolve().parent
OURS, CROSS_ENTROPY, OTHER = "#D55E00", "#9E9E9E", "#0072B2"
# Of the other losses in the pictures of the memory.
LINES = ("#0072B2", "#000000", "#9E9E9E", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
Row = dict[str, str]
Panel = tuple[str, str]
Pictures = dict[Path, dict[Panel, list[Row]]]


def read(path: Path) -> tuple[Pictures, Pictures]:
    """Sort the table into pictures (file name) and panels (dtype, tp).

    Returns:
        Pictures of the time, slowest loss first, and of the memory, fewest tokens first.

    Raises:
        ToolError: the file is no table of the benchmark, or has nothing to draw.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        pictures = _times(rows), _memories(rows)
    except KeyError as error:
        raise ToolError(f"--input {path} has no column {error}; make it with run.py") from error
    if not pictures[0]:
        raise ToolError(f"--input {path} has no ratios to draw; run tools/bench/run.py first")
    return pictures


def _times(rows: Sequence[Row]) -> Pictures:
    timed = [row for row in rows if row["ratio_to_megatron"] and row["phase"] == "both"]
    failed = [row for row in rows if row["status"].startswith("failed")]
    pictures: Pictures = {}
    for row in _last([row for row in rows if row in timed or row in failed]):
        size = "x".join(row[key] for key in ("tokens", "hidden", "vocab") if row[key] != "0")
        _file(pictures, row, size + (f"_emo_{row['cost_width']}" if _is_emo(row) else ""))
    for panels in pictures.values():
        for panel in panels.values():
            panel.sort(key=lambda row: -float(row["ratio_to_megatron"] or "inf"))
    return pictures


def _memories(rows: Sequence[Row]) -> Pictures:
    known = [row for row in rows if row["extra_mib"] and row["phase"] == "both"]
    pictures: Pictures = {}
    for row in sorted(_last(known), key=lambda row: int(row["tokens"])):
        if row["hidden"] != "0":
            _file(pictures, row, f"memory_{row['hidden']}x{row['vocab']}")
    several = {
        name: {
            key: panel for key, panel in panels.items() if len({row["tokens"] for row in panel}) > 1
        }
        for name, panels in pictures.items()
    }
    return {name: panels for name, panels in several.items() if panels}


def _last(rows: Sequence[Row]) -> list[Row]:
    """Return the last row of each case and provider."""
    keys = ("device", "tokens", "hidden", "cost_width", "vocab", "dtype", "tp", "provider")
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def _file(pictures: Pictures, row: Row, what: str) -> None:
    """Put the row into the picture of its device and `what`."""
    slug = re.sub(r"[^a-z0-9]+", "-", row["device"].lower().replace("(r)", "")).strip("-")
    panels = pictures.setdefault(Path(f"{slug}_{what}.png"), {})
    panels.setdefault((row["dtype"], row["tp"]), []).append(row)


def draw_times(panels: dict[Panel, list[Row]], output: Path) -> None:
    """Draw one picture of the time.

    Args:
        panels: (dtype, tp) -> its rows, from the top.
        output: file to write.
    """
    row = next(iter(panels.values()))[0]
    work = f"[{row['tokens']}, {row['vocab']}] logits"
    if row["hidden"] != "0":
        work = f"output layer [{row['tokens']}, {row['hidden']}] x {row['vocab']} and loss"
    if _is_emo(row):
        work += f" with cost rows of {row['cost_width']}"
    title = f"Forward + backward of {work}, {row['device']}: time relative to Megatron's plain"
    height = 0.36 * max(map(len, panels.values())) + 1.1
    _draw(panels, output, f"{title} cross-entropy", height, _draw_bars)


def draw_memories(panels: dict[Panel, list[Row]], output: Path) -> None:
    """Draw one picture of the memory; arguments as for `draw_times`."""
    row = next(iter(panels.values()))[0]
    work = f"output layer of {row['hidden']} x {row['vocab']} and loss"
    title = f"Peak memory of {work}, beyond inputs and their gradients, {row['device']}"
    _draw(panels, output, title, 3.4, _draw_lines)


def _draw(
    panels: dict[Panel, list[Row]],
    output: Path,
    title: str,
    height: float,
    draw_panel: Callable[[Axes, Sequence[Row]], None],
) -> None:
    """Draw the panels, two in a line, each `height` inches high."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(6.6 * columns, height * lines + 0.6), layout="constrained"
    )
    places = list(getattr(grid, "flat", [grid]))
    for axes, ((dtype, tp), rows) in zip(places, panels.items(), strict=False):
        draw_panel(axes, rows)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{dtype}, tensor parallel {tp}, threads per rank: {rows[0]['threads']}")
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, wrap=True)
    save(figure, output, dpi=130)


def _draw_bars(axes: Axes, rows: Sequence[Row]) -> None:
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


def _draw_lines(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw one line a loss, over the number of tokens."""
    others = iter(LINES)
    for name in dict.fromkeys(row["provider"] for row in rows):
        points = [row for row in rows if row["provider"] == name]
        tokens = [int(row["tokens"]) for row in points]
        mib = [float(row["extra_mib"]) for row in points]
        colour = OURS if name == "ours-linear" else next(others)
        axes.plot(tokens, mib, "o-", color=colour, label=_label(points[0]))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("MiB")
    axes.legend(frameon=False, fontsize=8)


def _is_emo(row: Row) -> bool:
    return row["cost_width"] != "0"


def _memory(row: Row) -> str:
    calls = int(row["collectives"])
    exchanged = f", {calls} collective{'s' * (calls != 1)}" if row["tp"] != "1" else ""
    return f"+{float(row['extra_mib']):.0f} MiB{exchanged}" if row["extra_mib"] else exchanged[2:]


def _label(row: Row) -> str:
    objective = OBJECTIVES.get(row["objective"])
    return f"{row['provider']} ({objective.label if objective else 'no loss'})"


def _colour(row: Row) -> str:
    if row["provider"].startswith("ours"):
        return OURS
    objective = OBJECTIVES.get(row["objective"])
    return OTHER if objective and not objective.is_cross_entropy else CROSS_ENTROPY


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--input", default=str(HERE / "results.csv"), help="table (default: results.csv beside it)")
    add("--output", default=str(HERE / "figures"), help="folder (default: figures beside it)")
    return parser


def plot(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags.

    Raises:
        ToolError: the table cannot be drawn, or a picture not be written.
    """
    folder = Path(args.output)
    times, memories = read(Path(args.input))
    folder.mkdir(parents=True, exist_ok=True)
    for pictures, draw in ((times, draw_times), (memories, draw_memories)):
        for name, panels in pictures.items():
            draw(panels, picture_file("--output", folder / name, [args.input]))
            print(folder / name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), plot, argv)


if __name__ == "__main__":
    main()
