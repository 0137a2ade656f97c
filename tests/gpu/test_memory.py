"""What the losses allocate on a card, by the allocator's own count."""

import pytest
import torch

from megatron_mile import ObjectiveConfig, linear_token_loss, token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MIB = 1 << 20


def peak_mib(logits: torch.Tensor, targets: torch.Tensor, inplace: bool) -> float:
    """Return what forward and backward take beyond their inputs, MiB, in a second call."""
    for _ in range(2):  # the first compiles
        consumed = None
        used = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        consumed = logits * 1
        loss = token_loss(consumed, targets, ObjectiveConfig(), inplace=inplace).loss
        (gradient,) = torch.autograd.grad(loss, consumed, torch.ones_like(loss))
        del gradient, loss
    return (torch.cuda.max_memory_allocated() - used) / MIB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_place_the_loss_allocates_no_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(4096, 32000, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(32000, (4096,), device="cuda")
    size = logits.nbytes / MIB
    # The consumed copy of the logits is one; a few numbers per token are 2 MiB at the most.
    assert peak_mib(logits, targets, inplace=True) <= size + 2
    assert peak_mib(logits, targets, inplace=False) <= 2 * size + 2


def test_fused_projection_holds_a_block_of_logits() -> None:
    hidden = torch.randn(8192, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(32000, (8192,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    used = torch.cuda.memory_allocated()
    out = linear_token_loss(hidden, weight, targets, ObjectiveConfig(), chunk_tokens=1024)
    torch.autograd.grad(out.loss.sum(), (hidden, weight))
    peak = (torch.cuda.max_memory_allocated() - used) / MIB
    logits, gradients = 8192 * 32000 * 2 / MIB, 32000 * 512 * (4 + 2) / MIB
    assert peak < 0.5 * logits + gradients
