"""Stop and resume: the same bits, and never with another objective by accident."""

from pathlib import Path

import numpy
import pytest
import torch
from support.training_runs import (
    EVALUATE,
    MILE,
    STOP,
    TP1,
    TP2,
    Run,
    TrainingRuns,
    furthest,
    mile_errors,
    tensors,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def assert_resumed(whole: Run, half: Run, resumed: Run) -> None:
    """The two parts are the whole: all figures of all steps, and the last checkpoint."""
    assert sorted(half.scalars["lm loss"]) == [*range(1, 7)]
    assert sorted(resumed.scalars["lm loss"]) == [*range(7, 13)]
    for tag, figures in whole.scalars.items():
        if tag.startswith(("lm loss", "mile", "grad-norm", "learning-rate")):
            assert half.scalars[tag] | resumed.scalars[tag] == figures, tag
    final = "iter_0000012"
    expected, found = tensors(whole.checkpoint / final), tensors(resumed.checkpoint / final)
    assert found.keys() == expected.keys()
    assert len([name for name in found if "exp_avg_sq" in name]) > 5
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different
    start = tensors(half.checkpoint / "iter_0000006")
    assert not torch.equal(start["output_layer.weight"], expected["output_layer.weight"])


def test_resume_tp2_repeats_the_whole_run(runs: TrainingRuns) -> None:
    whole = runs.train(2, TP2, EVALUATE, MILE, save=True)
    half = runs.train(2, TP2, EVALUATE, MILE, STOP, save=True)
    load = f"--load {half.checkpoint}"
    assert_resumed(whole, half, runs.train(2, TP2, EVALUATE, MILE, load, save=True))


def test_resume_allows_another_backend(runs: TrainingRuns) -> None:
    # How, not what: it may change without being asked for, and rounds differently at most.
    whole = runs.train(2, TP2, EVALUATE, MILE, save=True)
    half = runs.train(2, TP2, EVALUATE, MILE, STOP, save=True)
    flags = f"--mile-backend torch --load {half.checkpoint}"
    resumed = runs.train(2, TP2, EVALUATE, MILE, flags)
    assert "plain torch on cpu: asked for" in resumed.logs[0]
    assert furthest(resumed["lm loss"], whole["lm loss"][6:]) <= 2e-6  # as between TP layouts


def test_resume_dp2_bf16_repeats_the_whole_run(runs: TrainingRuns) -> None:
    whole = runs.train(2, TP1, MILE, "--bf16", save=True)
    half = runs.train(2, TP1, MILE, "--bf16", STOP, save=True)
    load = f"--load {half.checkpoint}"
    assert_resumed(whole, half, runs.train(2, TP1, MILE, "--bf16", load, save=True))


GAMMA = "--mile-gamma-warmup 8 --mile-gamma-decay-iters 3"


def test_resume_inside_a_warmup_of_gamma_repeats_the_whole_run(runs: TrainingRuns) -> None:
    """With evaluation between the steps, which is no iteration."""
    flags = (TP2, EVALUATE, MILE, GAMMA)
    whole, half = runs.train(2, *flags, save=True), runs.train(2, *flags, STOP, save=True)
    assert_resumed(whole, half, runs.train(2, *flags, f"--load {half.checkpoint}", save=True))
    # 12 iterations with gamma 3: in eighths from 0, one with the whole, in thirds to 0.
    expected = [3 * t / 8 for t in range(8)] + [3.0, 2.0, 1.0, 0.0]
    assert whole["mile gamma"] == pytest.approx(expected, rel=1e-7)
    for step in (0, 11):  # gamma 0 is cross-entropy
        assert whole["mile loss"][step] == pytest.approx(whole["lm loss"][step], rel=2e-7)
        assert whole["mile weight"][step] == 1
    assert whole["mile weight"][8] > 10
    line = "0 to 3 over the first 8, to 0 over the last 3 of 12 iterations"
    assert line in whole.logs[0]
    assert "mile gamma: " in whole.logs[-1]


def test_resume_refuses_another_schedule_of_gamma(runs: TrainingRuns) -> None:
    half = runs.train(2, TP2, EVALUATE, MILE, GAMMA, STOP, save=True)
    for flags, change in (
        ("--mile-gamma-warmup 4", "gamma_warmup 8 -> 4"),
        ("--mile-gamma-decay-iters 0", "gamma_decay_iters 3 of 12 -> 0"),
        ("--train-iters 14", "gamma_decay_iters 3 of 12 -> 3 of 14"),
    ):
        run = runs.run(2, TP2, EVALUATE, MILE, GAMMA, flags, f"--load {half.checkpoint}")
        assert run.code != 0
        (error,) = mile_errors("\n".join(run.logs))
        assert change in error


def test_resume_dp2_batch_repeats_the_whole_run(runs: TrainingRuns) -> None:
    batch = "--calculate-per-token-loss --global-batch-size 8 --mile-normalize batch"
    whole = runs.train(2, TP1, MILE, batch, save=True)
    half = runs.train(2, TP1, MILE, batch, STOP, save=True)
    load = f"--load {half.checkpoint}"
    assert_resumed(whole, half, runs.train(2, TP1, MILE, batch, load, save=True))


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--mile-gamma 2 --mile-backend torch", ["gamma 3.0 -> 2.0"]),
        ("--mile-objective focal --mile-sigma 0", ["objective mile -> focal"]),
        ("--mile-mask-padded-vocab --mile-fused-linear", ["mask_padded_vocab False -> True"]),
    ],
)
def test_resume_refuses_another_objective(
    runs: TrainingRuns, flags: str, changes: list[str]
) -> None:
    half = runs.train(2, TP2, EVALUATE, MILE, STOP, save=True)
    run = runs.run(2, TP2, EVALUATE, MILE, flags, f"--load {half.checkpoint}")
    assert run.code != 0
    (error,) = mile_errors("\n".join(run.logs))
    assert all(change in error for change in changes)
    assert "--mile-allow-change" in error
    assert "backend" not in error
    assert "fused" not in error
    assert "Traceback" not in "".join(run.logs)
    assert not run.scalars


