"""Tokens split over ranks: the normaliser alpha of the weighted loss.

    alpha = sum(M) / sum(M w)

keeps the mean weight at 1, so that the weighted loss stays comparable with cross-entropy.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_mile.parallel import ProcessGroup, group_size


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return mask * values in fp64, exactly 0 (and with gradient 0) where the mask is 0."""
    return torch.where(mask != 0, values, 0) * mask.double()


def normaliser(
    weight: torch.Tensor, mask: torch.Tensor, mode: str, group: ProcessGroup | None = None
) -> torch.Tensor:
    """Return alpha, without waiting for the device.

    Args:
        weight: w of every token, floating.
        mask: M, shape of `weight`, >= 0, any real or bool dtype; fractions count as such.
        mode: "global": both sums over all ranks of `group`, one all-reduce of two numbers.
            "local": both sums on this rank. "none": alpha = 1. "official": the mean of
            sum(M) / sum(M w) over the ranks that have tokens, one all-reduce of two numbers. The
            MiLe authors' code takes that mean over all tokens, ignored ones too; here masked tokens
            are left out, and the two agree where nothing is masked. It is >= the global value for
            ranks with equal numbers of tokens.
        group: Ranks that hold other tokens of the micro-batch; None for this rank alone.

    Returns:
        alpha, 0-d, dtype of `weight`, detached; 1 where a sum is 0.

    Raises:
        ValueError: The mode is unknown.
    """
    # fp64: an fp32 sum over a large micro-batch loses digits.
    sums = torch.stack([mask.double().sum(), masked(weight.detach(), mask).sum()])
    return start_normaliser(sums, mode, group)().to(weight.dtype)


def start_normaliser(
    sums: torch.Tensor, mode: str, group: ProcessGroup | None = None
) -> Callable[[], torch.Tensor]:
    """Start to form alpha, and return what waits for it.

    Args:
        sums: (sum(M), sum(M w)) of this rank, fp64 [2]; read only.
        mode: As in `normaliser`.
        group: As in `normaliser`.

    Returns:
        What returns alpha, fp64 0-d.

    Raises:
        ValueError: The mode is unknown.
    """
    if mode not in ("global", "local", "none", "official"):
        raise ValueError(f"mode is {mode!r}; expected global, local, none or official")
    if mode == "none":
        return lambda: sums.new_ones(())
    if mode == "official":
        has_tokens = sums[0].sign()
        sums = torch.stack([_ratio(sums) * has_tokens, has_tokens])
    if mode == "local" or group_size(group) == 1:
        return lambda: _ratio(sums)
    shared = sums.clone() if mode == "global" else sums
    work = dist.all_reduce(shared, group=group, async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return _ratio(shared)

    return wait


def _ratio(sums: torch.Tensor) -> torch.Tensor:
    """Return sums[0] / sums[1], 1 where either is 0."""
    return (sums[0] / sums[1]).masked_fill_((sums == 0).any(), 1)


def sum_by_group(
    values: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor, number: int
) -> torch.Tensor:
    """Return the sums of mask * values and of the mask over the tokens of each group.

    Args:
        values: [...]; tokens with mask 0 add exactly 0, NaN or not.
        mask: Part of each token, [...].
        groups: Which group a token is of, integers [...].
        number: Of groups.

    Returns:
        fp64 [number, 2], always in the same order of additions.
    """
    parts = torch.stack([masked(values, mask), mask.double()], -1).view(-1, 1, 2)
    is_of = groups.reshape(-1, 1, 1) == torch.arange(number, device=groups.device).unsqueeze(-1)
    return torch.where(is_of, parts, 0).sum(0)


def sum_over_ranks(sums: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Add `sums` up over the ranks of `group`, in place; None for this rank alone."""
    if group_size(group) > 1:
        dist.all_reduce(sums, group=group)
    return sums
