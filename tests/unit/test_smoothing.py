"""Label smoothing, z-loss and deft on one rank: torch's own, the float64 oracle, edges."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import (
    IGNORED,
    assert_close,
    error,
    gradients_of,
    hard_rows,
    oracle,
    run_loss,
    smoothed_configs,
    true_z_loss,
)

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import reduce_loss, token_loss
from megatron_mile.parallel.tokens import normaliser

# Measured: fp64 5.2e-14 (z-loss at logits of 1000), fp32 5.0e-7.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
CONFIGS = {**smoothed_configs(), "deft": ObjectiveConfig("deft")}
FP64 = torch.float64


def _torch_loss(
    logits: torch.Tensor, targets: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return torch's own smoothed cross-entropy and its gradient, in float64."""
    leaf = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(leaf, targets, label_smoothing=eps, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


@pytest.mark.parametrize("eps", [1e-9, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 127, 1003])
def test_smoothed_cross_entropy_is_torchs(vocab: int, dtype: torch.dtype, eps: float) -> None:
    logits, targets = (x[:9] for x in hard_rows(vocab, dtype))  # the others have no target
    out, grad = run_loss(logits, targets, ObjectiveConfig("ce", label_smoothing=eps))
    loss, expected = _torch_loss(logits, targets, eps)
    assert error(out.loss, loss) <= TOLERANCE[dtype]
    assert error(grad, expected) <= TOLERANCE[dtype]
    plain, _ = run_loss(logits, targets, ObjectiveConfig("ce"))
    torch.testing.assert_close(out[1:4], plain[1:4], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("vocab", [1, 3, 127, 1003, 32000])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_token_loss_matches_oracle(name: str, dtype: torch.dtype, vocab: int) -> None:
    config = CONFIGS[name]
    if config.entropy_grad and vocab == 32000:
        # Autograd adds 32000 parts eps / V to a number of 200, which rounds each: 1.2e-11 in fp64.
        pytest.skip("the oracle itself is not exact")
    logits, targets = hard_rows(vocab, dtype)
    out, grad = run_loss(logits, targets, config)
    assert_close((*out[:4], grad), oracle(logits, targets, config), TOLERANCE[dtype])
    assert (out.z_loss is None) == (config.z_loss == 0)
    if out.z_loss is not None:
        exact = true_z_loss(logits, config).masked_fill(~out.valid, 0)
        assert error(out.z_loss, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_of_half_precision_is_rounded_once_or_in_place_twice(
    name: str, dtype: torch.dtype, inplace: bool
) -> None:
    random = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(64, 1003, generator=random)).to(dtype)
    targets = torch.randint(1003, (64,), generator=random)
    truth = oracle(logits, targets, CONFIGS[name])
    leaf = logits.clone().requires_grad_()
    out = token_loss(leaf * 1, targets, CONFIGS[name], inplace=inplace)
    (grad,) = gradients_of(out, leaf)
    for ours, exact in zip(out[:4], truth[:4], strict=True):
        assert error(ours, exact) <= TOLERANCE[torch.float32]
    # fp16 gradients below its smallest normal number lose digits, so tiny is the absolute part.
    rounding = torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
    assert error(grad, truth.grad) <= (1 + inplace) * rounding


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_smoothing_with_a_masked_logit_is_infinite_as_torchs(backend: str, inplace: bool) -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0], [0.5, 0.25, 1.0]], dtype=FP64)
    targets = torch.tensor([0, 2])
    loss, expected = _torch_loss(logits, targets, 0.1)
    assert loss.isinf().tolist() == [True, False]
    config = ObjectiveConfig("ce", label_smoothing=0.1, backend=backend)
    leaf = logits.clone().requires_grad_()
    out = token_loss(leaf * 1, targets, config, inplace=inplace)
    (grad,) = gradients_of(out, leaf)
    assert torch.equal(out.loss.isinf(), loss.isinf())
    assert out.nll.isfinite().all()
    assert error(grad, expected) <= 1e-15


def test_ignored_tokens_are_exactly_zero_whatever_the_logits_hold() -> None:
    logits = torch.tensor([[torch.nan] * 4, [torch.inf, 1, 2, 3], [-torch.inf] * 4, [1, 2, 3, 4]])
    for config in CONFIGS.values():
        out, grad = run_loss(logits, torch.full((4,), IGNORED), config, torch.full((4,), 3.0))
        fields = [x for x in (*out[:4], out.z_loss) if x is not None]
        assert not torch.stack(fields).any()
        assert torch.equal(grad, torch.zeros(4, 4))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_of_nan_is_nan_and_spoils_no_other(name: str) -> None:
    logits, targets = torch.randn(3, 7), torch.tensor([1, 2, 3])
    logits[1, 4] = torch.nan
    out, grad = run_loss(logits, targets, CONFIGS[name])
    assert out.loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_exactly_zero_where_none_comes_in(name: str) -> None:
    logits = torch.stack([torch.full((4,), torch.nan), torch.randn(4), torch.randn(4)])
    targets = torch.tensor([1, 99, 2])  # NaN logits; garbage target; fine
    _, grad = run_loss(logits, targets, CONFIGS[name], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(grad[:2], torch.zeros(2, 4))
    assert (grad[2] != 0).all()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_loss_and_z_loss_have_gradients_of_their_own(backend: str) -> None:
    logits, targets = hard_rows(127, FP64)
    logits, targets = logits[:6], targets[:6]
    config = ObjectiveConfig(label_smoothing=0.1, z_loss=0.02, backend=backend)
    of_loss, of_z = torch.rand(2, 6, dtype=FP64)
    z = logits.clone().requires_grad_()
    (rise,) = torch.autograd.grad(true_z_loss(z, config), z, torch.ones(6, dtype=FP64))
    without = oracle(logits, targets, ObjectiveConfig(label_smoothing=0.1)).grad
    leaf = logits.clone().requires_grad_()
    for used, scales in (([0], (of_loss, 0)), ([1], (0, of_z)), ([0, 1], (of_loss, of_z))):
        out = token_loss(leaf, targets, config)
        pairs = [((out.loss, out.z_loss)[i], (of_loss, of_z)[i]) for i in used]
        (grad,) = torch.autograd.grad([x for x, _ in pairs], leaf, [g for _, g in pairs])
        first, second = (x.unsqueeze(-1) if isinstance(x, torch.Tensor) else x for x in scales)
        assert error(grad, first * without + second * rise) <= TOLERANCE[FP64]


def test_only_loss_and_z_loss_carry_a_gradient() -> None:
    config = ObjectiveConfig(z_loss=1e-3)
    out = token_loss(torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2]), config)
    carries = [x.requires_grad for x in out if x is not None]
    assert carries == [True, False, False, False, False, True]
    assert out.emo is None


