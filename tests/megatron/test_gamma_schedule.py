"""The schedule of gamma in jobs; test_resume.py has it resumed."""

import pytest
from support.training_runs import FIGURES, MILE, SAME, TP1, TP2, TrainingRuns, furthest, mile_errors

pytestmark = pytest.mark.slow

RAMPS = "--mile-gamma-warmup 5 --mile-gamma-decay-iters 2"


def test_schedule_is_the_same_with_a_fused_output_layer(runs: TrainingRuns) -> None:
    plain = runs.train(1, TP1, MILE, RAMPS)
    fused = runs.train(2, TP2, MILE, RAMPS, "--mile-fused-linear")
    for figure in FIGURES:
        assert furthest(fused[figure], plain[figure]) <= SAME
    assert fused["mile gamma"] == plain["mile gamma"]
    assert plain["mile gamma"][4:6] == pytest.approx([2.4, 3.0])
    constant = runs.train(1, TP1, MILE)
    assert "mile gamma" not in constant.scalars
    assert furthest(constant["lm loss"], plain["lm loss"]) > 100 * SAME


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--mile-gamma-warmup 11 --mile-gamma-decay-iters 2", "do not fit into 12 iterations"),
        ("--mile-gamma-warmup 5 --mile-sigma 0 --mile-entropy-grad", "slope has no bound"),
    ],
    ids=["length", "slope"],
)
def test_schedule_is_refused_in_one_line(runs: TrainingRuns, flags: str, expected: str) -> None:
    run = runs.run(1, TP1, MILE, flags)
    assert run.code != 0
    (error,) = mile_errors(run.logs[0])
    assert "--mile-gamma-warmup, --mile-gamma-decay-iters: " in error
    assert expected in error
    assert not run.scalars
