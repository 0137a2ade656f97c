"""tools/bench on given logits: who is timed, what is counted, what the table says, which flags.

Nothing depends on speed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.bench_tables import SMALL, assert_phases, read_rows

from tools.bench import plot, run
from tools.bench.case import Case
from tools.bench.measure import PHASES
from tools.bench.rows import rows_of_case

BENCH = Path(__file__).parents[2] / "tools" / "bench"
TIMED = ["ours-chunked", "ours-inplace", "megatron", "naive-mile"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table of fp32 on one rank, then bf16 on two."""
    path = tmp_path_factory.mktemp("bench") / "results.csv"
    flags = [*SMALL, "--output", str(path), "--providers", "liger", *TIMED]
    run.main([*flags, "--dtypes", "fp32"])
    run.main([*flags, "--dtypes", "bf16", "--tp", "2"])
    return path


def test_table_has_a_row_per_phase_and_the_reason_of_others(table: Path) -> None:
    for tp, dtype in (("1", "fp32"), ("2", "bf16")):
        for name in TIMED:
            rows = read_rows(table, provider=name, tp=tp, dtype=dtype)
            assert_phases(rows, empty={"ratio_to_gemms"})
            assert {row["hidden"] for row in rows} == {"0"}
        (row,) = read_rows(table, provider="liger", tp=tp)
        if not torch.cuda.is_available():
            assert row["status"] == "not run: needs a GPU"
            assert not row["p50_ms"]
    assert {row["ratio_to_megatron"] for row in read_rows(table, provider="megatron")} == {"1"}
    assert table.read_text().count("provider,") == 1


def test_collectives_are_counted(table: Path) -> None:
    def counts(provider: str, tp: str) -> list[int]:
        return [int(row["collectives"]) for row in read_rows(table, provider=provider, tp=tp)]

    # One all_gather; Megatron's three all_reduces; three more for a separate entropy.
    assert counts("ours-inplace", "2") == counts("ours-chunked", "2") == [1, 0, 1]
    assert counts("ours-inplace", "1") == [0, 0, 0]
    assert counts("megatron", "2") == [3, 0, 3]
    assert counts("naive-mile", "2") == [6, 0, 6]


def test_settings_are_checked_and_timed(tmp_path: Path) -> None:
    path = tmp_path / "deft.csv"
    settings = ["objective=deft", "label_smoothing=0.1", "z_loss=0.01"]
    flags = [*SMALL, "--output", str(path), "--tp", "2", "--dtypes", "fp32"]
    run.main([*flags, "--providers", "ours-chunked", "ours-inplace", "--settings", *settings])
    for name in ("ours-chunked", "ours-inplace"):
        rows = read_rows(path, provider=name)
        assert_phases(rows, empty={"ratio_to_gemms"})
        assert {row["objective"] for row in rows} == {" ".join(settings)}
        assert {row["collectives"] for row in rows} == {"0", "1"}
    assert len(read_rows(path, provider="megatron", objective="ce")) == 3


def test_rows_of_case_divides_within_rounds() -> None:
    case = Case("bf16", 1000, 500, 1, 1, "cpu")  # 1 MB of logits
    result = {"status": "timed", "collectives": dict.fromkeys(PHASES, 0)}
    # The machine is four times slower in the last two of three rounds.
    ours = {phase: [1.0, 4.0, 4.0] for phase in PHASES}
    theirs = {phase: [2.0, 8.0, 16.0] for phase in PHASES}
    results = {"ours-chunked": result | {"ms": ours}, "megatron": result | {"ms": theirs}}
    rows = rows_of_case(case, results, [0.5, 1.0, 2.0], {"device": "x"})
    both = rows[2]
    assert (both["phase"], both["p50_ms"], both["min_ms"]) == ("both", 4.0, 1.0)
    assert both["ratio_to_megatron"] == both["ratio_of_minima"] == 0.5
    assert both["gb_per_s"] == pytest.approx(0.75)  # 3 MB in 4 ms
    assert both["copy_gb_per_s"] == pytest.approx(2.0)  # 2 MB in 1 ms


def test_plot_draws_the_last_run_of_each_case(table: Path, tmp_path: Path) -> None:
    times, memories = plot.read(table)
    (panels,) = times.values()
    assert not memories
    assert set(panels) == {("fp32", "1"), ("bf16", "2")}
    assert {row["provider"] for row in panels["fp32", "1"]} == set(TIMED)
    plot.main(["--input", str(table), "--output", str(tmp_path / "figures")])
    (picture,) = (tmp_path / "figures").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--providers", "apex"], "--providers apex: with --hidden 0 choose from ours-reference, "),
        (["--hidden", "-1"], "--hidden is -1; expected 0 (logits are given) or more"),
        (["--rounds", "0"], "--rounds is 0; expected 1 or more"),
        (["--settings", "gama=1"], "--settings: gama=1: expected NAME=VALUE with a setting of "),
        (["--settings", "objective=emo"], "--settings: objective=emo needs cost rows; "),
        (["--settings", "z_loss=-1"], "--settings: z_loss is -1.0; expected a finite number >= 0"),
        (["--settings", "z_loss=1", "--hidden", "8"], "--settings is for the losses of logits"),
        (["--vocab", "513", "--tp", "2"], "--vocab 513 is not divisible by --tp 2; "),
    ],
)
def test_run_refuses_flags_before_it_measures(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.csv"
    error = _failure(run.main, [*flags, "--output", str(output)], capsys)
    assert error.startswith(f"tools/bench/run.py: error: {message}")
    assert not output.exists()


def test_tools_leave_a_foreign_table_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "other.csv"
    foreign.write_text("a,b\n1,2\n")
    error = _failure(run.main, [*SMALL, "--output", str(foreign)], capsys)
    assert "has other columns than this tool; name another file" in error
    assert "has no column" in _failure(plot.main, ["--input", str(foreign)], capsys)
    assert foreign.read_text() == "a,b\n1,2\n"


def _failure(
    main: Callable[[list[str]], None], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Return the one line on stderr of a tool that must end with status 1."""
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    assert exit_.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (
            "run.py",
            ("--tokens", "--vocab", "--hidden", "--dtypes", "--tp", "--rounds", "--providers"),
        ),
        ("plot.py", ("--input", "--output")),
        ("train_step.py", ("--pairs", "--precision", "--objective", "--output")),
    ],
)
def test_help_names_the_flags(script: str, flags: tuple[str, ...]) -> None:
    result = subprocess.run(
        [sys.executable, str(BENCH / script), "--help"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(flag in result.stdout for flag in flags)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize(("flags", "drawn"), [("--help", False), ("--tp 2", True), ("", True)])
def test_make_bench_draws_what_it_measured(flags: str, drawn: bool) -> None:
    command = ["make", "--dry-run", "--directory", str(BENCH.parents[1]), "bench", f"ARGS={flags}"]
    steps = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "tools/bench/run.py" in steps
    assert ("tools/bench/plot.py" in steps) == drawn
