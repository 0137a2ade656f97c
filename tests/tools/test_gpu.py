"""tools/bench/gpu.py: what becomes of its parts, its tables; without a GPU it says so."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from support.bench_tables import SMALL

from tools.bench import gpu, run, train_step
from tools.bench.conditions import conditions
from tools.bench.gpu import Part, report, run_parts
from tools.bench.table import append


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--output", str(tmp_path), "--logs", str(tmp_path / "logs")])
    assert capsys.readouterr().out.startswith("tools/bench/gpu.py: not run: torch finds no GPU")
    assert not list(tmp_path.iterdir())


def test_minutes_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as failure:
        gpu.main(["--minutes", "nan"])
    assert failure.value.code == 1
    assert "error: --minutes is nan; expected more than 0" in capsys.readouterr().err


def test_parts_are_ended_in_time_and_told_after_each(tmp_path: Path) -> None:
    told: list[dict[str, str]] = []
    parts = [
        Part("right", ["-c", "print('all is well')"]),
        Part("wrong one", ["-c", "raise SystemExit(3)"]),
        Part("long", ["-c", "import time; time.sleep(600)"]),
        Part("late", ["-c", "raise AssertionError"]),
    ]
    run_parts(parts, tmp_path, 5, lambda outcomes: told.append(dict(outcomes)))
    first, *_, last = told
    assert first["late"] == "not run: stopped before"
    assert last["right"].startswith("done in ")
    assert last["wrong one"] == f"failed with status 3; see {tmp_path / 'wrong_one.log'}"
    assert last["long"].startswith("stopped after ")
    assert last["late"] == "not run: no time left"
    assert (tmp_path / "right.log").read_text() == "all is well\n"


def test_parts_name_flags_that_their_tools_have(tmp_path: Path) -> None:
    for part in gpu.parts_of(tmp_path):
        script, *flags = part.words
        if script.endswith("train_step.py"):
            train_step.command_line().parse_args(flags)
        elif script.endswith("run.py"):
            run.command_line().parse_args(flags)
        else:
            assert (gpu.ROOT / flags[-1]).is_dir()


def cells_of(text: str, name: str) -> list[str]:
    """Return the cells of a loss in a report."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line[1:-1].split("|")]


def test_rows_are_of_one_gpu_like_this(tmp_path: Path) -> None:
    table, device = tmp_path / "results.csv", conditions()["device"]
    assert gpu._rows(table) == []
    rows = [{"device": device, "tp": "1"}, {"device": device, "tp": "2"}]
    append(table, ("device", "tp"), [*rows, {"device": "another", "tp": "1"}])
    assert gpu._rows(table) == rows[:1]


def test_report_tells_outcomes_and_the_last_run_of_each_loss(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    flags = [*SMALL, "--dtypes", "fp32", "--output", str(table)]
    run.main([*flags, "--providers", "ours-inplace", "liger"])
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    (both,) = (x for x in rows if (x["provider"], x["phase"]) == ("ours-inplace", "both"))
    replayed = {**both, "phase": "replayed", "p50_ms": "0.125"}
    earlier = [{**row, "p50_ms": "9" * bool(row["phase"])} for row in [*rows, replayed]]
    steps = [{"precision": "bf16", "pairs": "40", "ratio_mean": "1.002", "ratio_bound": "1.01"}]
    text = report({"tests": "done in 3 s"}, [*earlier, *rows, replayed], steps)
    assert "| tests | done in 3 s |" in text
    assert "## [37, 514] fp32\n" in text
    cells = cells_of(text, "ours-inplace")
    speed = float(both["gb_per_s"]) / float(both["copy_gb_per_s"])
    assert cells[1:4] == [both["p50_ms"], "0.125", both["ratio_to_megatron"]]
    assert cells[4:] == [f"{speed:.2f}", both["extra_mib"]]
    assert ("| liger | not run: needs a GPU | | | | |" in text) or torch.cuda.is_available()
    # What an earlier run alone has is not mixed with a later one.
    assert cells_of(report({}, [*earlier, *rows], []), "ours-inplace")[2] == ""
    assert "bf16, 40 pairs: ratio 1.002, at most 1.01 with 95 % confidence." in text