def test_reduce_loss_adds_the_z_loss_without_alpha() -> None:
    logits, targets = torch.randn(4, 9, dtype=FP64), torch.tensor([0, 3, 8, 1])
    mask = torch.tensor([1.0, 0, 0.5, 2])
    config = ObjectiveConfig(gamma=2, z_loss=0.1)
    out = token_loss(logits, targets, config)
    assert out.z_loss is not None
    alpha = normaliser(out.weight, mask, "local")
    assert alpha < 0.9
    expected = (mask * (alpha * out.loss + out.z_loss)).sum() / mask.sum()
    assert error(reduce_loss(out, mask, config), expected) <= 1e-15
    # NaN of a token that the mask leaves out stays out, of value and gradient.
    logits[1] = torch.nan
    leaf = logits.requires_grad_()
    loss = reduce_loss(token_loss(leaf, targets, config), mask, config)
    loss.backward()
    assert error(loss, expected) <= 1e-15
    assert leaf.grad is not None
    assert not leaf.grad[1].any()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", ["ce z", "mile smoothed z", "deft smoothed z"])
def test_a_z_loss_leaves_the_loss_and_its_gradient_bit_for_bit(name: str) -> None:
    config = CONFIGS[name]
    logits, targets = hard_rows(127, torch.float32)
    found = []
    for used in (config, dataclasses.replace(config, z_loss=0.0)):
        leaf = logits.clone().requires_grad_()
        out = token_loss(leaf, targets, used)
        found.append((*out[:4], *torch.autograd.grad(out.loss, leaf, torch.ones_like(out.loss))))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", smoothed_configs())
def test_weights_of_tokens_leave_the_z_loss(name: str) -> None:
    config = CONFIGS[name]
    logits, targets = (x[:9] for x in hard_rows(64, FP64))
    weights = 3 * torch.rand(9, dtype=FP64)
    of_loss, of_z = torch.rand(2, 9, dtype=FP64)
    plain = dataclasses.replace(config, z_loss=0.0)
    truth = oracle(logits, targets, plain, of_loss * weights)
    z = logits.clone().requires_grad_()
    true_z = true_z_loss(z, config).masked_fill(targets == IGNORED, 0)
    (rise,) = torch.autograd.grad(true_z, z, of_z) if config.z_loss else (torch.zeros(()),)
    leaf = logits.clone().requires_grad_()
    out = token_loss(leaf, targets, config, token_weight=weights, accuracy=True)
    pairs = [(x, g) for x, g in ((out.loss, of_loss), (out.z_loss, of_z)) if x is not None]
    (grad,) = torch.autograd.grad([x for x, _ in pairs], leaf, [g for _, g in pairs])
    assert error(out.loss, truth.loss * weights) <= TOLERANCE[FP64]
    assert out.z_loss is None or error(out.z_loss, true_z) <= TOLERANCE[FP64]
    assert error(grad, truth.grad + rise) <= TOLERANCE[FP64]
    hits = (logits.argmax(-1) == targets) & (targets != IGNORED)
    assert out.accuracy is not None
    assert (out.accuracy >= hits).all()  # where logits are equal any of them counts


ROWS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(row=ROWS, eps=st.floats(0, 0.99), data=st.data())
def test_smoothed_loss_is_torchs_for_any_row(
    row: list[float], eps: float, data: st.DataObject
) -> None:
    logits = torch.tensor([row], dtype=FP64)
    targets = torch.tensor([data.draw(st.integers(0, len(row) - 1))])
    out, grad = run_loss(logits, targets, ObjectiveConfig("ce", label_smoothing=eps))
    loss, expected = _torch_loss(logits, targets, eps)
    assert error(out.loss, loss) <= 1e-13
    assert error(grad, expected) <= 1e-13


@settings(max_examples=100, deadline=None)
@given(row=ROWS, data=st.data())
def test_deft_stays_between_cross_entropy_and_the_weight_p(
    row: list[float], data: st.DataObject
) -> None:
    targets = torch.tensor([data.draw(st.integers(0, len(row) - 1))])
    out, _ = run_loss(torch.tensor([row]), targets, ObjectiveConfig("deft"))
    assert torch.exp(-out.nll).item() * (1 - 1e-5) <= out.weight.item() <= 1
