"""tools/bench with --cost-width: EMO beside its dense form. Nothing depends on speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.bench_tables import SMALL, assert_phases, read_rows
from support.emo_oracle import emo_oracle
from support.helpers import error

from tools.bench import plot, run
from tools.bench.case import Case
from tools.bench.emo_losses import EMO_LOSSES
from tools.bench.inputs import make_inputs


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table of fp32 on one rank."""
    path = tmp_path_factory.mktemp("bench") / "results.csv"
    run.main([*SMALL, "--cost-width", "24", "--dtypes", "fp32", "--output", str(path)])
    return path


def test_table_times_emo_beside_its_dense_form(table: Path) -> None:
    for name in ("ours", "ours-inplace", "megatron", "dense-emo"):
        rows = read_rows(table, provider=name)
        assert_phases(rows, empty={"ratio_to_gemms"})
        assert {row["cost_width"] for row in rows} == {"24"}
    shared = EMO_LOSSES["dense-emo"].obstacle(Case("fp32", 1, 2, 2, 1, "cpu", 0, 24))
    assert shared == "needs the whole vocabulary"


def test_plot_draws_emo_apart(table: Path) -> None:
    times, _ = plot.read(table)
    (picture,) = times
    assert picture.name.endswith("_37x514_emo_24.png")


def test_inputs_hold_the_truth() -> None:
    inputs = make_inputs(Case("fp32", 37, 514, 1, 1, "cpu", 0, 24), 0, torch.device("cpu"))
    (cost,) = inputs.given
    truth = emo_oracle(inputs.leaves["logits"], inputs.targets, cost, upstream=inputs.upstream)
    assert error(inputs.truths["emo"]["loss"], truth.loss) <= 1e-9  # without the 1e-10
    assert error(inputs.truths["emo"]["logits"], truth.grad) <= 1e-9


def test_run_refuses_two_workloads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--cost-width", "8", "--hidden", "8"])
    assert "--cost-width is 8 and --hidden 8; expected one of them" in capsys.readouterr().err


def test_a_gradient_of_zeros_or_of_the_other_sign_is_no_right_one() -> None:
    case = Case("bf16", 37, 514, 1, 1, "cpu", 0, 24)
    inputs = make_inputs(case, 0, torch.device("cpu"))
    loss, gradient = torch.zeros(37), torch.zeros_like(inputs.leaves["logits"])
    assert inputs.errors("emo", loss, (gradient,))[1] > case.tolerances[1]
    truth = inputs.truths["emo"]["logits"]
    gradient[inputs.checked["logits"]] = -truth.to(gradient.dtype)
    limit = EMO_LOSSES["dense-emo"].slack * case.tolerances[1]
    assert inputs.errors("emo", loss, (gradient,))[1] > limit
