"""Times MiLe Loss beside Megatron's cross-entropy and other packages, and appends the figures.

    python tools/bench/run.py                 fp32 and bf16, on a GPU bf16
    python tools/bench/run.py --tp 2          vocabulary shared by two ranks (gloo on CPUs)

Every loss is compared with a float64 oracle on the timed shapes first; one that is wrong is not
timed. They take turns, round after round, so that other work on the machine meets all alike: the
ratios to Megatron's plain cross-entropy of the same round are what counts, not the milliseconds.

Columns: p20, p50, p80 and min are of one call; ratio_to_megatron is the median of the rounds'
ratios, ratio_of_minima what its name says; gb_per_s counts what must be moved (forward: the logits
read once; backward: read once, written once) and copy_gb_per_s is a copy of the logits measured
in the same rounds; extra_mib is the peak beyond the inputs over forward and backward; load is the
mean of one minute (os.getloadavg) before the case began, with what earlier cases left of it;
loss_error and gradient_error are relative; threads are those of each rank. An empty cell was not
measured, and "status" says why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The package of this checkout, and the modules that the tools share.
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _case import DTYPES, Case  # noqa: E402
from _cli import ToolError, new_parser, one_line_errors  # noqa: E402
from _conditions import conditions  # noqa: E402
from _measure import PHASES  # noqa: E402
from _providers import BASELINE, PROVIDERS  # noqa: E402
from _rounds import run_case  # noqa: E402
from _table import append, read_whole  # noqa: E402

PROG = "tools/bench/run.py"
FIGURES = ("p20_ms", "p50_ms", "p80_ms", "min_ms", "ratio_to_megatron", "ratio_of_minima")
COLUMNS = (
    *("provider", "objective", "status", "device", "dtype", "tokens", "vocab", "tp", "threads"),
    *("phase", "rounds", *FIGURES, "gb_per_s", "copy_gb_per_s", "extra_mib", "collectives"),
    *("loss_error", "gradient_error", "load", "torch", "triton", "megatron_core", "commit", "date"),
)
# Traversals of the logits that each phase cannot do without.
_TRAVERSALS = {"forward": 1, "backward": 2, "both": 3}


def rows_of_case(
    case: Case, results: dict[str, Any], copies: Sequence[float], conditions: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the table's rows of one case: one per phase of a timed provider, else one.

    Args:
        case: what was run.
        results: as `run_case` returns them.
        copies: ms of the copies.
        conditions: columns that all rows share.
    """
    rows = []
    shared = conditions | case._asdict() | {"device": conditions["device"]}
    baseline = results.get(BASELINE, {}).get("ms")
    for name, result in results.items():
        row = shared | {"provider": name, "objective": PROVIDERS[name].objective}
        row |= {k: v for k, v in result.items() if k not in ("ms", "collectives")}
        if "ms" not in result:
            rows.append(row)
            continue
        row["copy_gb_per_s"] = 2e-6 * case.shard_bytes / np.median(copies)
        for phase in PHASES:
            figures = _figures(result["ms"][phase], baseline and baseline[phase])
            speed = 1e-6 * _TRAVERSALS[phase] * case.shard_bytes / figures["p50_ms"]
            collectives = result["collectives"][phase]
            rows.append(
                row | figures | {"phase": phase, "gb_per_s": speed, "collectives": collectives}
            )
    return rows


def _figures(ms: Sequence[float], baseline: Sequence[float] | None) -> dict[str, float]:
    """Return `FIGURES` of one phase; the ratios only if there is a baseline."""
    values = [*np.percentile(ms, [20, 50, 80]), min(ms)]
    if baseline:
        values += [np.median(np.divide(ms, baseline)), min(ms) / min(baseline)]
    return dict(zip(FIGURES, values, strict=False))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the phase "both" of each provider, and why the others have no figures."""
    print(
        f"{'loss':19} {'p50 ms':>8} {'min ms':>8} {'ratio':>6} {'of min':>6} {'GB/s':>7} ", end=""
    )
    print(f"{'copy':>7} {'MiB':>7} {'coll.':>5}")
    for row in rows:
        if row.get("phase") == "both":
            keys = ("p50_ms", "min_ms", "ratio_to_megatron", "ratio_of_minima", "gb_per_s")
            cells = [row.get(key, float("nan")) for key in (*keys, "copy_gb_per_s", "extra_mib")]
            widths = zip(cells, (8, 8, 6, 6, 7, 7, 7), (1, 1, 2, 2, 1, 1, 1), strict=True)
            numbers = " ".join(f"{cell:{width}.{digits}f}" for cell, width, digits in widths)
            print(f"{row['provider']:19} {numbers} {row['collectives']:5}")
        elif "phase" not in row:
            print(f"{row['provider']:19} {row['status']}")


def run(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags of `parse_args`.

    Raises:
        ToolError: the flags do not fit together or the machine, or the output is no table of ours.
    """
    _check_flags(args)
    output = Path(args.output)
    read_whole(output, COLUMNS)  # fails now rather than after the minutes of measuring
    names = list(dict.fromkeys([BASELINE, *(args.providers or PROVIDERS)]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = conditions()
    for dtype in args.dtypes:
        threads = max(1, args.threads // args.tp)
        case = Case(dtype, args.tokens, args.vocab, args.tp, threads, device)
        load = {"load": os.getloadavg()[0], "rounds": args.rounds}
        results, copies = run_case(case, names, args.rounds)
        ordered = {name: results[name] for name in PROVIDERS if name in results}
        rows = rows_of_case(case, ordered, copies, where | load)
        append(output, COLUMNS, rows)
        print(f"\n[{case.tokens}, {case.vocab}] {dtype}, tp {case.tp}, forward + backward")
        show(rows)
    print(f"\n{output}: figures appended")


def _check_flags(args: argparse.Namespace) -> None:
    unknown = set(args.providers or ()) - set(PROVIDERS)
    if unknown:
        raise ToolError(
            f"--providers {', '.join(sorted(unknown))}: choose from {', '.join(PROVIDERS)}"
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
    if PROVIDERS[BASELINE].obstacle(Case("fp32", 1, 1, 1, 1, "cpu")):
        raise ToolError("megatron-core is not installed; install the extra: pip install .[train]")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (default: that of the process)."""
    gpu = torch.cuda.is_available()
    dtypes = ["bf16"] if gpu else list(DTYPES)
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=8192 if gpu else 2048, help="(default here: %(default)s)")
    add("--vocab", type=int, default=131072 if gpu else 32000, help="(default here: %(default)s)")
    add("--dtypes", nargs="+", choices=list(DTYPES), default=dtypes, help="(default: %(default)s)")
    add("--tp", type=int, default=1, help="ranks that share the vocabulary (default: %(default)s)")
    add(
        "--threads", type=int, default=os.cpu_count() or 1, help="of all ranks (default: all cores)"
    )
    add("--rounds", type=int, default=11, help="timed calls of each loss (default: %(default)s)")
    add("--providers", nargs="+", help=f"some of {', '.join(PROVIDERS)} (default: all)")
    default = Path(__file__).with_name("results.csv")
    add("--output", default=str(default), help="CSV to append to (default: results.csv beside it)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    args = parse_args(argv)
    with one_line_errors(PROG):
        run(args)


if __name__ == "__main__":
    main()
