"""Proves and times this package on the GPU of this machine, in one command.

    make gpu                          or: python tools/bench/gpu.py

In this order, each with a log in the folder --logs: the tests of the kernels, compiled for this
card, against float64; those of the hook that only a card can show; the losses of given logits
beside those of other packages; training steps with and without the hook; the output layer and EMO.

Rows go to results.csv and train_steps.csv, pictures to figures/, and gpu.md tells it as tables:
what was run, what failed, what did not fit into --minutes. All is written after each part, so that
a run that is stopped has what it did until then. Where there is no GPU it says so, and that is all.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from tqdm import tqdm

from tools.bench.conditions import conditions
from tools.bench.training import end
from tools.common.cli import ToolError, new_parser, run_tool
from tools.common.files import write_whole
from tools.common.outputs import output_file

PROG = "tools/bench/gpu.py"
ROOT = Path(__file__).resolve().parents[2]
SIZES = ((8192, 131072), (4096, 16384), (8192, 32000))
Row = dict[str, str]


class Part(NamedTuple):
    """One command of the whole."""

    name: str
    words: list[str]
    """What follows the Python interpreter."""


def parts_of(output: Path) -> list[Part]:
    """Return what is run, what matters most first.

    Args:
        output: folder of the tables.
    """
    found = [
        Part("tests of the kernels", ["-m", "pytest", "-q", "tests/kernels"]),
        Part("tests that need a card", ["-m", "pytest", "-q", "tests/gpu"]),
    ]
    table = ["--output", str(output / "results.csv")]
    steps = ["--output", str(output / "train_steps.csv")]
    losses = [str(ROOT / "tools" / "bench" / "run.py"), *table]
    for dtype in ("bf16", "fp32"):
        for tokens, vocab in SIZES:
            size = ["--tokens", str(tokens), "--vocab", str(vocab), "--dtypes", dtype]
            found.append(Part(f"losses of [{tokens}, {vocab}] {dtype}", [*losses, *size]))
        if dtype == "bf16":
            script = str(ROOT / "tools" / "bench" / "train_step.py")
            words = [script, *steps, "--precision", "bf16", "--pairs", "40"]
            found.append(Part("training steps bf16", words))
            for flag in ("--hidden", "--cost-width"):
                found.append(Part(f"losses with {flag} 4096", [*losses, flag, "4096"]))
    return found


def run_parts(
    parts: Sequence[Part], logs: Path, seconds: float, done: Callable[[dict[str, str]], None]
) -> None:
    """Run the parts one after the other.

    Args:
        parts: commands.
        logs: folder, which exists, for a log of each.
        seconds: for all of them; one that runs then is ended, later ones are not begun.
        done: called after each part with what became of each so far, by name.
    """
    deadline = time.monotonic() + seconds
    outcomes = {part.name: "not run: stopped before" for part in parts}
    for part in tqdm(parts, "make gpu", unit="part", disable=None):
        left = deadline - time.monotonic()
        log = logs / f"{part.name.replace(' ', '_')}.log"
        outcomes[part.name] = run_part(part, log, left) if left > 0 else "not run: no time left"
        done(outcomes)


def run_part(part: Part, log: Path, seconds: float) -> str:
    """Run one part to its end, and return what became of it; its output is in the log."""
    start = time.monotonic()
    with log.open("wb") as sink:
        child = subprocess.Popen(
            [sys.executable, *part.words],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it ends with all that it has started
        )
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s: no time left; see {log}"
    finally:
        end(child)
    passed = time.monotonic() - start
    return f"failed with status {status}; see {log}" if status else f"done in {passed:.0f} s"


def report(outcomes: dict[str, str], rows: Iterable[Row], steps: Iterable[Row]) -> str:
    """Return gpu.md.

    Args:
        outcomes: of the parts, by name.
        rows: of results.csv, of one GPU like this.
        steps: of train_steps.csv, likewise.
    """
    lines = [f"# On one {conditions()['device']}", "", "| part | outcome |", "|---|---|"]
    lines += [f"| {name} | {outcome} |" for name, outcome in outcomes.items()]
    cases: dict[tuple[str, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:  # the last of each counts
        key = tuple(row[name] for name in ("dtype", "tokens", "vocab", "hidden", "cost_width"))
        phases = cases.setdefault(key, {}).setdefault(row["provider"], {})
        if row["phase"] in ("", "forward"):
            phases.clear()  # of an earlier run
        phases[row["phase"]] = row
    for key, losses in cases.items():
        lines += ["", *_table(key, losses)]
    lines += [
        f"\nTraining step, {row['precision']}, {row['pairs']} pairs: ratio {row['ratio_mean']}, "
        f"at most {row['ratio_bound']} with 95 % confidence."
        for row in steps
    ]
    return "\n".join(lines) + "\n"


def _table(key: Sequence[str], losses: dict[str, dict[str, Row]]) -> list[str]:
    dtype, tokens, vocab, hidden, cost_width = key
    title = f"[{tokens}, {vocab}] {dtype}"
    title += f", hidden {hidden}" if hidden != "0" else ""
    title += f", cost rows of {cost_width}" if cost_width != "0" else ""
    lines = [f"## {title}", ""]
    lines += ["| loss | ms | ms from a graph | to Megatron's | of a copy's speed | MiB |"]
    lines += ["|---|---|---|---|---|---|"]
    return lines + [_line(name, phases) for name, phases in losses.items()]


def _line(name: str, phases: dict[str, Row]) -> str:
    both, replayed = phases.get("both"), phases.get("replayed")
    if both is None:
        return f"| {name} | {next(iter(phases.values()))['status']} | | | | |"
    moved, copied = both["gb_per_s"], both["copy_gb_per_s"]
    speed = f"{float(moved) / float(copied):.2f}" if moved and copied else ""
    cells = [both["p50_ms"], replayed["p50_ms"] if replayed else "", both["ratio_to_megatron"]]
    return " | ".join([f"| {name}", *cells, speed, both["extra_mib"]]) + " |"


def _rows(path: Path) -> list[Row]:
    """Return the rows of a table that are of one GPU like this."""
    if not path.exists():
        return []
    device = conditions()["device"]
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [row for row in rows if (row["device"], row["tp"]) == (device, "1")]


def prove(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags.

    Raises:
        ToolError: a part failed, or the time is no time.
    """
    if not args.minutes > 0:
        raise ToolError(f"--minutes is {args.minutes}; expected more than 0")
    if not torch.cuda.is_available():
        print(f"{PROG}: not run: torch finds no GPU here (torch {torch.__version__})")
        return
    output, logs = Path(args.output), Path(args.logs)
    for folder in (output, logs):
        folder.mkdir(parents=True, exist_ok=True)
    told = output_file("--output", output / "gpu.md", [])
    outcomes: dict[str, str] = {}

    def tell(found: dict[str, str]) -> None:
        outcomes.update(found)
        rows, steps = _rows(output / "results.csv"), _rows(output / "train_steps.csv")
        write_whole(told, report(outcomes, rows, steps))

    run_parts(parts_of(output), logs, 60 * args.minutes, tell)
    words = [str(ROOT / "tools" / "bench" / "plot.py"), "--input", str(output / "results.csv")]
    drawn = Part("pictures", [*words, "--output", str(output / "figures")])
    tell({drawn.name: run_part(drawn, logs / "pictures.log", 120)})
    print(f"{told}: written")
    if failed := [name for name, outcome in outcomes.items() if outcome.startswith("failed")]:
        raise ToolError(f"{', '.join(failed)} failed; see {told}")


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="for all parts (default: %(default)s)")
    add(
        "--output",
        default=str(Path(__file__).parent),
        help="folder of the tables (default: that of this file)",
    )
    add("--logs", default="runs/gpu", help="folder of the logs (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), prove, argv)


if __name__ == "__main__":
    main()
