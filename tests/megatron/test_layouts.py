"""One problem at several parallel layouts: real Megatron training runs that must agree."""

import pytest
from support.training_runs import (
    EVALUATE,
    FIGURES,
    JOBS,
    MILE,
    SAME,
    TP1,
    TP2,
    TrainingRuns,
    fall,
    furthest,
)

pytestmark = pytest.mark.slow


def test_training_tp2_repeats_tp1(runs: TrainingRuns) -> None:
    one, two = runs.train(1, TP1, MILE), runs.train(2, TP2, EVALUATE, MILE, save=True)
    assert one["lm loss"][0] == pytest.approx(two["lm loss"][0], rel=2e-7)  # two roundings
    for figure in FIGURES:
        assert furthest(one[figure], two[figure]) <= SAME
    assert fall(one) > 1


def test_training_objective_is_not_cross_entropy(runs: TrainingRuns) -> None:
    # Without this, a hook that never ran would pass every comparison of two of our runs.
    run = runs.train(1, TP1, MILE)
    assert furthest(run["mile loss"], run["lm loss"]) > 100 * SAME


def test_training_dp2_repeats_dp1_at_twice_the_micro_batch(runs: TrainingRuns) -> None:
    # Megatron deals consecutive samples to the ranks: both runs form alpha over the same four.
    two = runs.train(2, TP1, MILE)
    one = runs.train(1, TP1, MILE, "--micro-batch-size 4")
    for figure in FIGURES:
        assert furthest(two[figure], one[figure]) <= SAME


def test_training_dp2_repeats_dp1_with_unequal_masks(runs: TrainingRuns) -> None:
    # The ranks hold different numbers of tokens; two micro-batches a step; a loss per token.
    documents = runs.train(1, script=JOBS / "write_documents.py").folder
    data = (
        f"--data-path {documents} --split 100,0,0 --eod-mask-loss --calculate-per-token-loss "
        "--global-batch-size 8"
    )
    masked = MILE.replace("--mock-data", data)
    two = runs.train(2, TP1, masked)
    one = runs.train(1, TP1, masked, "--micro-batch-size 4")
    for figure in FIGURES:
        assert furthest(two[figure], one[figure]) <= SAME


def test_training_dp2_local_repeats_accumulated_micro_batches(runs: TrainingRuns) -> None:
    # Rank r's only micro-batch is micro-batch r of the single rank, each with an alpha of its own.
    two = runs.train(2, TP1, MILE, "--mile-normalize local")
    one = runs.train(1, TP1, MILE)
    for figure in FIGURES:
        assert furthest(two[figure], one[figure]) <= SAME


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, TP1), (4, TP2)],
    ids=["pp2", "tp2-pp2"],
)
def test_training_pipeline_trains(runs: TrainingRuns, world_size: int, layout: str) -> None:
    # Other stages draw other weights, so the curve is no other layout's; two micro-batches.
    run = runs.train(world_size, layout, MILE, "--pipeline-model-parallel-size 2")
    assert fall(run) > 1
    assert run["mile loss"] != run["lm loss"]
    # The start block comes from the first rank, the figures from the last.
    assert "> megatron_mile" in run.logs[0]
    alpha = "formed over 128 tokens in each micro-batch: 1 DP x CP ranks of 128 tokens"
    assert f"{alpha} (micro-batch 2 x sequence 64)" in run.logs[0]
    assert "mile loss: " not in run.logs[0]
    for figure in FIGURES:
        assert run.logs[-1].count(f"| {figure}: ") == 12


def test_training_recompute_repeats_without(runs: TrainingRuns) -> None:
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    with_it, without = runs.train(1, TP1, MILE, recompute), runs.train(1, TP1, MILE)
    for figure in FIGURES:
        assert furthest(with_it[figure], without[figure]) <= SAME


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, TP1), (2, TP2), (2, f"{TP1} --pipeline-model-parallel-size 2")],
    ids=["tp1", "tp2", "pp2"],
)
def test_training_fused_linear_repeats_without(
    runs: TrainingRuns, world_size: int, layout: str
) -> None:
    plain = runs.train(world_size, layout, MILE)
    fused = runs.train(world_size, layout, MILE, "--mile-fused-linear")
    columns = 128 if layout == TP2 else 256
    tokens = (1 << 27) // (4 * columns)
    assert f"with the loss, up to {tokens} tokens (128 MiB) at a time" in fused.logs[0]
    for figure in FIGURES:
        assert furthest(fused[figure], plain[figure]) <= SAME


def test_training_masked_padding_repeats_another_padding(runs: TrainingRuns) -> None:
    # 250 tokens in 256 columns on one rank, and in 512 on two, from the same weights.
    start = runs.train(1, TP1, MILE, save=True)
    load = f"{MILE} --load {start.checkpoint} --finetune --mile-allow-change"
    wide = TP2.replace("128", "256")
    masked = "--mile-mask-padded-vocab"
    one, two = runs.train(1, TP1, load, masked), runs.train(2, wide, load, masked)
    fused = runs.train(2, wide, load, masked, "--mile-fused-linear")
    assert "512 padded, 256 on each TP rank; padding left out in training" in two.logs[0]
    for figure in FIGURES:
        assert furthest(two[figure], one[figure]) <= SAME
        assert furthest(fused[figure], one[figure]) <= SAME
    counted = runs.train(2, wide, load)
    assert furthest(counted["mile entropy"], one["mile entropy"]) > 100 * SAME


def test_training_bf16_follows_fp32(runs: TrainingRuns) -> None:
    # Measured: 0.03 at most; bf16 rounds the weights to 3 digits.
    half, single = runs.train(2, TP1, MILE, "--bf16", save=True), runs.train(2, TP1, MILE)
    assert "torch.bfloat16 for parameters" in half.logs[0]
    for figure in ("lm loss", "mile loss"):
        assert 0 < furthest(half[figure], single[figure]) <= 0.1


def test_training_dropout_is_reproducible(runs: TrainingRuns) -> None:
    flags = (TP2, MILE, "--attention-dropout 0.1 --hidden-dropout 0.1 --train-iters 4")
    once, again = (runs.train(2, *flags, repeat=repeat) for repeat in range(2))
    assert once.scalars["lm loss"] == again.scalars["lm loss"]
    without = runs.train(2, TP2, EVALUATE, MILE, save=True)
    assert furthest(once["lm loss"][:2], without["lm loss"][:2]) > 100 * SAME
