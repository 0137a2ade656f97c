"""Draws training runs side by side: loss curves, and perplexity by token frequency.

    python tools/plot_runs.py runs/quickstart --output runs.png
    python tools/plot_runs.py runs/ce runs/mile --output runs.png

A run is a folder with TensorBoard events in tensorboard/ (or in itself) and, for the bars, the
evaluation.json of tools/evaluate.py; a folder of such folders stands for all of them. The curves
are the tag "lm loss", which is plain cross-entropy whatever objective trained the run, so they can
be compared; pale lines are the values of single steps, strong ones a running mean. The bars show
the perplexity on held-out data; their second row, the change against the first run given.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from _cli import ToolError, one_line_errors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PROG = "tools/plot_runs.py"
NAMES = {"ce": "cross-entropy", "mile": "MiLe Loss", "focal": "Focal Loss"}
BARS = {
    "ppl": "all tokens",
    "ppl_high": "frequent\n(80 % of text)",
    "ppl_medium": "medium\n(15 %)",
    "ppl_low": "rare\n(5 %)",
}
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SMOOTHING_SHARE = 20


class Run(NamedTuple):
    """What is drawn of one run."""

    name: str
    steps: np.ndarray
    """[n], int64."""
    losses: np.ndarray
    """[n], fp64, nats."""
    evaluation: dict[str, Any] | None
    """The content of evaluation.json, if there is one."""


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """List the run folders that the given folders name.

    Args:
        folders: run folders, or folders of run folders.

    Returns:
        The run folders in the given order, those within one folder sorted by name.

    Raises:
        ToolError: a folder is missing, or holds no run.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise ToolError(f"no folder {folder}; expected the folder of a run")
        below = sorted(path for path in folder.iterdir() if path.is_dir() and _events(path))
        found = [folder] if _events(folder) else below
        if not found:
            raise ToolError(
                f"no TensorBoard events in {folder}, its tensorboard/ or its folders; train with "
                "--tensorboard-dir"
            )
        runs += found
    return list(dict.fromkeys(runs))


def _events(run: Path) -> Path | None:
    """Return the folder that holds a run's event files."""
    for folder in (run / "tensorboard", run):
        if any(folder.glob("events.out.tfevents.*")):
            return folder
    return None


def read_run(folder: Path, tag: str) -> Run:
    """Read one run.

    Args:
        folder: from `find_runs`.
        tag: TensorBoard tag of the curve.

    Raises:
        ToolError: the run has no such tag, or its evaluation.json is damaged.
    """
    events = EventAccumulator(str(_events(folder)), size_guidance={"scalars": 0}).Reload()
    tags = sorted(events.Tags()["scalars"])
    if tag not in tags:
        raise ToolError(f"{folder}: no values for the tag {tag!r}; it has {', '.join(tags)}")
    # A resumed run has steps twice: the later value is the one that the training went on with.
    values = {scalar.step: scalar.value for scalar in events.Scalars(tag)}
    steps = np.array(sorted(values))
    name = folder.resolve().name
    losses = np.array([values[step] for step in steps])
    return Run(NAMES.get(name, name), steps, losses, _evaluation(folder))


