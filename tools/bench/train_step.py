"""Times training steps with the objective beside steps with Megatron's own cross-entropy.

    python tools/bench/train_step.py                      100 pairs in fp32
    python tools/bench/train_step.py --precision bf16

One real training of the quickstart's model on Megatron's mock data, through torchrun, as the
quickstart trains: on CPUs where there is no GPU. Before each step the hook is installed or removed,
so that steps come in pairs, one as the launcher runs it and one as Megatron is without this
package; which of a pair comes first is drawn, as often this one as that. Other work on the machine
meets both alike: the ratios of the pairs are what counts, not the milliseconds. A step is
Megatron's `train_step` on the slowest rank: data, forward, backward, optimizer, reduction of the
reported figures. The first pairs are not counted.

Appended to the table, one row a run: host and hook are the median step of each kind;
ratio_mean is the geometric mean of hook / host over the pairs, and ratio_bound its one-sided upper
95 % confidence bound (percentile bootstrap of the mean log-ratio, 10,000 resamples); p20, p50 and
p80 are of the pairs' ratios; load is the mean of one minute (os.getloadavg) before the start;
threads are those of each rank; tokens are those of one step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from tqdm import tqdm

from megatron_mile.objectives import NEED_INPUTS, OBJECTIVES
from tools.bench.conditions import conditions
from tools.bench.table import append, read_whole
from tools.bench.training import MODEL, SCHEDULE, VOCABULARY, layout_flags, run_training, torchrun
from tools.common.cli import ToolError, new_parser, run_tool
from tools.common.outputs import output_file

PROG = "tools/bench/train_step.py"
WARM_UP_PAIRS = 4
RESAMPLES = 10_000
PRECISIONS = {"fp32": [], "bf16": ["--bf16"]}
FIGURES = ("host_ms", "hook_ms", "ratio_mean", "ratio_bound", "ratio_p20", "ratio_p50", "ratio_p80")
COLUMNS = (
    *("objective", "device", "precision", "layers", "hidden", "tokens", "vocab", "tp", "threads"),
    *("pairs", *FIGURES, "load", "torch", "triton", "megatron_core", "commit", "date"),
)


def draw_order(pairs: int) -> list[str]:
    """Return the kinds of 2 * pairs steps: of each two pairs, one begins with either kind."""
    draw = random.Random(0)
    order: list[str] = []
    for _ in range(0, pairs, 2):
        first = draw.sample(["host", "hook"], 2)
        order += [*first, *reversed(first)]
    return order[: 2 * pairs]


def train(order: Sequence[str], precision: str, objective: str) -> dict[str, Any]:
    """Train with the steps in this order, all of them timed.

    Returns:
        What paired_steps.py says of its result.

    Raises:
        ToolError: the training failed or hung; the message names its log.
    """
    folder = Path(tempfile.mkdtemp(prefix="train_step_"))
    log, result = folder / "training.log", folder / "result.json"
    command = [*torchrun(), str(Path(__file__).with_name("paired_steps.py"))]
    command += [str(result), ",".join(order), "--mile-objective", objective, *layout_flags()]
    command += [*MODEL, *SCHEDULE, *PRECISIONS[precision], "--mock-data"]
    command += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY)]
    command += ["--train-iters", str(len(order))]
    with tqdm(total=len(order), desc=precision, unit="step", leave=False, disable=None) as bar:

        def follow(line: str) -> None:
            if match := re.search(r" iteration +(\d+)/", line):
                bar.update(int(match[1]) - bar.n)

        run_training(command, log, follow)
    content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return content


def figures(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return `FIGURES` of steps in pairs, each with its `kind` and its `seconds`."""
    ms = {
        kind: 1e3 * np.array([step["seconds"] for step in steps if step["kind"] == kind])
        for kind in ("host", "hook")
    }
    logs = np.log(ms["hook"] / ms["host"])
    resamples = np.random.default_rng(0).choice(logs, (RESAMPLES, len(logs)))
    bound = np.percentile(resamples.mean(axis=1), 95)
    medians = [float(np.median(ms[kind])) for kind in ("host", "hook")]
    ratios = np.exp([logs.mean(), bound, *np.percentile(logs, [20, 50, 80])])
    return dict(zip(FIGURES, [*medians, *ratios.tolist()], strict=True))


def show(row: dict[str, Any]) -> None:
    """Print the figures of a run."""
    print(
        f"training step of {row['tokens']} tokens, {row['layers']} layers, hidden {row['hidden']}, "
        f"vocabulary {row['vocab']}, {row['precision']}, tp {row['tp']}, {row['pairs']} pairs\n"
        f"  Megatron's own loss  {row['host_ms']:7.1f} ms\n"
        f"  {row['objective'] + ' by the hook':19}  {row['hook_ms']:7.1f} ms\n"
        f"  ratio {row['ratio_mean']:.3f}, at most {row['ratio_bound']:.3f} with 95 % confidence; "
        f"p20 {row['ratio_p20']:.3f}, p50 {row['ratio_p50']:.3f}, p80 {row['ratio_p80']:.3f}"
    )


def run(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags.

    Raises:
        ToolError: a flag cannot be used, the training failed, or the output is no table of ours.
    """
    if args.pairs < 2:
        raise ToolError(f"--pairs is {args.pairs}; expected 2 or more")
    output = output_file("--output", args.output, [])
    read_whole(output, COLUMNS)  # fails now rather than after the minutes of training
    row = {**conditions(), "load": os.getloadavg()[0]}
    row |= {"pairs": args.pairs, "objective": args.objective}
    order = draw_order(WARM_UP_PAIRS + args.pairs)
    result = train(order, args.precision, args.objective)
    row |= {**result["model"], "threads": result["threads"]}
    row |= figures(result["steps"][2 * WARM_UP_PAIRS :])
    append(output, COLUMNS, [row])
    show(row)
    print(f"{output}: figures appended")


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--pairs", type=int, default=100, help="pairs that count (default: %(default)s)")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="(default: %(default)s)")
    choices = [name for name in OBJECTIVES if name not in NEED_INPUTS]
    add("--objective", choices=choices, default="mile", help="(default: %(default)s)")
    default = Path(__file__).with_name("train_steps.csv")
    add(
        "--output",
        default=str(default),
        help=f"CSV to append to (default: {default.name} beside it)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    # As Ctrl-C does, so that the ranks end with this process.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    run_tool(command_line(), run, argv)


if __name__ == "__main__":
    main()
