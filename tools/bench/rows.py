"""The table of the losses: its rows, and what is printed of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.bench.case import Case
from tools.bench.provider import BASELINE, FLOOR
from tools.bench.providers import providers

FIGURES = ("p20_ms", "p50_ms", "p80_ms", "min_ms", "ratio_to_megatron", "ratio_of_minima")
COLUMNS = (
    *("provider", "objective", "status", "device", "dtype", "tokens", "hidden"),
    *("cost_width", "vocab", "tp", "threads", "phase", "rounds", *FIGURES),
    *("ratio_to_gemms", "gb_per_s", "copy_gb_per_s"),
    *("extra_mib", "collectives", "loss_error", "gradient_error", "load"),
    *("torch", "triton", "megatron_core", "commit", "date"),
)
# Traversals of the logits that each phase cannot do without.
_TRAVERSALS = {"forward": 1, "backward": 2, "both": 3, "replayed": 3}
# Title, column and digits of what is printed of each workload.
_RATIOS = (("ratio", "ratio_to_megatron", 2), ("of min", "ratio_of_minima", 2))
_SPEED = (("GB/s", "gb_per_s", 1), ("copy", "copy_gb_per_s", 1))
_TO_GEMMS = (("/gemms", "ratio_to_gemms", 2),)


def rows_of_case(
    case: Case, results: dict[str, Any], copies: Sequence[float], conditions: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the table's rows of one case: one per phase of a timed provider, else one.

    Args:
        case: what was run.
        results: as `run_case` returns them.
        copies: ms of copying the logits; none where they are not given.
        conditions: columns that all rows share.
    """
    rows = []
    shared = conditions | case._asdict() | {"device": conditions["device"]}
    del shared["settings"]  # they are the name of the objective
    for name, result in results.items():
        row = shared | {
            "provider": name,
            "objective": providers(case.hidden, case.cost_width, case.settings)[name].objective,
        }
        row |= {k: v for k, v in result.items() if k not in ("ms", "collectives")}
        if "ms" not in result:
            rows.append(row)
            continue
        for phase in result["ms"]:
            figures = {"phase": phase, "collectives": result["collectives"][phase]}
            figures |= _times(name, phase, results)
            if copies:
                figures |= _speeds(case, phase, figures["p50_ms"], copies)
            rows.append(row | figures)
    return rows


def _times(name: str, phase: str, results: dict[str, Any]) -> dict[str, float]:
    """Return `FIGURES` of one phase and the ratio to the GEMMs, as far as there are others."""
    timed = {other: result.get("ms", {}) for other, result in results.items()}
    ms = {other: times[phase] for other, times in timed.items() if phase in times}
    mine, baseline = ms[name], ms.get(BASELINE)
    values = [*np.percentile(mine, [20, 50, 80]), min(mine)]
    if baseline:
        values += [np.median(np.divide(mine, baseline)), min(mine) / min(baseline)]
    figures = dict(zip(FIGURES, values, strict=False))
    if FLOOR in ms:
        figures["ratio_to_gemms"] = float(np.median(np.divide(mine, ms[FLOOR])))
    return figures


def _speeds(case: Case, phase: str, ms: float, copies: Sequence[float]) -> dict[str, float]:
    speed = 1e-6 * _TRAVERSALS[phase] * case.shard_bytes / ms
    return {"gb_per_s": speed, "copy_gb_per_s": 2e-6 * case.shard_bytes / np.median(copies)}


def show(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    """Print the phase "both" of each provider, and why the others have no figures."""
    work = f"[{case.tokens}, {case.vocab}]"
    if case.hidden:
        work = f"[{case.tokens}, {case.hidden}] x [{case.vocab}, {case.hidden}]"
    if case.cost_width:
        work += f" with cost rows of {case.cost_width}"
    logits = f"logits of a rank {case.shard_bytes / 2**20:.0f} MiB"
    print(f"\n{work} {case.dtype}, tp {case.tp}, forward + backward, {logits}")
    columns = [("p50 ms", "p50_ms", 1), ("min ms", "min_ms", 1), *_RATIOS]
    columns += [*(_TO_GEMMS if case.hidden else _SPEED), ("MiB", "extra_mib", 1)]
    titles = " ".join(f"{title:>8}" for title, _, _ in columns)
    print(f"{'loss':19} {titles} coll.")
    for row in rows:
        if row.get("phase") == "both":
            numbers = " ".join(
                f"{row.get(key, float('nan')):8.{digits}f}" for _, key, digits in columns
            )
            print(f"{row['provider']:19} {numbers} {row['collectives']:5}")
        elif "phase" not in row:
            print(f"{row['provider']:19} {row['status']}")
