"""The objective beside the host's own loss: where both must be the same, and alpha's four modes.

"The host" is the same script without a --mile flag: CPU mode is on, nothing of the loss is touched.
"""

import itertools

import pytest
from support.training_runs import EVALUATE, HOST, MILE, TP1, TP2, TrainingRuns, furthest

pytestmark = pytest.mark.slow

# Measured: 2.2e-7, two roundings of an fp32 loss near 5.
ROUNDING = 1e-6
STEP = "--train-iters 2"


def test_host_has_no_trace_of_the_objective(runs: TrainingRuns) -> None:
    host = runs.train(2, TP2, EVALUATE, HOST)
    assert not [tag for tag in host.scalars if "mile" in tag]
    assert "mile loss" not in "".join(host.logs)
    assert "none: the host's own loss" in host.logs[0]


@pytest.mark.parametrize("flags", ["--mile-objective ce", "--mile-gamma 0"])
def test_training_without_weights_repeats_the_host(runs: TrainingRuns, flags: str) -> None:
    host = runs.train(2, TP2, EVALUATE, HOST)
    ours = runs.train(2, TP2, EVALUATE, MILE, flags)
    for figure in ("lm loss", "lm loss validation", "grad-norm"):
        assert furthest(ours[figure], host[figure]) <= ROUNDING
    assert furthest(ours["mile loss"], host["lm loss"]) <= ROUNDING
    assert set(ours["mile weight"]) == {1.0}


def test_evaluation_is_the_hosts_own(runs: TrainingRuns) -> None:
    # The first step has learning rate 0, so the first evaluation sees the same weights; the
    # second sees weights that another loss has trained.
    host, mile = runs.train(2, TP2, EVALUATE, HOST), runs.train(2, TP2, EVALUATE, MILE, save=True)
    assert mile["lm loss validation"][0] == host["lm loss validation"][0]
    assert mile["lm loss validation"][1] != host["lm loss validation"][1]
    assert mile["lm loss"][0] == pytest.approx(host["lm loss"][0], rel=ROUNDING)
    assert not [tag for tag in mile.scalars if "mile" in tag and "validation" in tag]
    evaluated = [line for line in mile.logs[-1].splitlines() if "validation loss at" in line]
    assert len(evaluated) == 14  # each step, and both sets at the end
    assert not [line for line in evaluated if "mile" in line]


def test_prediction_heads_keep_the_hosts_loss(runs: TrainingRuns) -> None:
    # Both steps see the weights that were drawn; the heads' loss comes before the main one.
    flags = (TP2, STEP, "--mtp-num-layers 1")
    host, mile = runs.train(2, *flags, HOST), runs.train(2, *flags, MILE)
    assert mile["mtp_1 loss"] == host["mtp_1 loss"]
    assert furthest(mile["lm loss"], host["lm loss"]) <= ROUNDING
    assert furthest(mile["mile loss"], host["lm loss"]) > 100 * ROUNDING


def test_normalisers_equal_the_oracle(runs: TrainingRuns) -> None:
    """Alpha of each mode at DP=2, from runs in which it plays no part."""
    mean_loss = runs.train(2, TP1, MILE, STEP, "--mile-normalize none")["mile loss"][0]
    # One rank that reads two samples a step: with learning rate 0 in the first, its two steps see
    # what rank 0 and rank 1 see in their first, and "mile weight" is each one's mean weight.
    alone = runs.train(1, TP1, MILE, STEP, "--global-batch-size 2", "--mile-normalize none")
    losses, weights = alone["mile loss"], alone["mile weight"]
    assert sum(losses) / 2 == pytest.approx(mean_loss, rel=ROUNDING)
    expected = {
        "none": mean_loss,
        "global": mean_loss * 2 / sum(weights),
        "local": sum(loss / weight for loss, weight in zip(losses, weights, strict=True)) / 2,
        "official": mean_loss * sum(1 / weight for weight in weights) / 2,
    }
    found = {
        mode: runs.train(2, TP1, MILE, *flags)["mile loss"][0]
        for mode, flags in {
            "none": (STEP, "--mile-normalize none"),
            "global": (),
            "local": ("--mile-normalize local",),
            "official": (STEP, "--mile-normalize official"),
        }.items()
    }
    assert found == pytest.approx(expected, rel=ROUNDING)
    # The modes are further apart than the tolerance, so the test can tell them apart.
    values = sorted(expected.values())
    assert min(b / a for a, b in itertools.pairwise(values)) > 1 + 10 * ROUNDING


def test_training_alpha_keeps_the_size_of_the_gradient(runs: TrainingRuns) -> None:
    # Without alpha the mean weight, here (1 + 4.4)^3 = 160, would be in the gradient.
    host = runs.train(2, TP2, EVALUATE, HOST)
    ours = runs.train(2, TP2, EVALUATE, MILE, save=True)
    assert ours["mile weight"][0] > 100
    assert ours["grad-norm"][0] == pytest.approx(host["grad-norm"][0], rel=0.1)
