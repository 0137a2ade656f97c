"""The quickstart's folder: new, or one of its own replaced, and nothing else ever deleted.

Also what the run leaves behind for its reader: summary.json and the table.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _corpus import QuickstartError

from megatron_mile.objectives import OBJECTIVES

MARKER = ".megatron_mile_quickstart"
BUCKETS = ("high", "medium", "low")
SUMMARY, PICTURE = "summary.json", "quickstart.png"
_PARTIAL = f"{SUMMARY}.partial"
SHARED = ("logs", "data")


def check_folder(out: Path, overwrite: bool) -> None:
    """Refuse a folder that may not be replaced.

    Args:
        out: the run's folder; it need not exist.
        overwrite: whether an earlier run of the quickstart may be replaced.

    Raises:
        QuickstartError: it holds an earlier run and `overwrite` is not set, or anything that is
            not the quickstart's.
    """
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    ours = {MARKER, SUMMARY, _PARTIAL, PICTURE, *SHARED, *OBJECTIVES} if MARKER in held else set()
    others = [name for name in held if name not in ours]
    if out.exists() and not out.is_dir():
        raise QuickstartError(f"--out {out} is a file; choose a new folder")
    if others:
        raise QuickstartError(f"--out {out} holds other files ({others[0]}); choose a new folder")
    if held and not overwrite:
        raise QuickstartError(f"--out {out} holds an earlier run; give --overwrite or a new --out")


def prepare_folder(out: Path, objectives: Sequence[str]) -> None:
    """Empty a folder that `check_folder` let pass, or make it, and mark it as the quickstart's.

    Args:
        out: the run's folder.
        objectives: names of the folders to make for the runs.
    """
    for path in out.iterdir() if out.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:  # it stays: an interrupted removal must still be ours
            path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("Made by examples/quickstart.py; its --overwrite replaces it all.\n")
    for folder in (*SHARED, *objectives):
        (out / folder).mkdir()


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, whole or not at all."""
    partial = out / _PARTIAL
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    partial.replace(out / SUMMARY)


def report(summary: dict[str, Any], out: Path) -> str:
    """Lay out the results for people: table, what it means, where to look further."""
    rows = [("objective", "first", "final", "all", *BUCKETS)]
    for name, result in summary["objectives"].items():
        values = [result[key] for key in ("first_lm_loss", "final_lm_loss", "ppl")]
        values += [result[f"ppl_{bucket}"] for bucket in BUCKETS]
        # A bucket without a held-out token has no perplexity.
        rows.append((name, *("-" if value is None else f"{value:.2f}" for value in values)))
    table = "\n".join(f"{row[0]:<10}" + "".join(f"{x:>10}" for x in row[1:]) for row in rows)
    return f"""
{"":10}{"lm loss":>20}{"held-out perplexity by token frequency":>40}
{table}

A demonstration at toy size, not evidence: {summary["steps"]} steps, one seed.
The run shows that the whole way works, not which objective is better.
({summary["device"]}, tensor parallel {summary["tp"]}, {summary["seconds"]:.0f} s)

  summary      {out / SUMMARY}
  picture      {out / PICTURE}
  TensorBoard  {Path(sys.executable).parent / "tensorboard"} --logdir {out}"""
