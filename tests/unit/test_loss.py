"""token_loss on one rank against the float64 oracle, and its properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import (
    IGNORED,
    MILE,
    WEIGHTED,
    Truth,
    assert_close,
    error,
    hard_rows,
    oracle,
    run_loss,
    variations,
)

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import token_loss
from megatron_mile.objectives import OBJECTIVES
from megatron_mile.ops.per_token import reference

# Measured: fp64 1.2e-14, fp32 1.0e-6 (gamma = 5, where the power multiplies the error of H by 5).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
THROUGH_ENTROPY = [name for name in WEIGHTED if OBJECTIVES[name].weight_slope is not None]


def test_oracle_matches_a_row_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64))
    truth = oracle(logits, torch.tensor([1]), ObjectiveConfig(gamma=2))
    entropy = 1.5 * torch.log(torch.tensor(2.0, dtype=torch.float64))
    weight, nll = (1 + entropy) ** 2, torch.log(torch.tensor(4.0, dtype=torch.float64))
    grad = weight * torch.tensor([[0.5, -0.75, 0.25]], dtype=torch.float64)
    expected = Truth(*(x.view(1) for x in (weight * nll, nll, entropy, weight)), grad)
    assert_close(tuple(truth), expected, 1e-15)


# 1: nothing to choose; 3: fewest columns with a wrong, a right and another; 127 and 1003: ragged;
# 32000: sums that round, entropies near 10 nats.
@pytest.mark.parametrize("vocab", [1, 3, 127, 1003, 32000])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", WEIGHTED)
def test_token_loss_matches_oracle(name: str, vocab: int, dtype: torch.dtype) -> None:
    logits, targets = hard_rows(vocab, dtype)
    for config in variations(name):
        if dtype == torch.float32 and config.sigma == 0 and 0 < config.gamma < 1:
            continue  # a root of a rounded entropy near 0 keeps half its digits
        out, grad = run_loss(logits, targets, config)
        assert out.loss.dtype == dtype
        assert_close((*out[:4], grad), oracle(logits, targets, config), TOLERANCE[dtype])


def test_join_never_gives_a_negative_entropy() -> None:
    # The reference's S is >= 1; another implementation's may round below, and a root would be NaN.
    stats = torch.tensor([[[5.0], [1 - 1e-7], [0.0], [5.0]]], dtype=torch.float64)
    assert reference.join(stats)[5].tolist() == [0.0]


# gamma = 2 is where fp32 still holds 2e-6 for every element (measured 6.7e-7).
@pytest.mark.parametrize("vocab", [1, 3, 127, 1003])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", THROUGH_ENTROPY)
def test_token_loss_matches_oracle_with_gradient_through_entropy(
    name: str, vocab: int, dtype: torch.dtype
) -> None:
    logits, targets = hard_rows(vocab, dtype)
    for config in variations(name, entropy_grad=True):
        if config.own.get("gamma", 0) <= 2:
            out, grad = run_loss(logits, targets, config)
            assert_close((*out[:4], grad), oracle(logits, targets, config), TOLERANCE[dtype])


@pytest.mark.parametrize("sigma", [0, 1])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_token_loss_gradient_through_entropy_is_exact_to_the_row_at_large_gamma(
    sigma: int, dtype: torch.dtype
) -> None:
    # Where ln p + H crosses 0 two large terms cancel: single elements lose digits (1.2e-5 in fp32),
    # so the error is held against the row's largest element (measured 1.0e-7).
    config = ObjectiveConfig(gamma=5, sigma=sigma, entropy_grad=True)
    logits, targets = hard_rows(1003, dtype)
    _, grad = run_loss(logits, targets, config)
    expected = oracle(logits, targets, config).grad
    scale = 1 + expected.abs().amax(-1, keepdim=True)
    assert error(grad / scale, expected / scale) <= TOLERANCE[dtype]


# bf16 in place, where a gradient is rounded otherwise once the forward may not use the logits up.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", [name for name in WEIGHTED if name not in THROUGH_ENTROPY])
def test_entropy_grad_costs_nothing_where_the_weight_has_no_entropy(
    name: str, inplace: bool, dtype: torch.dtype
) -> None:
    logits, targets = hard_rows(127, dtype)
    results, saved = [], []
    for entropy_grad in (False, True):
        config = ObjectiveConfig(objective=name, gamma=2, entropy_grad=entropy_grad)
        leaf, shapes = logits.clone().requires_grad_(), list[torch.Size]()

        def note(x: torch.Tensor, shapes: list[torch.Size] = shapes) -> torch.Tensor:
            shapes.append(x.shape)
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = token_loss(leaf * 1, targets, config, inplace=inplace)
        (grad,) = torch.autograd.grad(out.loss, leaf, torch.ones_like(out.loss))
        results.append((*out[:4], grad))
        saved.append(shapes)
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    assert saved[0] == saved[1]
    assert torch.Size([2, 12]) in saved[1]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_token_loss_with_gamma_zero_is_cross_entropy(dtype: torch.dtype) -> None:
    logits, targets = hard_rows(127, dtype)
    known = (targets < 127) & (targets != -1)
    z = logits.double().requires_grad_()
    expected = F.cross_entropy(z[known], targets[known], ignore_index=IGNORED, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)
    for name in WEIGHTED:
        config = ObjectiveConfig(objective=name, gamma=0, sigma=0)
        if not ("gamma" in config.own or config.definition.is_cross_entropy):
            continue
        out, grad = run_loss(logits, targets, config)
        assert torch.equal(out.loss[known], out.nll[known])
        assert error(out.loss[known], expected) <= TOLERANCE[dtype]
        assert error(grad[known], expected_grad[known]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["ce", "mile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_token_loss_of_half_precision_is_no_worse_than_torch(name: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(64, 1003, generator=random)).to(dtype)
    targets = torch.randint(1003, (64,), generator=random)
    config = ObjectiveConfig(objective=name)
    truth = oracle(logits, targets, config)
    out, grad = run_loss(logits, targets, config)
    assert (out.loss.dtype, grad.dtype) == (torch.float32, dtype)

    z = logits.detach().float().requires_grad_()
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    nll = F.cross_entropy(z, targets, reduction="none")
    weight = (1 + entropy.detach()) if name == "mile" else torch.ones_like(nll)
    (torch_grad,) = torch.autograd.grad((weight * nll).sum(), z)
    ulp = torch.finfo(torch.float32).eps
    torch_fields = (weight * nll, nll, entropy, weight)
    for ours, theirs, exact in zip(out[:4], torch_fields, truth[:4], strict=True):
        assert error(ours, exact) <= error(theirs, exact) + ulp
    # fp16 gradients below its smallest normal number lose digits, so tiny is the absolute part.
    rounding = torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
    assert error(grad, truth.grad) <= error(torch_grad, truth.grad) + rounding


def test_token_loss_scales_with_the_incoming_gradient() -> None:
    logits, targets = hard_rows(127, torch.float64)
    upstream = torch.linspace(-2, 2, 12, dtype=torch.float64)
    config = ObjectiveConfig(gamma=2, entropy_grad=True)
    _, grad = run_loss(logits, targets, config, upstream)
    expected = oracle(logits, targets, config, upstream).grad
    assert error(grad, expected) <= TOLERANCE[torch.float64]


ROWS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(row=ROWS, shift=st.floats(-1000, 1000), data=st.data())
def test_token_loss_is_invariant_to_a_shift(
    row: list[float], shift: float, data: st.DataObject
) -> None:
    targets = torch.tensor([data.draw(st.integers(0, len(row) - 1))])
    logits = torch.tensor([row], dtype=torch.float64)
    out, grad = run_loss(logits, targets, MILE)
    moved, moved_grad = run_loss(logits + shift, targets, MILE)
    # The sum rounds at 1000 * 1.1e-16; a logit's change reaches loss and gradient times w * nll.
    tolerance = 1e-13 * (1 + out.loss.item()) * (1 + out.weight.item())
    torch.testing.assert_close(moved.loss, out.loss, rtol=0, atol=30 * tolerance)
    torch.testing.assert_close(moved_grad, grad, rtol=0, atol=30 * tolerance)


@settings(max_examples=100, deadline=None)
@given(row=ROWS, data=st.data())
def test_token_loss_stays_within_its_bounds(row: list[float], data: st.DataObject) -> None:
    targets = torch.tensor([data.draw(st.integers(0, len(row) - 1))])
    out, grad = run_loss(torch.tensor([row]), targets, ObjectiveConfig(gamma=2, entropy_grad=True))
    assert 0 <= out.entropy.item() <= math.log(len(row)) * (1 + 1e-6)
    assert out.nll.item() >= 0
    # Probabilities sum to 1, so the gradient sums to 0 up to the rounding of its elements.
    assert abs(grad.double().sum().item()) <= 1e-5 * (1 + grad.abs().max().item())
