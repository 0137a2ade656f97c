"""EMO's statistics: the six numbers per token and shard from which its loss and gradient follow.

For a row z of logits with maximum m, local target y, and the products P_k of the cost row of k with
the target's of unit length, the cost is c_k = 1 - P_k / norm_k in [0, 2], c_y = 0, and

    R = sum_{k != y} e^(z_k - m),   C = sum_k e^(z_k - m) c_k

beside the token statistics, which may share the exponentials. Of the whole vocabulary, the distance
is D = C / S. C is a sum of terms >= 0, never the difference S - sum e^(z_k - m) P_k / norm_k, so
that it is never negative and keeps its digits near 0; R keeps those of 1 - p_y. The products of all
tokens never exist in a tensor of their own: `blocked` asks for them a block of rows at a time.
"""

from typing import Protocol

import torch

from megatron_mile.ops.blocks import Coefficients


class EmoStats(Protocol):
    """What an implementation (a module of this folder) offers, for one block of rows.

    Logits are [n, V] in fp64, fp32, bf16 or fp16, products [n, V] in any of these; scale [V] is
    1 / norm of each cost row, 0 for one whose costs are all 1; local targets are int64
    [n], negative where the shard does not hold the target. Arithmetic and scale are fp64 for fp64
    logits and fp32 for the others. R and C are exact in their ratio where it matters: with nearly
    all mass on one token, the gradient there is the small difference of its cost and that ratio,
    times a tilt that may be 100.
    """

    def emo_stats(
        self,
        logits: torch.Tensor,
        products: torch.Tensor,
        scale: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Return the token statistics (m, S, T, z_y) and (R, C), fp64 [6, n].

        Nothing is overwritten.
        """
        ...

    def emo_stats_backward(
        self,
        logits: torch.Tensor,
        products: torch.Tensor,
        scale: torch.Tensor,
        targets: torch.Tensor,
        m: torch.Tensor,
        distance: torch.Tensor,
        coefficients: Coefficients,
        out: torch.Tensor,
    ) -> None:
        """Write the gradient: e^(z - m) * (flat + tilt * (c - D)), and `peak` at the target.

        Args:
            logits: As in the forward.
            products: As in the forward.
            scale: As in the forward.
            targets: As in the forward.
            m: Maxima, [n], in the dtype of the arithmetic.
            distance: D, [n], in m's dtype; its difference from c comes first because large tilts
                belong to rows where it is small.
            coefficients: All three, [n], in m's dtype. A row where all are 0 gets a gradient of
                exactly 0 whatever its logits hold.
            out: Where to write, [n, V]; may be the logits or the products.
        """
        ...
