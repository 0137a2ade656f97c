"""Sequences split over two context-parallel ranks, against float64 of the whole.

A script of test_modes.py, through Megatron's own schedule, DDP and gradient finalisation. The model
is a HybridModel of MLPs, which needs no attention across the ranks.
"""

from __future__ import annotations

import functools
from typing import Any

import helpers
import torch
import torch.distributed as dist
from hook_model import MILE, B, S, batch, build_hybrid, host_loss
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_mile import attach, wrap_forward_step

SAME = 5e-7  # measured 6.1e-8; 3.9e-4 and more with a normaliser of each rank's own
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


def truth(model: Any, masks: list[torch.Tensor], per_token: bool) -> tuple[torch.Tensor, ...]:
    """Sums of alpha w nll of each micro-batch, and the gradient of the output weights, in fp64.

    With a loss per token the gradient is that of the unsplit batch. Without, Megatron takes the
    mean of the ranks' means, which is that of the unsplit batch only if all hold equally many.
    """
    hidden: list[torch.Tensor] = []
    handle = model.decoder.final_norm.register_forward_hook(
        lambda _, args, out: hidden.append(out.detach().double())
    )
    tokens, labels = batch()
    logits = model(tokens, None, None).detach()
    handle.remove()
    whole = helpers.oracle(logits, labels, "mile", MILE.gamma, MILE.sigma)
    sums, upstreams = [], []
    for mask in masks:
        weights = (mask * whole.weight).sum()
        alpha = mask.sum() / weights if weights > 0 else 1.0
        halves = mask.view(B, PARTS, -1).sum((0, 2)).clamp(min=1)
        means = mask.view(B, PARTS, -1) / halves.view(1, PARTS, 1) / PARTS / len(masks)
        share = mask / sum(m.sum() for m in masks) if per_token else means.reshape(B, S)
        sums.append((alpha * mask * whole.loss).sum())
        upstreams.append(alpha * share.double())
    upstream = sum(upstreams).unsqueeze(-1) * whole.grad
    return torch.stack(sums), torch.einsum("bsv,sbh->vh", upstream, hidden[0])


def check(masks: list[torch.Tensor], per_token: bool) -> None:
    """Compare one step over two micro-batches."""
    model = build_hybrid("--", calculate_per_token_loss=per_token)
    sums, gradient = truth(model, masks, per_token)
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
    assert helpers.error(found[:, 0], sums) < SAME
    assert torch.equal(found[:, 1], torch.stack([mask.sum() for mask in masks]))
    assert helpers.error(model.output_layer.weight.main_grad, gradient) < SAME


def main() -> None:
    """Run all cases; the even one also against the gradient of the unsplit batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=PARTS)
    model_parallel_cuda_manual_seed(1)
    for masks in MASKS.values():
        for per_token in (False, True):
            check(masks, per_token)
    model = build_hybrid("--")
    plain, unsplit = (truth(model, MASKS["even"], kind)[1] for kind in (False, True))
    assert helpers.error(plain, unsplit) < 1e-14
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
