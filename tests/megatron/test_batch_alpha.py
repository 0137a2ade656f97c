"""--mile-normalize batch: the update belongs to the global batch, however it is split."""

import pytest
from support.training_runs import (
    FIGURES,
    JOBS,
    MILE,
    TP1,
    Run,
    TrainingRuns,
    furthest,
    mile_errors,
)

pytestmark = pytest.mark.slow

# Relative, over 12 steps of fp32; measured 2.2e-7.
SAME = 1e-6
PER_TOKEN = "--calculate-per-token-loss --global-batch-size 8"
MLPS = "--hybrid-layer-pattern=---- --position-embedding-type none"
PIPELINE = "--pipeline-model-parallel-size 2"


@pytest.fixture
def masked(runs: TrainingRuns) -> str:
    """The flags of a job whose samples, and so micro-batches and ranks, hold unequal masks."""
    documents = runs.train(1, script=JOBS / "write_documents.py").folder
    data = f"--data-path {documents} --split 100,0,0 --eod-mask-loss {PER_TOKEN}"
    return MILE.replace("--mock-data", data)


def furthest_of(ours: Run, theirs: Run) -> float:
    """The largest difference of two runs: the figures, and the size of the gradient."""
    return max(furthest(ours[figure], theirs[figure]) for figure in (*FIGURES, "grad-norm"))


def test_batch_gives_one_update_however_the_batch_is_split(runs: TrainingRuns, masked: str) -> None:
    def train(normalize: str) -> list[Run]:
        flags = f"--mile-normalize {normalize}"
        return [
            runs.train(1, TP1, masked, flags, "--micro-batch-size 8"),
            runs.train(1, TP1, masked, flags, "--micro-batch-size 1"),
            runs.train(2, TP1, masked, flags, "--micro-batch-size 2"),
        ]

    whole, *split = train("batch")
    for run in split:
        assert furthest_of(run, whole) <= SAME
    # One micro-batch on one rank is the global batch, so that global is batch; but not elsewhere.
    same, *other = train("global")
    assert furthest_of(same, whole) <= SAME
    for run in other:
        assert furthest_of(run, whole) > 100 * SAME
    assert "formed over the whole global batch of 8 sequences of 64 tokens" in whole.logs[0]


def test_batch_gives_one_update_at_cp2_and_at_pp2(runs: TrainingRuns, masked: str) -> None:
    flags = f"{masked} --mile-normalize batch"
    one = runs.train(1, TP1, flags, MLPS, "--micro-batch-size 8")
    two = runs.train(2, TP1, flags, MLPS, "--micro-batch-size 2 --context-parallel-size 2")
    assert furthest_of(two, one) <= SAME
    # From one checkpoint, because stages draw their weights in another order.
    start = runs.train(2, TP1, PIPELINE, flags, "--train-iters 2 --micro-batch-size 2", save=True)
    load = f"{flags} --load {start.checkpoint} --finetune"
    one = runs.train(1, TP1, load, "--micro-batch-size 8")
    for parts, ranks in (("--micro-batch-size 1", 2), ("--micro-batch-size 2", 4)):
        piped = runs.train(ranks, TP1, PIPELINE, load, parts)
        assert furthest_of(piped, one) <= SAME


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "without --calculate-per-token-loss"),
        (f"{PER_TOKEN} --mtp-num-layers 1", "cannot be combined with --mtp-num-layers 1"),
        (
            f"{PER_TOKEN} --num-experts 4 --moe-z-loss-coeff 1e-3",
            "cannot be combined with --moe-z-loss-coeff 0.001",
        ),
    ],
    ids=["mean", "mtp", "z-loss"],
)
def test_batch_is_refused_in_one_line(runs: TrainingRuns, flags: str, expected: str) -> None:
    run = runs.run(1, TP1, MILE, "--mile-normalize batch", flags)
    assert run.code != 0
    (error,) = mile_errors(run.logs[0])
    assert f"--mile-normalize batch (normalize batch) {expected}" in error
    assert not run.scalars


def test_batch_trains_experts_without_auxiliary_loss(runs: TrainingRuns) -> None:
    experts = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather"
    flags = f"{MILE} {PER_TOKEN} {experts} --mile-normalize batch"
    whole = runs.train(2, TP1, flags, "--expert-model-parallel-size 2 --micro-batch-size 4")
    split = runs.train(2, TP1, flags, "--expert-model-parallel-size 2 --micro-batch-size 1")
    assert furthest_of(split, whole) <= SAME
