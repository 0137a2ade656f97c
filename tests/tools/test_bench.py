"""tools/bench: who is timed, what is counted, what the table says; nothing depends on speed."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

BENCH = Path(__file__).parents[2] / "tools" / "bench"
sys.path.insert(0, str(BENCH))

import plot  # noqa: E402  (the tool's own modules need the path above)
import run  # noqa: E402
from _case import TOLERANCES, Case, Inputs, make_inputs  # noqa: E402
from _measure import Call, extra_mib  # noqa: E402
from _rounds import _check  # noqa: E402
from helpers import oracle  # noqa: E402

CPU = torch.device("cpu")
TIMED = ["ours-chunked", "ours-inplace", "megatron", "naive-mile"]
# Odd numbers of rows and columns per rank; two ranks where the collectives are counted.
SMALL = ["--tokens", "37", "--vocab", "514", "--threads", "2", "--rounds", "2"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table of fp32 on one rank, then bf16 on two."""
    path = tmp_path_factory.mktemp("bench") / "results.csv"
    flags = [*SMALL, "--output", str(path), "--providers", "liger", *TIMED]
    run.main([*flags, "--dtypes", "fp32"])
    run.main([*flags, "--dtypes", "bf16", "--tp", "2"])
    return path


@pytest.fixture
def group(tmp_path: Path) -> Any:
    """A group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


def _rows(path: Path, **wanted: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _inputs(dtype: str = "fp32", tp: int = 1) -> tuple[Case, Inputs]:
    case = Case(dtype, 37, 514, tp, 1, "cpu")
    return case, make_inputs(case, tp - 1, CPU)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", ["ce", "mile"])
def test_make_inputs_holds_the_truth_of_the_shard(dtype: str, objective: str) -> None:
    case, whole = _inputs(dtype)
    _, shard = _inputs(dtype, tp=2)
    truth = oracle(whole.logits, whole.targets, objective, upstream=whole.upstream)
    loss, gradient = shard.truths[objective]
    # Two ways to write the same in fp64: 1e-15 apart.
    torch.testing.assert_close(loss, truth.loss[shard.rows], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        gradient, truth.grad[shard.rows, case.vocab // 2 :], rtol=1e-13, atol=1e-15
    )


def test_errors_see_one_wrong_small_entry_and_nan() -> None:
    _, inputs = _inputs()
    loss, gradient = inputs.truths["mile"]
    assert inputs.errors("mile", loss, gradient) == (0, 0)
    entry = gradient[3].abs().argmin()
    gradient = gradient.clone()
    gradient[3, entry] += gradient[3].abs().mean()
    assert inputs.errors("mile", loss, gradient)[1] > 0.5
    gradient[3, entry] = torch.nan
    assert not inputs.errors("mile", loss, gradient)[1] <= TOLERANCES["fp32"][1]


@pytest.mark.parametrize(
    ("factor", "status"),
    [(1.0, "timed"), (1.001, "failed: loss error"), (float("nan"), "failed: loss error nan")],
)
def test_check_refuses_a_wrong_loss(
    factor: float, status: str, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, inputs = _inputs()
    right, _ = run.PROVIDERS["ours-chunked"].build()
    wrong = run.PROVIDERS["ours-chunked"]._replace(
        build=lambda: (lambda *given: factor * right(*given), "")
    )
    monkeypatch.setitem(run.PROVIDERS, "ours-chunked", wrong)
    result, call = _check(case, "ours-chunked", inputs, inputs.logits.clone().requires_grad_())
    assert result["status"].startswith(status)
    assert (call is None) == (status != "timed")


def test_check_reports_a_loss_that_raises(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case, inputs = _inputs()

    def build() -> Any:
        raise RuntimeError("no kernel image\nfor this device")

    broken = run.PROVIDERS["ours-chunked"]._replace(build=build)
    monkeypatch.setitem(run.PROVIDERS, "ours-chunked", broken)
    result, call = _check(case, "ours-chunked", inputs, inputs.logits.clone().requires_grad_())
    assert result == {"status": "failed: RuntimeError: no kernel image"}
    assert call is None


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_extra_mib_sees_memory_of_other_threads() -> None:
    _, inputs = _inputs()

    def loss(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        thread = threading.Thread(target=lambda: torch.ones(48 * 2**18).sum())
        thread.start()
        thread.join()
        return logits.sum(-1)

    call = Call(loss, inputs, inputs.logits.clone().requires_grad_(), None)
    extra_mib(call)
    # The kernel counts pages in batches; ten runs gave 47.9.
    assert extra_mib(call) == pytest.approx(48, abs=4)


def test_table_has_a_row_per_phase_and_the_reason_of_others(table: Path) -> None:
    for tp, dtype in (("1", "fp32"), ("2", "bf16")):
        for name in TIMED:
            rows = _rows(table, provider=name, tp=tp, dtype=dtype)
            assert [row["phase"] for row in rows] == ["forward", "backward", "both"]
            for row in rows:
                empty = {key for key, value in row.items() if not value}
                assert not empty
                values = [float(row[key]) for key in ("min_ms", "p20_ms", "p50_ms", "p80_ms")]
                assert values[0] > 0
                assert values == sorted(values)
        (row,) = _rows(table, provider="liger", tp=tp)
        if not torch.cuda.is_available():
            assert row["status"] == "not run: needs a GPU"
            assert not row["p50_ms"]
    assert {row["ratio_to_megatron"] for row in _rows(table, provider="megatron")} == {"1"}
    assert table.read_text().count("provider,") == 1


def test_collectives_are_counted(table: Path) -> None:
    def counts(provider: str, tp: str) -> list[int]:
        return [int(row["collectives"]) for row in _rows(table, provider=provider, tp=tp)]

    # One all_gather; Megatron's three all_reduces; three more for a separate entropy.
    assert counts("ours-inplace", "2") == counts("ours-chunked", "2") == [1, 0, 1]
    assert counts("ours-inplace", "1") == [0, 0, 0]
    assert counts("megatron", "2") == [3, 0, 3]
    assert counts("naive-mile", "2") == [6, 0, 6]


def test_rows_of_case_divides_within_rounds() -> None:
    case = Case("bf16", 1000, 500, 1, 1, "cpu")  # 1 MB of logits
    result = {"status": "timed", "collectives": dict.fromkeys(run.PHASES, 0)}
    # The machine is four times slower in the last two of three rounds.
    ours = {phase: [1.0, 4.0, 4.0] for phase in run.PHASES}
    theirs = {phase: [2.0, 8.0, 16.0] for phase in run.PHASES}
    results = {"ours-chunked": result | {"ms": ours}, "megatron": result | {"ms": theirs}}
    rows = run.rows_of_case(case, results, [0.5, 1.0, 2.0], {"device": "x"})
    both = rows[2]
    assert (both["phase"], both["p50_ms"], both["min_ms"]) == ("both", 4.0, 1.0)
    assert both["ratio_to_megatron"] == both["ratio_of_minima"] == 0.5
    assert both["gb_per_s"] == pytest.approx(0.75)  # 3 MB in 4 ms
    assert both["copy_gb_per_s"] == pytest.approx(2.0)  # 2 MB in 1 ms


def test_plot_draws_the_last_run_of_each_case(table: Path, tmp_path: Path) -> None:
    (panels,) = plot.read(table).values()
    assert set(panels) == {("fp32", "1"), ("bf16", "2")}
    assert {row["provider"] for row in panels["fp32", "1"]} == set(TIMED)
    plot.main(["--input", str(table), "--output", str(tmp_path / "figures")])
    (picture,) = (tmp_path / "figures").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--providers", "apex"], "--providers apex: choose from ours-reference, "),
        (["--rounds", "0"], "--rounds is 0; expected 1 or more"),
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
        ("run.py", ("--tokens", "--vocab", "--dtypes", "--tp", "--rounds", "--providers")),
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
