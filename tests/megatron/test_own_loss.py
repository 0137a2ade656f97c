"""Real jobs with loss functions, masks and modes of their own: the same training, or a stop."""

from __future__ import annotations

import pytest
from support.training_runs import JOBS, MILE, TP1, TP2, Run, TrainingRuns, furthest, mile_errors

pytestmark = pytest.mark.slow

SCRIPT = JOBS / "pretrain_own_loss.py"
STEPS = "--train-iters 3"
FIGURES = ("lm loss", "mile loss", "mile entropy", "mile weight", "grad-norm")
# Measured 0 for all kinds but the mean, which divides earlier: 7.9e-8.
SAME = 2e-7


def job(runs: TrainingRuns, kind: str, *flags: str) -> Run:
    return runs.run(2, TP1, MILE, STEPS, f"--own {kind}", *flags, script=SCRIPT)


@pytest.mark.parametrize("kind", ["keyword", "closure", "class", "averaged", "evaluation-mode"])
def test_every_kind_trains_as_the_usual_one(runs: TrainingRuns, kind: str) -> None:
    usual, other = job(runs, "position"), job(runs, kind)
    assert other.code == 0, other.logs[-1][-2000:]
    for figure in FIGURES:
        assert len(other[figure]) == 3
        assert furthest(other[figure], usual[figure]) <= SAME, figure


# One micro-batch a step on each rank: others would count by their number of tokens.
@pytest.mark.parametrize("layout", [TP1, f"{TP2} --micro-batch-size 4"], ids=["dp2", "tp2"])
@pytest.mark.parametrize("objective", ["mile", "ce"])
def test_weights_of_tokens_of_0_and_1_train_as_a_mask(
    runs: TrainingRuns, layout: str, objective: str
) -> None:
    flags = (layout, f"--mile-objective {objective}")
    masked, weighted = job(runs, "position", *flags), job(runs, "weighted", *flags)
    assert weighted.code == 0, weighted.logs[-1][-2000:]
    for figure in ("mile loss", "grad-norm"):
        assert len(weighted[figure]) == 3
        assert furthest(weighted[figure], masked[figure]) <= SAME, figure
    assert furthest(weighted["lm loss"], masked["lm loss"]) > 1e-4


def test_a_rank_without_tokens_has_no_part_in_official(runs: TrainingRuns) -> None:
    # One rank has tokens, so the mean over such ranks is the global value.
    official = job(runs, "empty-rank", "--mile-normalize official")
    everywhere = job(runs, "empty-rank")
    for figure in FIGURES:
        assert furthest(official[figure], everywhere[figure]) <= SAME, figure


@pytest.mark.parametrize(
    ("kind", "text"),
    [("squared", "is not linear in the losses per token"), ("late-label", "NaN")],
)
def test_what_cannot_be_trained_stops(runs: TrainingRuns, kind: str, text: str) -> None:
    run = job(runs, kind)
    assert run.code != 0
    assert text in "".join(run.logs)
    if kind == "squared":
        assert all(text in error for error in mile_errors("\n".join(run.logs)))
        assert "Traceback" not in "".join(run.logs)
    assert len(run.scalars.get("lm loss", {})) == (2 if kind == "late-label" else 0)
