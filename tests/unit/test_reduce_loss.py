"""reduce_loss on one rank against the float64 oracle; tests/parallel has it on two."""

import pytest
import torch
from support.helpers import IGNORED, error, oracle

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import reduce_loss, token_loss

MILE = ObjectiveConfig()


def _tokens(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float64 logits and targets for a mask, and the logits again as a leaf."""
    random = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(*mask.shape, 17, generator=random, dtype=torch.float64)
    targets = torch.randint(17, mask.shape, generator=random)
    return logits, targets, logits.clone().requires_grad_()


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]),
        torch.tensor([[True, False, True], [True, True, False]]),
        torch.tensor([[2, 0, 1], [1, 1, 3]]),
        torch.tensor([[0.5, 0.25, 0.0], [0.0, 1.0, 0.125]], dtype=torch.bfloat16),
    ],
    ids=["float", "bool", "int", "fractional"],
)
def test_reduce_loss_is_the_weighted_mean(mask: torch.Tensor) -> None:
    logits, targets, leaf = _tokens(mask)
    truth = oracle(logits, targets)
    m = mask.double()
    alphas = {"none": 1.0, "local": m.sum() / (m * truth.weight).sum()}
    alphas["global"] = alphas["official"] = alphas["local"]  # one rank alone
    for mode, alpha in alphas.items():
        config = ObjectiveConfig(normalize=mode)
        loss = reduce_loss(token_loss(leaf, targets, config), mask, config)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert error(loss, alpha * (m * truth.loss).sum() / m.sum()) <= 1e-14
        assert error(grad, alpha * m.unsqueeze(-1) * truth.grad / m.sum()) <= 1e-14


def test_reduce_loss_leaves_ignored_tokens_out_of_alpha() -> None:
    mask = torch.ones(2, 3)
    logits, targets, leaf = _tokens(mask)
    targets[0] = IGNORED
    loss = reduce_loss(token_loss(leaf, targets, MILE), mask, MILE)
    truth = oracle(logits, targets)
    alpha = 3 / truth.weight[1].sum()
    assert error(loss, alpha * truth.loss.sum() / 6) <= 1e-14


def test_reduce_loss_gives_masked_tokens_exactly_zero_even_at_nan() -> None:
    logits = torch.randn(2, 3, 5)
    logits[0, 0] = torch.nan
    leaf = logits.requires_grad_()
    targets, mask = torch.tensor([[1, 9, 2], [0, 1, 2]]), torch.tensor([[0, 0, 1], [1, 1, 1.0]])
    for mode in ("global", "local", "none", "official"):
        config = ObjectiveConfig(normalize=mode)
        loss = reduce_loss(token_loss(leaf, targets, config), mask, config)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite()
        assert torch.equal(grad[0, :2], torch.zeros(2, 5))
        assert (grad[mask == 1] != 0).all()


def test_reduce_loss_of_an_unmasked_invalid_target_is_nan() -> None:
    leaf = torch.randn(2, 5, requires_grad=True)
    loss = reduce_loss(token_loss(leaf, torch.tensor([5, 1]), MILE), torch.ones(2), MILE)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.isnan()
    assert grad.isnan().any()


@pytest.mark.parametrize("mode", ["global", "local", "none", "official"])
def test_reduce_loss_of_a_fully_masked_micro_batch_is_zero(mode: str) -> None:
    config, leaf = ObjectiveConfig(normalize=mode), torch.randn(3, 5, requires_grad=True)
    loss = reduce_loss(token_loss(leaf, torch.tensor([0, 1, 2]), config), torch.zeros(3), config)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (loss.item(), loss.dtype) == (0, torch.float32)
    assert torch.equal(grad, torch.zeros(3, 5))


@pytest.mark.parametrize(
    "mask", [torch.ones(3), torch.ones(3, 2), torch.ones(2, 3, dtype=torch.complex64)], ids=str
)
def test_reduce_loss_refuses_a_mask_that_does_not_fit(mask: torch.Tensor) -> None:
    out = token_loss(torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), MILE)
    with pytest.raises(ValueError, match=r"mask is .*shape \(2, 3\)"):
        reduce_loss(out, mask, MILE)


def test_reduce_loss_refuses_an_alpha_over_more_than_it_sees() -> None:
    config = ObjectiveConfig(normalize="batch")
    out = token_loss(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64), config)
    with pytest.raises(ValueError, match=r"divide the sum of mask \* out.loss"):
        reduce_loss(out, torch.ones(2), config)
    ce = ObjectiveConfig("ce", normalize="batch")  # which forms no alpha
    out = token_loss(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64), ce)
    assert reduce_loss(out, torch.ones(2), ce).isfinite()
