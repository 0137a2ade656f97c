"""Draws training runs side by side: loss curves, and perplexity by token frequency.

    python tools/plot_runs.py runs/quickstart --output runs.png
    python tools/plot_runs.py runs/ce runs/mile --output runs.png

A run is a folder with TensorBoard events in tensorboard/ (or in itself) and, for the bars, the
evaluation.json of tools/evaluate.py; a folder of such folders stands for all of them. The curves
are the tag "lm loss", which is plain cross-entropy whatever objective trained the run, so they can
be compared; pale lines are the values of single steps, strong ones a running mean. The bars show
the perplexity on held-out data; their second row, the change against the first run given. A run
without the tag is left out, which a line on stderr says. Where runs have a run_record.json beside
their checkpoints, what differs between them is printed: flags, versions, commits, data, tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from tools.common.cli import new_parser, run_tool
from tools.common.picture import COLOURS, Bars, draw_groups, picture_file, save
from tools.evaluation.runs import (
    NoCurve,
    Run,
    differences,
    files_of,
    find_runs,
    read_record,
    read_run,
)

PROG = "tools/plot_runs.py"
BARS = {
    "ppl": "all tokens",
    "ppl_high": "frequent (80 %)",
    "ppl_medium": "medium (15 %)",
    "ppl_low": "rare (5 %)",
}
FINAL_STEPS = 10
_SMOOTHING_SHARE = 20


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and up to `reach` values on either side of it, [n] -> [n], fp64."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    starts, ends = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(runs: Sequence[Run], tag: str, output: Path) -> None:
    """Draw the picture.

    Args:
        runs: at least one; bars are drawn for those that have an evaluation.
        tag: what the curves are, for the axis.
        output: from `picture_file`.
    """
    evaluated = [run for run in runs if run.evaluation]
    colours = {run.name: COLOURS[i % len(COLOURS)] for i, run in enumerate(runs)}
    figure = plt.figure(figsize=(13.5 if evaluated else 7, 5.4), layout="constrained")
    grid = figure.add_gridspec(
        2, 2 if evaluated else 1, height_ratios=(3, 2), width_ratios=(1, 1.2)[: 1 + bool(evaluated)]
    )
    _draw_losses(figure.add_subplot(grid[:, 0]), runs, colours, tag)
    if evaluated:
        compared = len(evaluated) > 1
        absolute = figure.add_subplot(grid[0, 1] if compared else grid[:, 1])
        _draw_bars(absolute, evaluated, colours)
        if compared:
            _draw_changes(figure.add_subplot(grid[1, 1]), evaluated, colours)
    save(figure, output)


def _draw_losses(axes: Axes, runs: Sequence[Run], colours: dict[str, str], tag: str) -> None:
    """Draw the curve of each run."""
    for index, run in enumerate(runs):
        smooth = running_mean(run.losses, len(run.steps) // _SMOOTHING_SHARE)
        axes.plot(run.steps, run.losses, color=colours[run.name], alpha=0.25, linewidth=1)
        final = run.losses[-FINAL_STEPS:]
        label = f"{run.name}: {final.mean():.3f} (mean of last {len(final)})"
        # The first run is wide, so that it can be seen below others that hardly differ from it.
        width = 1.8 if index else 4.5
        axes.plot(run.steps, smooth, color=colours[run.name], linewidth=width, label=label)
    plain = tag == "lm loss"
    axes.set_title("Training loss" + ", plain cross-entropy for every run" * plain)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{tag} (nats per token)" if plain else tag)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False)


def _draw_bars(axes: Axes, runs: Sequence[Run], colours: dict[str, str]) -> None:
    """Draw the perplexities of each run."""
    values = [value for run in runs for value in (run.evaluation or {}).values()]
    smallest, largest = min(values), max(values)
    axes.set_title("Perplexity on held-out text, by token frequency (lower is better)")
    axes.set_ylabel("perplexity (log scale)")
    axes.set_yscale("log")
    _draw_groups(axes, runs, colours, lambda ppl: f"{ppl:.{0 if ppl >= 1000 else 1}f}")
    axes.legend(loc="upper left", frameon=False, ncols=len(runs), fontsize=9)
    # A log axis has no natural zero; room above for the figures and the legend.
    axes.set_ylim(smallest / 3, largest * 8)


def _draw_changes(axes: Axes, runs: Sequence[Run], colours: dict[str, str]) -> None:
    """Draw how the perplexities of the others differ from those of the first run, in percent."""
    base = runs[0].evaluation or {}
    changes = [
        run._replace(
            evaluation={
                key: 100 * (value / base[key] - 1)
                for key, value in (run.evaluation or {}).items()
                if key in base
            }
        )
        for run in runs[1:]
    ]
    axes.set_title(f"Change of perplexity against {runs[0].name} (below 0 is better)")
    axes.set_ylabel("change (%)")
    axes.axhline(0, color="black", linewidth=0.8)
    _draw_groups(axes, changes, colours, "{:+.1f} %".format)
    axes.margins(y=0.25)


def _draw_groups(
    axes: Axes, runs: Sequence[Run], colours: dict[str, str], form: Callable[[float], str]
) -> None:
    found = [(run.name, run.evaluation or {}) for run in runs]
    rows = [
        Bars(name, colours[name], [ppl.get(key, np.nan) for key in BARS]) for name, ppl in found
    ]
    draw_groups(axes, [*BARS.values()], rows, form, max(5, 9.5 - len(runs)))


def plot_runs(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags.

    Raises:
        ToolError: a run cannot be read, or the picture not be written.
    """
    folders = find_runs([Path(run) for run in args.runs])
    inputs = (file for folder in folders for file in files_of(folder))
    output = picture_file("--output", args.output, inputs)
    read = _read(folders, args.tag)
    if len({run.name for run in read.values()}) < len(read):
        read = {folder: run._replace(name=str(folder)) for folder, run in read.items()}
    records = {run.name: read_record(folder) for folder, run in read.items()}
    draw([*read.values()], args.tag, output)
    print(f"{args.output}: {len(read)} runs")
    print(table(differences({name: record for name, record in records.items() if record})), end="")


def _read(folders: Sequence[Path], tag: str) -> dict[Path, Run]:
    """Read the runs that have a curve, by their folders.

    Raises:
        ToolError: a file in a folder cannot be used, or no run has a curve.
    """
    read, left_out = {}, []
    for folder in folders:
        try:
            read[folder] = read_run(folder, tag)
        except NoCurve as error:
            left_out.append(error)
    if not read:
        raise left_out[0]
    for reason in left_out:
        print(f"{PROG}: left out {reason}", file=sys.stderr)
    return read


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, or of several")
    add("--output", required=True, help="picture to write (.png, .svg or .pdf)")
    add("--tag", default="lm loss", help="TensorBoard tag of the curves (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), plot_runs, argv)


if __name__ == "__main__":
    main()
