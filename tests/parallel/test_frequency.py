"""The objective frequency over gloo ranks: weights and gradients against float64, and its input.

The oracle is dense, from the equation alone; frequencies come from a file of the real counts.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.helpers import error, hard_rows, run_ranks

from megatron_mile.config import ObjectiveConfig
from megatron_mile.integration.token_frequencies import (
    FrequencyTables,
    assign_buckets,
    read_frequencies,
)
from megatron_mile.linear import linear_token_loss
from megatron_mile.loss import reduce_loss, token_loss

V = 128
# Measured: fp64 1.7e-16, fp32 5.0e-8; of what a weight multiplies, by the weight of up to 1e10.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 3e-7}
# 1e-7 and 1 are the defaults; 0 is plain cross-entropy; 2.5 of 1e-4 a weight of up to 1e10.
CONFIGS = [
    ObjectiveConfig("frequency", frequency_exponent=exponent, frequency_eps=eps)
    for exponent, eps in ((1, 1e-7), (0, 0), (0.5, 0.01), (2.5, 1e-4))
]
COUNTS = [(token * 7919) % 1000 * (token % 5 > 0) for token in range(V - 3)]  # many are 0


def _file(folder: Path) -> Path:
    """Write a frequency file, as the tool does."""
    content = {"vocab_size": len(COUNTS), "tokens": sum(COUNTS), "counts": COUNTS}
    path = folder / "frequency.json"
    path.write_text(json.dumps({**content, "bucket": assign_buckets(COUNTS)}))
    return path


def _truth(
    logits: torch.Tensor, targets: torch.Tensor, config: ObjectiveConfig
) -> tuple[torch.Tensor, ...]:
    """Return loss, nll, weight [...] and gradient [..., V] of tokens with a target, float64."""
    z = logits.double().requires_grad_()
    counts = torch.tensor(COUNTS + [0] * 3, dtype=torch.float64)
    share = (counts / sum(COUNTS))[targets]
    weight = 1 / (share + config.frequency_eps) ** config.frequency_exponent
    nll = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    (grad,) = torch.autograd.grad(nll, z, weight)
    return (weight * nll).detach(), nll.detach(), weight, grad


def _scaled_error(ours: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> float:
    """The error of what a weight multiplies, by the weight."""
    weight = weight.view(-1, *[1] * (truth.dim() - 1))
    return error(ours.double() / weight, truth / weight)


def _check(size: int, dtype: torch.dtype, path: Path) -> None:
    group = dist.group.WORLD
    start = V // size * dist.get_rank()
    inside = slice(start, start + V // size)
    logits, targets = hard_rows(V, dtype)
    known = (targets >= 0) & (targets < V)
    inputs = FrequencyTables(read_frequencies(path), V, "cpu").inputs(targets)
    hidden, rows = logits, torch.eye(V, dtype=dtype)[inside]  # a projection that only copies
    hidden = hidden.nan_to_num(neginf=-1e4)
    for config in CONFIGS:
        loss, nll, weight, grad = _truth(logits[known], targets[known], config)
        shard = logits[:, inside].clone().requires_grad_()
        out = token_loss(shard, targets, config, group, inputs=inputs)
        (ours,) = torch.autograd.grad(out.loss, shard, torch.ones_like(out.loss))
        fused = hidden.clone().requires_grad_()
        linear = linear_token_loss(fused, rows, targets, config, group, inputs=inputs)
        (whole,) = torch.autograd.grad(linear.loss, fused, known.to(dtype))
        for found in (out, linear):
            assert error(found.weight[known] / weight, torch.ones_like(weight)) < TOLERANCE[dtype]
            assert _scaled_error(found.loss[known], loss, weight) < TOLERANCE[dtype]
            assert error(found.nll[known], nll) < TOLERANCE[dtype]
        assert out.loss[8] == 0  # ignored
        assert _scaled_error(ours[known], grad[:, inside], weight) < TOLERANCE[dtype]
        assert _scaled_error(whole[known], grad, weight) < TOLERANCE[dtype]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_weights_and_gradients_are_the_equations(
    size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    run_ranks(size, _check, size, dtype, _file(tmp_path))


def test_normalised_loss_is_divided_by_the_sum_of_the_weights() -> None:
    """As in the authors' code, with "local"; what N is does not matter then."""
    logits, targets = hard_rows(V, torch.float64)
    known = (targets >= 0) & (targets < V)
    logits, targets = logits[known], targets[known]
    config = ObjectiveConfig("frequency", normalize="local")
    loss, _, weight, _ = _truth(logits, targets, config)
    share = torch.tensor(COUNTS + [0] * 3, dtype=torch.float64)[targets] / sum(COUNTS)
    out = token_loss(logits, targets, config, inputs={"frequency": share})
    reduced = reduce_loss(out, out.valid, config)
    assert error(reduced, loss.sum() / weight.sum()) < 1e-12


@pytest.mark.parametrize("inputs", [None, {}, {"frequencies": torch.ones(2)}])
def test_objective_without_its_input_is_refused(inputs: Any) -> None:
    config, targets = ObjectiveConfig("frequency"), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="objective frequency without frequency; expected inputs="):
        token_loss(torch.ones(2, 5), targets, config, inputs=inputs)
    with pytest.raises(ValueError, match="objective frequency without frequency; expected inputs="):
        linear_token_loss(torch.ones(2, 3), torch.ones(5, 3), targets, config, inputs=inputs)


@pytest.mark.parametrize(("exponent", "eps"), [(1, 0), (5, 1e-7), (0.1, 0)])
def test_weight_that_fp32_cannot_hold_is_refused(exponent: float, eps: float) -> None:
    with pytest.raises(ValueError, match="a token that never occurs would weigh 1e"):
        ObjectiveConfig("frequency", frequency_exponent=exponent, frequency_eps=eps)
