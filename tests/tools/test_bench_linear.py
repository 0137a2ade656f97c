"""tools/bench with the output layer: who is timed beside which floor, what the pictures show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.bench_tables import SMALL, assert_phases, read_rows

from tools.bench import plot, run

TIMED = ["ours-linear", "ours-unfused", "megatron", "gemms"]
LINEAR = [*SMALL, "--hidden", "24"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table of fp32 on one rank, then bf16 on two, of all who can run."""
    path = tmp_path_factory.mktemp("bench") / "results.csv"
    run.main([*LINEAR, "--output", str(path), "--dtypes", "fp32"])
    run.main([*LINEAR, "--output", str(path), "--dtypes", "bf16", "--tp", "2"])
    return path


def test_table_has_a_row_per_phase_of_those_that_run_anywhere(table: Path) -> None:
    speeds = {"gb_per_s", "copy_gb_per_s"}  # of logits, which do not come from memory here
    for tp, dtype in (("1", "fp32"), ("2", "bf16")):
        for name in TIMED:
            rows = read_rows(table, provider=name, tp=tp, dtype=dtype, hidden="24")
            unchecked = {"loss_error", "gradient_error"} if name == "gemms" else set()
            assert_phases(rows, speeds | unchecked)
    assert {row["ratio_to_gemms"] for row in read_rows(table, provider="gemms")} == {"1"}
    assert {row["ratio_to_megatron"] for row in read_rows(table, provider="megatron")} == {"1"}


def test_packages_are_timed_or_say_why_not(table: Path) -> None:
    others = [row for row in read_rows(table) if row["provider"] not in TIMED]
    assert {row["provider"] for row in others} == {
        *("verl", "verl-chunked", "liger", "cut-cross-entropy")
    }
    for row in others:
        assert row["status"].startswith(("timed", "not run: "))
        if row["provider"] in ("verl", "liger") and not torch.cuda.is_available():
            assert row["status"] == "not run: needs a GPU"


def test_collectives_are_counted(table: Path) -> None:
    def counts(provider: str) -> list[int]:
        rows = read_rows(table, provider=provider, tp="2")
        return [int(row["collectives"]) for row in rows]

    # Beside those of the losses, the sum of d(hidden).
    assert counts("ours-linear") == counts("ours-unfused") == [1, 1, 2]
    assert counts("megatron") == [3, 1, 4]
    assert counts("gemms") == [0, 0, 0]


def test_plot_draws_memory_over_several_numbers_of_tokens(table: Path, tmp_path: Path) -> None:
    assert not plot.read(table)[1]  # one number of tokens
    both = tmp_path / "results.csv"
    both.write_bytes(table.read_bytes())
    flags = ["--tokens", "19", "--dtypes", "fp32", "--providers", "ours-linear"]
    run.main([*LINEAR, *flags, "--output", str(both)])
    chosen = {row["provider"] for row in read_rows(both, tokens="19")}
    assert chosen == {"megatron", "gemms", "ours-linear"}  # with their references
    times, memories = plot.read(both)
    assert sorted(path.stem.split("_")[-1] for path in times) == ["19x24x514", "37x24x514"]
    ((name, panels),) = memories.items()
    assert name.stem.endswith("_memory_24x514")
    assert set(panels) == {("fp32", "1")}  # two ranks have one number of tokens
    ours = [row for row in panels["fp32", "1"] if row["provider"] == "ours-linear"]
    assert [row["tokens"] for row in ours] == ["19", "37"]
    plot.main(["--input", str(both), "--output", str(tmp_path / "figures")])
    pictures = list((tmp_path / "figures").iterdir())
    assert {path.name for path in pictures} == {path.name for path in (*times, name)}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_plot_keeps_the_workloads_apart(table: Path) -> None:
    rows = read_rows(table)
    pictures = plot._times([*rows, *(row | {"hidden": "0"} for row in rows)])
    assert sorted(path.stem.split("_")[-1] for path in pictures) == ["37x24x514", "37x514"]
    for panels in pictures.values():
        assert {row["provider"] for row in panels["fp32", "1"]} >= set(TIMED)


def test_run_refuses_losses_of_the_other_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*LINEAR, "--output", str(tmp_path / "results.csv"), "--providers", "ours-inplace"]
    with pytest.raises(SystemExit):
        run.main(flags)
    message = "--providers ours-inplace: with --hidden 24 choose from ours-linear, "
    assert message in capsys.readouterr().err
