"""What is computed of a few numbers per token, between the two passes over the logits.

    targets                    --locate-->   column in this shard, whether there is a loss
    (m, S, T, z_y) of shards   --join-->     the same of the whole vocabulary, nll, entropy, ...
    weight, slope, value       --weigh-->    loss, and the coefficients of this shard's gradient
    incoming gradient          --scale-->    coefficients of the backward
    shares of the loss         --sum_up-->   what alpha and the report need

With label smoothing eps the loss is w ((1 - eps) nll + eps G), with G the cross-entropy against a
uniform target, and z-loss adds a loss of its own, c (ln sum_k e^z_k)^2:

    G = ln S - U / V = mean_k (ln sum_j e^z_j - z_k)

It is little work, of which plain torch would make a hundred launches on a GPU. Weight, slope and
value are the objective's own functions in torch: no implementation knows an objective.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_mile.ops.blocks import NOTHING, Coefficients, Extras
from megatron_mile.ops.token_stats import FOUR, TokenStats, Wanted


class PerToken(Protocol):
    """What an implementation (a module of this folder) offers."""

    def locate(
        self, targets: torch.Tensor, start: int, end: int, ignore_index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the target's column in the shard, int64, -1 where it has none; and valid, bool.

        Args:
            targets: Integers of any width, [...]: ids in the whole vocabulary.
            start: The shard's first id.
            end: Its last id and one.
            ignore_index: Target of tokens that have no loss, which are not valid.
        """
        ...

    def join(self, shards: torch.Tensor, wanted: Wanted = FOUR) -> torch.Tensor:
        """Return (m, S, T, z_y, nll, H) of the whole vocabulary, fp64 [6 to 9, ...], nats.

        Behind them come G and V where shifts are wanted, and sum_k p_k^2 where squares are. Shards
        are added in their order, so that all ranks get the same bits. z_y is NaN where no shard
        holds the target.

        Args:
            shards: (m, S, T, z_y) and what is wanted of each shard, [R, 4 to 7, ...].
            wanted: Statistics beyond the four.
        """
        ...

    def weigh(
        self,
        joined: torch.Tensor,
        maxima: torch.Tensor,
        weight: torch.Tensor | None,
        slope: torch.Tensor | None,
        valid: torch.Tensor,
        extras: Extras = NOTHING,
        value: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, and the coefficients of a gradient at an incoming gradient of 1.

        With p = e^(z-m) / S the gradient w (p - 1_y) - nll w'(H) p (ln p + H) is
        e^(z-m) (flat + tilt (z-m)) - w 1_y; tilt is 0 and left out where w is held constant. At the
        target it is one number per token, peak, so that no rounding of a logit's exponential enters
        p_y - 1. Everything is fp64, because a large gamma amplifies the rounding of H.

        With label smoothing w (p - (1 - eps) 1_y - eps / V) takes the place of w (p - 1_y), and the
        smoothed loss that of nll in tilt; base is -w eps / V. The z-loss has the gradient
        2 c ln(sum_j e^z_j) p, which is flat and peak of its own.

        Args:
            joined: What `join` returned; with label smoothing its shifts.
            maxima: m of this shard, [...]; the coefficients are those of e^(z - m) with it.
            weight: w, [...]; None where it is 1.
            slope: dw/dH, [...]; None where the weight is held constant.
            valid: bool [...]; other tokens get 0 throughout.
            extras: What is added to w * nll.
            value: The loss, [...]; None where it is w * nll. The gradient is the same.

        Returns:
            (loss, nll, H, w), and the z-loss if there is one, [4 or 5, ...] in the dtype of
            `maxima`; and the stacked coefficients, fp64 [2 to 6, ...]: flat, peak, tilt and base as
            far as they are there, then flat and peak of the z-loss.
        """
        ...

    def scale(
        self,
        stacked: torch.Tensor,
        grad: torch.Tensor,
        dtype: torch.dtype,
        smoothed: bool = False,
        z_grad: torch.Tensor | None = None,
    ) -> Coefficients:
        """Return stacked coefficients times grad [...] in `dtype`; exactly 0 where grad is 0.

        Args:
            stacked: What `weigh` returned.
            grad: Incoming gradient of the loss.
            dtype: Of the result.
            smoothed: There is a base.
            z_grad: Incoming gradient of the z-loss, [...]; None where there is no z-loss.
        """
        ...

    def sum_up(
        self,
        mask: torch.Tensor,
        valid: torch.Tensor,
        nll: torch.Tensor,
        entropy: torch.Tensor,
        figures: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return sums over all tokens, fp64 [number of figures + 3].

        Args:
            mask: Part of each token, [...]; where it is 0 a token adds exactly 0, NaN or not.
            valid: bool [...].
            nll: [...]; NaN where no shard held the target, as is H where the logits are NaN.
            entropy: H, [...].
            figures: What is summed up, each [...] and times the mask.

        Returns:
            The sum of the mask; the sum of each figure; how many tokens with a part have no target;
            how many have a negative part.
        """
        ...


def beside(statistics: TokenStats) -> PerToken:
    """Return the implementation that belongs to one of the token statistics."""
    from megatron_mile.ops.per_token import reference
    from megatron_mile.ops.token_stats import chunked
    from megatron_mile.ops.token_stats import reference as plain

    if statistics is plain or statistics is chunked:
        return reference
    from megatron_mile.ops.per_token import kernel

    return kernel