def test_resume_refuses_to_drop_the_objective(runs: TrainingRuns) -> None:
    half = runs.train(2, TP2, EVALUATE, MILE, STOP, save=True)
    host = "--mock-data --mile-cpu"
    run = runs.run(2, TP2, EVALUATE, host, f"--load {half.checkpoint}")
    assert run.code != 0
    (error,) = mile_errors("\n".join(run.logs))
    assert "objective mile -> none" in error


def test_resume_allows_a_change_that_is_asked_for(runs: TrainingRuns) -> None:
    whole = runs.train(2, TP2, EVALUATE, MILE, save=True)
    half = runs.train(2, TP2, EVALUATE, MILE, STOP, save=True)
    flags = f"--mile-gamma 1 --micro-batch-size 1 --mile-allow-change --load {half.checkpoint}"
    changed = runs.train(2, TP2, EVALUATE, MILE, flags)
    # Step 7 starts from the same weights, and only its objective is another.
    expected = whole.scalars["lm loss"][7]
    assert changed.scalars["lm loss"][7] == pytest.approx(expected, rel=2e-7)  # rounding
    assert changed.scalars["mile loss"][7] != whole.scalars["mile loss"][7]
    assert changed.scalars["lm loss"][8] != whole.scalars["lm loss"][8]
    assert "alpha was formed over 128 tokens in each" in changed.logs[0]
    assert "it is now formed over 64 tokens in each" in changed.logs[0]
    assert "alpha was" not in whole.logs[0]


def test_resume_distributed_optimizer_works_or_ends_in_one_line(runs: TrainingRuns) -> None:
    # Without apex and Transformer Engine, Megatron 0.19.2 cannot load its distributed optimizer.
    flags = (TP1, MILE, "--use-distributed-optimizer")
    half = runs.train(2, *flags, STOP, save=True)
    run = runs.run(2, *flags, f"--load {half.checkpoint}")
    assert run.code != 0
    (error,) = mile_errors("\n".join(run.logs))
    assert "distributed optimizer" in error
    assert "Traceback" not in "".join(run.logs)
    assert not run.scalars


def test_emo_goes_on_from_a_checkpoint_with_a_fixed_matrix(
    runs: TrainingRuns, tmp_path: Path
) -> None:
    """At TP 2 and at PP 2, from the cost matrix of a checkpoint; and resumes with no other."""
    start = runs.train(2, TP2, EVALUATE, MILE, STOP, save=True).checkpoint
    emo = f"--mock-data --mile-cpu --mile-objective emo --mile-emo-cost {start}"
    short = f"{emo} --load {start} --finetune --train-iters 4"
    by_tensors = runs.train(2, TP2, short, save=True)
    by_stages = runs.train(2, TP1, "--pipeline-model-parallel-size 2", short)
    for figure in ("lm loss", "mile loss", "mile emo"):
        values = by_tensors[figure]
        assert len(values) == 4
        assert furthest(by_stages[figure], values) < 1e-6  # measured 7.3e-8
    distances = by_tensors["mile emo"]
    assert all(0.1 < distance < 2 for distance in distances)
    assert by_tensors["mile loss"][0] == pytest.approx(by_tensors["lm loss"][0], rel=1e-6)  # mode 1
    assert "cost rows" in by_tensors.logs[0]
    assert "sha256" in by_tensors.logs[0]

    numpy.save(tmp_path / "other.npy", numpy.ones((250, 7), dtype=numpy.float32))
    other = emo.replace(str(start), str(tmp_path / "other.npy"))
    refused = runs.run(2, TP2, other, f"--load {by_tensors.checkpoint}")
    assert refused.code != 0
    (error,) = mile_errors("\n".join(refused.logs))
    assert "trained with another objective: emo_cost " in error

    narrow = tmp_path / "narrow.npy"
    numpy.save(narrow, numpy.ones((100, 7), dtype=numpy.float32))
    refused = runs.run(2, TP2, emo.replace(str(start), str(narrow)))
    (error,) = mile_errors("\n".join(refused.logs))
    assert "--mile-emo-cost has 100 rows, but the tokenizer 250 tokens" in error
