"""Times MiLe Loss beside Megatron's cross-entropy and other packages, and appends the figures.

    python tools/bench/run.py                 fp32 and bf16, on a GPU bf16
    python tools/bench/run.py --tp 2          vocabulary shared by two ranks (gloo on CPUs)
    python tools/bench/run.py --hidden 512    the output layer too: hidden states and weight given
    python tools/bench/run.py --cost-width 512    EMO with cost rows of 512, beside its dense form
    python tools/bench/run.py --settings objective=deft label_smoothing=0.1 --output deft.csv

Every loss is compared with a float64 oracle on the timed shapes first; one that is wrong is not
timed. They take turns, round after round, so that other work on the machine meets all alike: the
ratios to Megatron's plain cross-entropy of the same round are what counts, not the milliseconds.
With --hidden, "gemms" are the three products of the output layer alone, in which no loss hides: a
floor for the time, not checked, since there is nothing to be right or wrong.

Phases: forward, backward, both, and on a GPU both once more from a CUDA graph ("replayed"), where
no launch waits for Python.

Columns: p20, p50, p80 and min are of one call; ratio_to_megatron and ratio_to_gemms are medians of
the rounds' ratios, ratio_of_minima is to Megatron; gb_per_s counts what must be moved (forward: the
logits read once; backward: read once, written once) and copy_gb_per_s is a copy of the logits
measured in the same rounds; extra_mib is the peak over forward and backward beyond the inputs and,
with --hidden, beyond the gradients of hidden states and weight that are left at the end; load is
the mean of one minute (os.getloadavg) before the case began, with what earlier cases left of it;
loss_error and gradient_error (of the worst gradient) are relative; threads are those of each rank;
hidden is 0 where logits were given, cost_width 0 where EMO was not timed. An empty cell was not
measured, and "status" says why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from tools.bench.case import DTYPES, Case, config_of
from tools.bench.conditions import conditions
from tools.bench.provider import BASELINE, FLOOR
from tools.bench.providers import providers
from tools.bench.rounds import run_case
from tools.bench.rows import COLUMNS, rows_of_case, show
from tools.bench.table import append, read_whole
from tools.common.cli import ToolError, new_parser, run_tool
from tools.common.outputs import output_file

PROG = "tools/bench/run.py"
DEFAULT_TABLE = Path(__file__).with_name("results.csv")


def run(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags.

    Raises:
        ToolError: the flags do not fit together or the machine, or the output is no table of ours.
    """
    _check_flags(args)
    output = output_file("--output", args.output, [])
    read_whole(output, COLUMNS)  # fails now rather than after the minutes of measuring
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = max(1, args.threads // args.tp)
    settings = " ".join(args.settings or ())
    size = args.tokens, args.vocab, args.tp, threads, device, args.hidden, args.cost_width, settings
    known = providers(args.hidden, args.cost_width, settings)
    references = [name for name in (BASELINE, FLOOR) if name in known]
    names = list(dict.fromkeys([*references, *(args.providers or known)]))
    where = conditions()
    for dtype in args.dtypes:
        case = Case(dtype, *size)
        load = {"load": os.getloadavg()[0], "rounds": args.rounds}
        results, copies = run_case(case, names, args.rounds)
        ordered = {name: results[name] for name in known if name in results}
        rows = rows_of_case(case, ordered, copies, where | load)
        append(output, COLUMNS, rows)
        show(case, rows)
    print(f"\n{output}: figures appended")


def _check_settings(args: argparse.Namespace) -> None:
    """Stop where --settings does not fit; its rows would hide others of one case in a picture."""
    if args.hidden or args.cost_width or Path(args.output).resolve() == DEFAULT_TABLE.resolve():
        raise ToolError(
            "--settings is for the losses of logits, without --hidden and --cost-width, and for a "
            "table of its own; add --output FILE"
        )
    try:
        config_of(" ".join(args.settings))
    except ValueError as error:
        raise ToolError(f"--settings: {error}") from error


def _check_flags(args: argparse.Namespace) -> None:
    if args.settings:
        _check_settings(args)
    if args.hidden < 0:
        raise ToolError(f"--hidden is {args.hidden}; expected 0 (logits are given) or more")
    if args.cost_width < 0 or (args.cost_width and args.hidden):
        raise ToolError(
            f"--cost-width is {args.cost_width} and --hidden {args.hidden}; expected one of them, "
            "or 0 for both (the losses of logits)"
        )
    known = providers(args.hidden, args.cost_width, " ".join(args.settings or ()))
    unknown = set(args.providers or ()) - set(known)
    if unknown:
        workload = f"--hidden {args.hidden}"
        if args.cost_width:
            workload = f"--cost-width {args.cost_width}"
        raise ToolError(
            f"--providers {', '.join(sorted(unknown))}: with {workload} choose from "
            f"{', '.join(known)}"
        )
    small = [key for key in ("tp", "tokens", "vocab", "threads", "rounds") if vars(args)[key] < 1]
    if small:
        raise ToolError(f"--{small[0]} is {vars(args)[small[0]]}; expected 1 or more")
    if args.vocab % args.tp:
        raise ToolError(
            f"--vocab {args.vocab} is not divisible by --tp {args.tp}; Megatron's loss needs equal "
            "shards, so change one of them"
        )
    if torch.cuda.is_available() and args.tp > torch.cuda.device_count():
        raise ToolError(f"--tp {args.tp} with {torch.cuda.device_count()} GPUs; use one per rank")
    if known[BASELINE].obstacle(Case("fp32", 1, 1, 1, 1, "cpu")):
        raise ToolError("megatron-core is not installed; install the extra: pip install .[train]")


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    gpu = torch.cuda.is_available()
    dtypes = ["bf16"] if gpu else list(DTYPES)
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=8192 if gpu else 2048, help="(default here: %(default)s)")
    add("--vocab", type=int, default=131072 if gpu else 32000, help="(default here: %(default)s)")
    add(
        "--hidden",
        type=int,
        default=0,
        help="size of hidden states: time the output layer and the loss (default 0: of logits)",
    )
    add(
        "--cost-width",
        type=int,
        default=0,
        help="width of a cost matrix: time EMO of logits and that matrix (default 0: MiLe Loss)",
    )
    add("--dtypes", nargs="+", choices=list(DTYPES), default=dtypes, help="(default: %(default)s)")
    add("--tp", type=int, default=1, help="ranks that share the vocabulary (default: %(default)s)")
    add(
        "--threads", type=int, default=os.cpu_count() or 1, help="of all ranks (default: all cores)"
    )
    add("--rounds", type=int, default=11, help="timed calls of each loss (default: %(default)s)")
    names = [", ".join(providers(*workload)) for workload in ((0, 0), (1, 0), (0, 1))]
    help_ = f"some of {names[0]}; with --hidden {names[1]}; with --cost-width {names[2]}"
    add("--providers", nargs="+", help=f"{help_} (default: all)")
    add(
        "--settings",
        nargs="+",
        metavar="NAME=VALUE",
        help="settings of ObjectiveConfig to time this package with, beside Megatron's "
        "cross-entropy (default: MiLe Loss)",
    )
    add(
        "--output",
        default=str(DEFAULT_TABLE),
        help="CSV to append to (default: results.csv beside it)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), run, argv)


if __name__ == "__main__":
    main()
