"""Wrapped training steps of a GPTModel's loss on the GPU, run by test_hook_on_a_card.py.

    python hook_on_a_card.py FOLDER

The logits are given, so that whatever waits or allocates is the hook's and the loss function's.
Without a GPU it runs in CPU mode, which shows that the script runs and no more.
"""

# ruff: noqa: E402  (CPU mode comes before the first import of Megatron)

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

CARD = torch.cuda.is_available()
if not CARD:
    from megatron_mile import cpu_mode

    cpu_mode.enable()  # before Megatron is imported

from megatron.core import parallel_state
from support.helpers import error, oracle
from support.hook_model import MASK, MILE, B, S, V, batch, build_model, host_loss

import megatron_mile
from megatron_mile import ObjectiveConfig


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the card."""
    if CARD:
        torch.cuda.set_sync_debug_mode("error")
    yield
    if CARD:
        torch.cuda.set_sync_debug_mode("default")


def forward_step(batches: Iterator[Any], model: Any) -> Any:
    """A forward step in the form of Megatron's, of given logits [s, b, V]."""
    logits, labels, mask = next(batches)
    return model.compute_language_model_loss(labels, logits * 1), partial(host_loss, mask)


def assert_exact(logits: torch.Tensor, loss: torch.Tensor, config: ObjectiveConfig) -> None:
    """Compare the loss sum and the gradient of the logits with float64.

    On CPUs they are off by up to 1.1e-7 and 2.4e-7.
    """
    truth = oracle(logits.transpose(0, 1).cpu(), batch()[1], config)
    alpha = 1 if config.normalize == "none" else MASK.sum() / (truth.weight * MASK).sum()
    assert error(loss.cpu(), alpha * (truth.loss * MASK).sum()) < 1e-6
    assert logits.grad is not None
    assert error(logits.grad.transpose(0, 1).cpu(), alpha * MASK.unsqueeze(-1) * truth.grad) < 1e-6


def check_steps(config: ObjectiveConfig, model: Any) -> None:
    """Make three steps, of which only the first may wait for the card."""
    megatron_mile.install(config)
    step = megatron_mile.wrap_forward_step(forward_step, config)
    labels, mask = batch()[1].cuda(), MASK.cuda()
    for number in range(3):
        logits = torch.randn(S, B, V, generator=torch.Generator().manual_seed(number)).cuda()
        logits.requires_grad_()
        with no_waiting() if number else contextlib.nullcontext():
            output, loss_func = step(iter([(logits, labels, mask)]), model)
            loss, _, report = loss_func(output)
            loss.backward()
        assert_exact(logits, loss.detach(), config)
        assert set(report) == {"lm loss", "mile loss", "mile entropy", "mile weight"}


def main(folder: str) -> None:
    """Check every way to form alpha, with one model."""
    store = torch.distributed.FileStore(f"{folder}/store", 1)
    backend = "nccl" if CARD else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model = build_model().cuda()
    for normalize in ("global", "local", "official", "none"):
        check_steps(ObjectiveConfig("mile", gamma=MILE.gamma, normalize=normalize), model)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
