"""Pretrain with another loss function than the example's: `... --own KIND [the job's flags]`.

From the second micro-batch on a quarter of the tokens is masked, other ones on each rank, as many
on all; so every kind that is a mean over the tokens that count trains the same.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mile import set_token_weight
from megatron_mile.cpu_mode import WITHOUT_APEX, WITHOUT_TE, missing_flags
from megatron_mile.launch import one_line_errors, prepare_script

with one_line_errors():
    prepare_script()  # before the example binds what it patches
sys.argv += missing_flags(sys.argv, WITHOUT_TE + WITHOUT_APEX)

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))
import pretrain_gpt as example  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

Loss = Callable[[torch.Tensor], Any]
step, calls = example.forward_step, 0


class LossOfAClass:
    """A loss function that is an object."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def __call__(self, output: torch.Tensor) -> Any:
        return example.loss_func(self.mask, output)


def keyword_loss(labels: torch.Tensor, output: torch.Tensor, scale: torch.Tensor) -> Any:
    """As ms-swift's: labels first, the mask by a name of its own."""
    return example.loss_func(scale, output)


def averaged_loss(labels: torch.Tensor, mask: torch.Tensor, output: torch.Tensor) -> Any:
    """As older forks': a mean, and a report that is averaged over the ranks already."""
    mean = (output * mask).sum() / mask.sum()
    report = mean.detach().clone()
    torch.distributed.all_reduce(report)
    return mean, {"lm loss": report / torch.distributed.get_world_size()}


def squared_loss(mask: torch.Tensor, output: torch.Tensor) -> Any:
    return example.loss_func(mask, output**2)


def kinds(labels: torch.Tensor, mask: torch.Tensor) -> dict[str, Loss]:
    plain = functools.partial(example.loss_func, mask)
    return {
        "position": plain,
        "evaluation-mode": plain,
        "empty-rank": plain,
        "late-label": plain,
        "weighted": functools.partial(example.loss_func, torch.ones_like(mask)),
        "keyword": functools.partial(keyword_loss, labels, scale=mask),
        "closure": lambda output: example.loss_func(mask, output),
        "class": LossOfAClass(mask),
        "averaged": functools.partial(averaged_loss, labels, mask),
        "squared": functools.partial(squared_loss, mask),
    }


def own_mask(kind: str, like: torch.Tensor) -> torch.Tensor:
    """The mask of this micro-batch on this rank."""
    rank = parallel_state.get_data_parallel_rank()
    if kind == "empty-rank" and rank == 1:
        return torch.zeros_like(like)
    places = torch.arange(like.numel(), device=like.device).view_as(like)
    return torch.ones_like(like) if calls == 1 else ((places + rank) % 4 != 0).float()


def forward_step(kind: str, iterator: Any, model: Any) -> Any:
    """The example's step with a loss function, a mode or a label of another kind."""
    global calls
    calls += 1
    batches: list[Any] = []

    def get_batch(*args: Any) -> list[Any]:
        batches[:] = get_whole_batch(*args)
        if kind == "weighted":  # the mask as weights of tokens, which all count
            set_token_weight(own_mask(kind, batches[2]))
        if kind == "late-label" and calls == 3:
            batches[1][0, 5] = 1 << 20
        return batches

    example.get_batch = get_batch
    if kind == "evaluation-mode":
        model.eval()
    output, _ = step(iterator, model)
    mask = own_mask(kind, batches[2])
    return output, kinds(batches[1], mask)[kind]


if __name__ == "__main__":
    at = sys.argv.index("--own")
    _, chosen = sys.argv[at : at + 2]
    del sys.argv[at : at + 2]
    get_whole_batch = example.get_batch
    example.forward_step = functools.partial(forward_step, chosen)
    with one_line_errors():
        example.main()
