"""Weights of the data's tokens: in loss, gradient and alpha, for every objective."""

from typing import Any

import pytest
import torch
from support.emo_oracle import emo_oracle, hard_cost_rows
from support.helpers import (
    IGNORED,
    MILE,
    assert_close,
    error,
    hard_rows,
    oracle,
    run_ranks,
    weighted_configs,
)

from megatron_mile import CostRows, ObjectiveConfig, linear_token_loss, reduce_loss, token_loss

CONFIGS = weighted_configs()
V = 64


def given_weights(tokens: int) -> torch.Tensor:
    """Return weights [T] from 0 to 3, a few of them 0 or 1."""
    weights = 3 * torch.rand(tokens, generator=torch.Generator().manual_seed(7)).double()
    weights[1], weights[2] = 0, 1
    return weights


def weighted_truth(logits: torch.Tensor, targets: torch.Tensor, config: ObjectiveConfig) -> Any:
    """Return the oracle's fields with the loss, the weight and the gradient times the weights."""
    weights = given_weights(len(targets))
    truth = oracle(logits, targets, config, weights)
    return truth._replace(loss=truth.loss * weights, weight=truth.weight * weights)


def _shard(size: int) -> list[float]:
    """Return the largest errors of this rank's fields and part of the gradient."""
    rank = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    logits, targets = hard_rows(V, torch.float64)
    weights, part = given_weights(len(targets)), slice(rank * V // size, (rank + 1) * V // size)
    found = []
    for config in CONFIGS.values():
        shard = logits[:, part].clone().requires_grad_()
        out = token_loss(shard, targets, config, group, token_weight=weights)
        (grad,) = torch.autograd.grad(out.loss, shard, torch.ones_like(out.loss))
        truth = weighted_truth(logits, targets, config)
        whole = truth._replace(grad=truth.grad[:, part])
        found += [error(a, b) for a, b in zip((*out[:4], grad), whole, strict=True)]
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_weights_multiply_loss_weight_and_gradient(size: int) -> None:
    for errors in run_ranks(size, _shard, size):
        assert max(errors) <= 1e-12  # measured 9e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_weights_may_be_of_any_real_dtype(dtype: torch.dtype) -> None:
    logits, targets = hard_rows(V, torch.float64)
    weights = given_weights(len(targets)).to(dtype)
    wide, narrow = (
        token_loss(logits, targets, MILE, token_weight=x) for x in (weights.double(), weights)
    )
    torch.testing.assert_close(narrow[:5], wide[:5], rtol=0, atol=0, equal_nan=True)
    assert narrow.token_weight is weights


def test_fused_output_layer_takes_weights() -> None:
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 8, generator=random, dtype=torch.float64, requires_grad=True)
    layer = torch.randn(V, 8, generator=random, dtype=torch.float64)
    targets, weights = torch.arange(9), given_weights(9)
    for config in CONFIGS.values():
        out = linear_token_loss(
            hidden, layer, targets, config, chunk_tokens=4, token_weight=weights
        )
        (grad,) = torch.autograd.grad(out.loss.sum(), hidden)
        truth = weighted_truth(hidden @ layer.t(), targets, config)
        assert_close((*out[:4], grad), truth._replace(grad=truth.grad @ layer), 1e-12)


@pytest.mark.parametrize("mode", ["1", "2", "alone"])
def test_emo_takes_weights(mode: str) -> None:
    logits, targets = hard_rows(V, torch.float64)
    rows, weights = hard_cost_rows(V, 8, torch.float64), given_weights(len(targets))
    truth = emo_oracle(logits, targets, rows, mode, upstream=weights)
    leaf = logits.requires_grad_()
    config = ObjectiveConfig("emo", emo_mode=mode)
    out = token_loss(leaf, targets, config, cost=CostRows(rows), token_weight=weights)
    (grad,) = torch.autograd.grad(out.loss, leaf, torch.ones_like(out.loss))
    expected = (truth.loss * weights, truth.nll, weights * (targets != IGNORED), truth.grad)
    for ours, theirs in zip((out.loss, out.nll, out.weight, grad), expected, strict=True):
        assert error(ours, theirs) <= 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_alpha_contains_the_weights_so_that_their_ratios_count(name: str) -> None:
    logits, targets = hard_rows(V, torch.float64)
    weights = given_weights(len(targets))
    mask = torch.linspace(0, 1, len(targets)).double() * ((targets >= 0) & (targets < V))
    config = CONFIGS[name]
    truth = weighted_truth(logits, targets, config)
    alpha = mask.sum() / (mask * truth.weight.nan_to_num()).sum()
    expected = alpha * (mask * truth.loss.nan_to_num()).sum() / mask.sum()
    for factor in (1, 1000):
        out = token_loss(logits, targets, config, token_weight=factor * weights)
        assert error(reduce_loss(out, mask, config), expected) <= 1e-12
    none = ObjectiveConfig(**{**vars(config), "normalize": "none"})
    out = token_loss(logits, targets, none, token_weight=weights)
    assert error(reduce_loss(out, mask, none), expected / alpha) <= 1e-12


def test_only_weights_of_zero_leave_nothing() -> None:
    logits, targets = hard_rows(V, torch.float64)
    leaf = logits.requires_grad_()
    out = token_loss(leaf, targets, MILE, token_weight=torch.zeros(len(targets)))
    loss = reduce_loss(out, (targets >= 0) & (targets < V), MILE)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == 0
    assert not grad.any()


def test_a_negative_weight_is_nan_for_its_token_alone() -> None:
    logits, targets = hard_rows(V, torch.float64)
    weights = torch.ones(len(targets))
    weights[0] = -1
    for config in (MILE, ObjectiveConfig("ce")):
        out = token_loss(logits, targets, config, token_weight=weights)
        plain = token_loss(logits, targets, config)
        assert out.loss[0].isnan()
        torch.testing.assert_close(out.loss[1:], plain.loss[1:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "weights", [torch.ones(3), torch.ones(12, dtype=torch.complex64), torch.ones(12, device="meta")]
)
def test_weights_that_do_not_fit_are_refused_in_one_line(weights: torch.Tensor) -> None:
    logits, targets = hard_rows(V, torch.float64)
    for call in (
        lambda: token_loss(logits, targets, MILE, token_weight=weights),
        lambda: linear_token_loss(logits, logits, targets, MILE, token_weight=weights),
    ):
        with pytest.raises(ValueError, match=r"^token_weight is .*; expected real") as caught:
            call()
        assert "\n" not in str(caught.value)
