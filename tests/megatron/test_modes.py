"""Models and schedules beside a plain GPTModel: real Megatron training runs on the CPU."""

import pytest
from support.training_runs import (
    FIGURES,
    JOBS,
    MILE,
    SAME,
    TP1,
    TP2,
    Run,
    TrainingRuns,
    fall,
    furthest,
    mile_errors,
)

pytestmark = pytest.mark.slow

HOST = "--mock-data --mile-cpu"
CE = f"{HOST} --mile-objective ce"
NO_POSITIONS = "--position-embedding-type none"
# Attention and MLP by turns; the same with a head that predicts one token more; MLPs alone, which
# may be split along the sequence without an attention that communicates.
HYBRID = f"--hybrid-layer-pattern=*-*- {NO_POSITIONS}"
HYBRID_HEAD = f"--hybrid-layer-pattern=*-*-/*- {NO_POSITIONS}"
MLPS = f"--hybrid-layer-pattern=---- {NO_POSITIONS}"
MOE = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather"


def assert_same(ours: Run, theirs: Run) -> None:
    """Compare all figures of two runs."""
    for figure in FIGURES:
        assert furthest(ours[figure], theirs[figure]) <= SAME, figure


@pytest.mark.parametrize(
    ("world_size", "model"),
    [
        (2, f"{TP2} {HYBRID}"),
        (2, f"{TP2} {HYBRID_HEAD}"),
        (2, f"{TP2} --mtp-num-layers 1"),
        (2, f"{TP1} {MOE} --expert-model-parallel-size 2"),
        (2, f"{TP1} {MLPS} --context-parallel-size 2"),
        (1, f"{TP1} --deterministic-mode"),
    ],
    ids=["hybrid", "hybrid-mtp", "gpt-mtp", "moe", "cp", "deterministic"],
)
def test_training_of_a_mode_trains_and_ce_is_the_hosts(
    runs: TrainingRuns, world_size: int, model: str
) -> None:
    host, ce = runs.train(world_size, model, HOST), runs.train(world_size, model, CE)
    assert furthest(ce["lm loss"], host["lm loss"]) <= SAME
    mile = runs.train(world_size, model, MILE)
    assert fall(mile) > 1
    assert furthest(mile["mile loss"], mile["lm loss"]) > 100 * SAME
    # The first step has learning rate 0 and the others' weights: what the host computes is the
    # host's, bit for bit.
    heads = [tag for tag in host.scalars if tag.startswith(("mtp", "load_balancing"))]
    assert bool(heads) == any(word in model for word in ("mtp", "/", "experts"))
    for tag in heads:
        assert mile[tag][0] == host[tag][0]


def test_training_fused_linear_refuses_prediction_heads(runs: TrainingRuns) -> None:
    run = runs.run(1, TP1, MILE, "--mtp-num-layers 1 --mile-fused-linear")
    assert run.code != 0
    (error,) = mile_errors(run.logs[0])
    assert "--mile-fused-linear cannot be combined with multi-token prediction" in error
    assert not run.scalars


def test_training_cp2_repeats_cp1(runs: TrainingRuns) -> None:
    one, two = (
        runs.train(size, TP1, MILE, MLPS, f"--context-parallel-size {size}") for size in (1, 2)
    )
    assert_same(two, one)


def test_training_cp2_repeats_cp1_with_unequal_masks(runs: TrainingRuns) -> None:
    # Halves of a sequence hold different numbers of tokens that count.
    documents = runs.train(1, script=JOBS / "write_documents.py").folder
    data = (
        f"--data-path {documents} --split 100,0,0 --eod-mask-loss --calculate-per-token-loss "
        f"--global-batch-size 8 {MLPS}"
    )
    masked = MILE.replace("--mock-data", data)
    one, two = (runs.train(size, TP1, masked, f"--context-parallel-size {size}") for size in (1, 2))
    assert_same(two, one)


def test_loss_of_split_sequences_matches_float64(runs: TrainingRuns) -> None:
    runs.train(2, script=JOBS / "split_sequence.py")


def test_a_pipeline_chunk_without_weights_trains(runs: TrainingRuns) -> None:
    layout = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t||L"
    run = runs.train(2, TP1, MILE, layout, "--global-batch-size 8 --mile-gamma-warmup 2")
    assert fall(run) > 1


def test_training_virtual_pipeline_repeats_the_plain_schedule(runs: TrainingRuns) -> None:
    # Both start from one checkpoint, because chunks draw their weights in another order.
    pipeline = f"{TP1} --num-layers 4 --pipeline-model-parallel-size 2 --global-batch-size 8"
    start = runs.train(2, pipeline, MILE, save=True)
    flags = (pipeline, MILE, f"--load {start.checkpoint} --finetune")
    plain = runs.train(4, *flags)
    virtual = runs.train(4, *flags, "--num-layers-per-virtual-pipeline-stage 1")
    assert_same(virtual, plain)