def _evaluation(folder: Path) -> dict[str, Any] | None:
    """Read the evaluation of a run, if it has one."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in BARS if content.get(key) is not None}
    except (ValueError, AttributeError) as error:
        raise ToolError(f"{path}: not an evaluation ({error}); run tools/evaluate.py") from error


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the `width - 1` before it (fewer at the start), [n] -> [n]."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(runs: Sequence[Run], tag: str, output: Path) -> None:
    """Draw the picture.

    Args:
        runs: at least one; bars are drawn for those that have an evaluation.
        tag: what the curves are, for the axis.
        output: file to write, in the format that its suffix names.
    """
    evaluated = [run for run in runs if run.evaluation]
    colours = {run.name: COLOURS[i % len(COLOURS)] for i, run in enumerate(runs)}
    figure = plt.figure(figsize=(12.5 if evaluated else 7, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 2 if evaluated else 1, height_ratios=(3, 2))
    _draw_losses(figure.add_subplot(grid[:, 0]), runs, colours, tag)
    if evaluated:
        compared = len(evaluated) > 1
        absolute = figure.add_subplot(grid[0, 1] if compared else grid[:, 1])
        _draw_bars(absolute, evaluated, colours)
        if compared:
            _draw_changes(figure.add_subplot(grid[1, 1]), evaluated, colours)
    partial = output.with_name(f"{output.stem}.partial.{os.getpid()}{output.suffix}")
    try:
        figure.savefig(partial, dpi=150)
        partial.replace(output)
    except ValueError as error:
        raise ToolError(f"--output {output}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
        plt.close(figure)


def _draw_losses(axes: Axes, runs: Sequence[Run], colours: dict[str, str], tag: str) -> None:
    """Draw the curve of each run."""
    for run in runs:
        width = max(1, len(run.steps) // _SMOOTHING_SHARE)
        smooth = running_mean(run.losses, width)
        axes.plot(run.steps, run.losses, color=colours[run.name], alpha=0.25, linewidth=1)
        label = f"{run.name}: {smooth[-1]:.3f} at the end"
        axes.plot(run.steps, smooth, color=colours[run.name], linewidth=2, label=label)
    plain = tag == "lm loss"
    axes.set_title("Training loss" + ", plain cross-entropy for every run" * plain)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{tag} (nats per token)" if plain else tag)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False)


def _draw_bars(axes: Axes, runs: Sequence[Run], colours: dict[str, str]) -> None:
    """Draw the perplexities of each run."""
    axes.set_title("Perplexity on held-out text, by token frequency (lower is better)")
    axes.set_ylabel("perplexity (log scale)")
    axes.set_yscale("log")
    _draw_groups(axes, runs, colours, "{:,.4g}")
    # A log axis has no natural zero; room above for the figures.
    values = [run.evaluation[key] for run in runs if run.evaluation for key in run.evaluation]
    axes.set_ylim(min(values) / 3, max(values) * 2)


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
    axes.set_title(f"Change against {runs[0].name} (below 0 is better)")
    axes.set_ylabel("change of perplexity (%)")
    axes.axhline(0, color="black", linewidth=0.8)
    _draw_groups(axes, changes, colours, "{:+.1f} %")
    axes.margins(y=0.25)


def _draw_groups(axes: Axes, runs: Sequence[Run], colours: dict[str, str], form: str) -> None:
    """Draw a group of bars for each of `BARS`, one bar a run, its value written at its end."""
    width = 0.8 / len(runs)
    for index, run in enumerate(runs):
        values = [(run.evaluation or {}).get(key, np.nan) for key in BARS]
        places = np.arange(len(BARS)) + (index - (len(runs) - 1) / 2) * width
        bars = axes.bar(places, values, width * 0.92, color=colours[run.name], label=run.name)
        texts = ["" if np.isnan(value) else form.format(value) for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=8)
    axes.set_xticks(range(len(BARS)), list(BARS.values()))
    axes.spines[["top", "right"]].set_visible(False)


def plot_runs(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags of `parse_args`.

    Raises:
        ToolError: a run cannot be read, or the picture not be written.
    """
    folders = find_runs([Path(run) for run in args.runs])
    runs = [read_run(folder, args.tag) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        pairs = zip(runs, folders, strict=True)
        runs = [run._replace(name=str(folder)) for run, folder in pairs]
    draw(runs, args.tag, Path(args.output))
    print(f"{args.output}: {len(runs)} runs")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (default: that of the process)."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, or of several")
    add("--output", required=True, help="picture to write (.png, .svg or .pdf)")
    add("--tag", default="lm loss", help="TensorBoard tag of the curves (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    args = parse_args(argv)
    with one_line_errors(PROG):
        plot_runs(args)


if __name__ == "__main__":
    main()
