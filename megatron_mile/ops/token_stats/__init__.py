"""Token statistics: four numbers per token and shard from which nll, entropy and gradient follow.

For a row z of logits, with local target y,

    m = max_j z_j,   S = sum_j e^(z_j - m),   T = sum_j e^(z_j - m) (z_j - m),   z_y

A masked entry (z_j = -inf) counts 0. A shard without a finite entry, or without any, has m = -inf
and S = T = 0. z_y is NaN where the shard does not hold the target. A NaN or +inf among the entries
makes S and T NaN, and leaves m open.

Label smoothing needs two more, and some weights another one:

    U = sum_j (z_j - m),   n = number of columns,   Q = sum_j e^(2 (z_j - m))

A masked entry makes U -inf. A shard without columns has U = n = Q = 0.
"""

from typing import NamedTuple, Protocol

import torch

from megatron_mile.ops.blocks import Coefficients


class Wanted(NamedTuple):
    """Which statistics follow the four, in this order."""

    shifts: bool = False
    """U and n."""
    squares: bool = False
    """Q."""

    @property
    def number(self) -> int:
        """How many statistics there are in all."""
        return 4 + 2 * self.shifts + self.squares


FOUR = Wanted()


class TokenStats(Protocol):
    """What an implementation (a module of this folder) offers.

    Logits are [..., V] in fp64, fp32, bf16 or fp16 with any strides; local targets are int64 [...]
    in [0, V), or negative where the shard does not hold the target. Arithmetic and statistics are
    fp64 for fp64 logits and fp32 for the others. V may be 0.
    """

    def token_stats(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        consume: bool = False,
        wanted: Wanted = FOUR,
    ) -> torch.Tensor:
        """Return (m, S, T, z_y) and what else is wanted, [4 to 7, ...], contiguous.

        Args:
            logits: Read only, unless `consume` is set.
            targets: The columns of the targets.
            consume: The logits may be overwritten with whatever helps the backward, which must be
                called with `consumed`. An implementation is free to leave them as they are.
            wanted: Statistics beyond the four.
        """
        ...

    def token_stats_backward(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        m: torch.Tensor,
        coefficients: Coefficients,
        out: torch.Tensor | None = None,
        consumed: bool = False,
    ) -> torch.Tensor:
        """Return the gradient: e^(z - m) * (flat + tilt * (z - m)) + base, `peak` at the target.

        Args:
            logits: As the forward left them.
            targets: As in the forward.
            m: The maximum that the forward returned, [...].
            coefficients: Each [...], in m's dtype; no tilt with `consumed`. A row where all are 0
                gets a gradient of exactly 0 whatever its logits hold.
            out: Where to write, of the logits' shape and dtype; may be the logits themselves, and
                must be with `consumed`. No other overlap.
            consumed: The forward ran with `consume`.

        Returns:
            `out`, or a new tensor of the logits' shape and dtype.
        """
        ...
