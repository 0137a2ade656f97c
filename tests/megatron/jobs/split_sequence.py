"""Sequences split over two context-parallel ranks, against float64 of the whole.

A script of test_modes.py: the loss that leaves the loss function, and a whole step through
Megatron's own schedule, DDP and gradient finalisation. The model is a HybridModel of MLPs, which
needs no attention across the ranks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from support import helpers
from support.hook_model import MILE, B, S, batch, build_hybrid, host_loss

from megatron_mile import attach, wrap_forward_step

SAME = 1e-6  # measured 4.7e-7; 3.9e-4 and more with a normaliser of each rank's own
PARTS = 2
_POSITIONS = torch.arange(S)
# Which tokens count, of the two micro-batches; S/2 of each sequence on either rank.
MASKS = {
    "even": [torch.ones(B, S), torch.ones(B, S)],
    "uneven": [(torch.tensor([[2], [5], [8]]) > _POSITIONS).float(), torch.ones(B, S)],
    "rank without tokens": [(_POSITIONS < S // PARTS).float().expand(B, S), torch.ones(B, S)],
    "nothing": [torch.zeros(B, S), (_POSITIONS % 3 > 0).float().expand(B, S)],
}


def mine(whole: torch.Tensor) -> torch.Tensor:
    """This rank's half of [b, s]."""
    return whole.chunk(PARTS, 1)[dist.get_rank()].contiguous()


def step(masks: Any, model: Any) -> Any:
    """A forward step on this rank's half of the next micro-batch."""
    tokens, labels = (mine(x) for x in batch())
    output = model(tokens, None, None, labels=labels)
    return output, functools.partial(host_loss, mine(next(masks)))


class Truth:
    """The unsplit micro-batches in fp64: what a context-parallel size of 1 gives."""

    def __init__(self, model: Any, masks: list[torch.Tensor]) -> None:
        """Weight every micro-batch by its own alpha, formed over the whole sequences."""
        hidden: list[torch.Tensor] = []
        handle = model.decoder.final_norm.register_forward_hook(
            lambda _, args, out: hidden.append(out.detach().double())
        )
        tokens, labels = batch()
        logits = model(tokens, None, None).detach()
        handle.remove()
        self.tokens = helpers.oracle(logits, labels, MILE)
        self.hidden, self.masks = hidden[0], masks
        weights = [(mask * self.tokens.weight).sum() for mask in masks]
        self.alphas = [
            mask.sum() / total if total > 0 else torch.ones_like(total)
            for mask, total in zip(masks, weights, strict=True)
        ]

    def sums(self) -> torch.Tensor:
        """Sum of alpha w nll of each micro-batch."""
        pairs = zip(self.alphas, self.masks, strict=True)
        return torch.stack([(alpha * mask * self.tokens.loss).sum() for alpha, mask in pairs])

    def gradient(self, shares: list[torch.Tensor]) -> torch.Tensor:
        """Gradient of the output weights, where each token counts with these shares [b, s]."""
        pairs = zip(self.alphas, shares, strict=True)
        upstream = sum(alpha * share.double() for alpha, share in pairs).unsqueeze(-1)
        return torch.einsum("bsv,sbh->vh", upstream * self.tokens.grad, self.hidden)


def host_shares(masks: list[torch.Tensor], per_token: bool) -> list[torch.Tensor]:
    """What the host's schedule makes of the loss sums.

    With a loss per token it is that of the unsplit batch. Without, Megatron takes the mean of the
    ranks' means, which is that of the unsplit batch only if all hold equally many tokens.
    """
    if per_token:
        return [mask / sum(m.sum() for m in masks) for mask in masks]
    parts = [mask.view(B, PARTS, -1) for mask in masks]
    means = [part / part.sum((0, 2), keepdim=True).clamp(min=1) for part in parts]
    return [mean.reshape(B, S) / PARTS / len(masks) for mean in means]


def check_loss(masks: list[torch.Tensor], per_token: bool) -> None:
    """Compare what the loss functions hand to the host, and its gradient, with the unsplit batch.

    That is (loss sum, number of tokens), which the ranks' hosts add up or divide as they do for
    their own cross-entropy.
    """
    model = build_hybrid("--", calculate_per_token_loss=per_token)
    truth = Truth(model, masks)
    attach(model, MILE)
    forward_step, iterator = wrap_forward_step(step, MILE), iter(masks)
    for mask, alpha, expected in zip(masks, truth.alphas, truth.sums(), strict=True):
        output, loss_func = forward_step(iterator, model)
        loss, count, report = loss_func(output)
        loss.backward()
        figures = torch.stack([loss.detach(), count, report["mile weight"][0]]).double()
        dist.all_reduce(figures)
        assert helpers.error(figures[0], expected) < SAME
        assert figures[1] == mask.sum()
        if mask.any():
            assert helpers.error(figures[1] / figures[2], alpha) < SAME
    gradient = model.output_layer.weight.grad
    dist.all_reduce(gradient)
    assert helpers.error(gradient, truth.gradient(masks)) < SAME


def check_step(masks: list[torch.Tensor], per_token: bool) -> None:
    """Compare one step over two micro-batches, through schedule, DDP and finalisation."""
    model = build_hybrid("--", calculate_per_token_loss=per_token)
    truth = Truth(model, masks)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    attach(ddp, MILE)
    reports = get_forward_backward_func()(
        forward_step_func=wrap_forward_step(step, MILE),
        data_iterator=iter(masks),
        model=ddp,
        num_microbatches=len(masks),
        seq_length=S,
        micro_batch_size=B,
    )
    found = torch.stack([report["mile loss"] for report in reports])
    dist.all_reduce(found)
    assert helpers.error(found[:, 0], truth.sums()) < SAME
    assert torch.equal(found[:, 1], torch.stack([mask.sum() for mask in masks]))
    expected = truth.gradient(host_shares(masks, per_token))
    assert helpers.error(model.output_layer.weight.main_grad, expected) < SAME


def main() -> None:
    """Run all cases; the even one also against the gradient of the unsplit batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=PARTS)
    model_parallel_cuda_manual_seed(1)
    for masks in MASKS.values():
        for per_token in (False, True):
            check_loss(masks, per_token)
            check_step(masks, per_token)
    truth = Truth(build_hybrid("--"), MASKS["even"])
    plain, unsplit = (truth.gradient(host_shares(truth.masks, kind)) for kind in (False, True))
    assert helpers.error(plain, unsplit) < 1e-14
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
