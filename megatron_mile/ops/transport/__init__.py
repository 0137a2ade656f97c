"""Transport: what a token's probability mass pays on its way to the target, on one shard.

For a row z of logits with maximum m, local target y, and the products P_k of the cost row of k with
the target's of unit length, the distance is c_k = 1 - P_k / norm_k in [0, 2], c_y = 0, and

    R = sum_{k != y} e^(z_k - m),   D = sum_k e^(z_k - m) c_k

beside the token statistics, which may share the exponentials. D is a sum of terms >= 0, never the
difference 1 - sum q K, so that it is never negative and keeps its digits near 0; R keeps those of
1 - p_y. The products of all tokens never exist in a tensor of their own: `blocked` asks for them a
block of rows at a time.
"""

from typing import Protocol

import torch


class Transport(Protocol):
    """What an implementation (a module of this folder) offers, for one block of rows.

    Logits are [n, V] in fp64, fp32, bf16 or fp16, products [n, V] in any of these; scale [V] is
    1 / norm of each cost row, 0 for one that is at distance 1 from all; local targets are int64
    [n], negative where the shard does not hold the target. Arithmetic and scale are fp64 for fp64
    logits and fp32 for the others. R and D are exact in their ratio where it matters: with nearly
    all mass on one token, the gradient there is the small difference of its distance and that
    ratio, times a slope that may be 100.
    """

    def transport_block(
        self,
        logits: torch.Tensor,
        products: torch.Tensor,
        scale: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Return the token statistics (m, S, T, z_y) and (R, D), fp64 [6, n].

        Nothing is overwritten.
        """
        ...

    def transport_block_backward(
        self,
        logits: torch.Tensor,
        products: torch.Tensor,
        scale: torch.Tensor,
        targets: torch.Tensor,
        m: torch.Tensor,
        mean: torch.Tensor,
        coefficients: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write the gradient: e^(z - m) * (flat + slope * (c - mean)), and `peak` at the target.

        Args:
            logits: As in the forward.
            products: As in the forward.
            scale: As in the forward.
            targets: As in the forward.
            m: Maxima, [n], in the dtype of the arithmetic.
            mean: DEMD, [n], in m's dtype; its difference from c comes first because large slopes
                belong to rows where it is small.
            coefficients: (flat, peak, slope), [3, n], in m's dtype. A row whose coefficients are
                all 0 gets a gradient of exactly 0 whatever its logits hold.
            out: Where to write, [n, V]; may be the logits or the products.
        """
        ...
