"""Transport: what a token's probability mass pays on its way to the target, on one shard.

For a row z of logits with maximum m, local target y, and the cosines K_k of the angles between the
cost rows of k and of the target, the distance is c_k = max(0, 1 - K_k), c_y = 0, and

    R = sum_{k != y} e^(z_k - m),   D = sum_k e^(z_k - m) c_k

D is a sum of terms >= 0, never the difference 1 - sum q K, so that it is never negative and keeps
its digits near 0; R keeps those of 1 - p_y. The cosines of all tokens never exist in a tensor of
their own: `blocked` asks for them a block of rows at a time.
"""

from typing import Protocol

import torch


class Transport(Protocol):
    """What an implementation (a module of this folder) offers, for one block of rows.

    Logits are [n, V] in fp64, fp32, bf16 or fp16, cosines [n, V] in any of these; local targets are
    int64 [n], negative where the shard does not hold the target; m [n] is the maximum from the
    token statistics. Arithmetic and sums are fp64 for fp64 logits and fp32 for the others.
    """

    def transport_block(
        self,
        logits: torch.Tensor,
        cosines: torch.Tensor,
        targets: torch.Tensor,
        m: torch.Tensor,
    ) -> torch.Tensor:
        """Return (R, D), [2, n], in m's dtype; nothing is overwritten."""
        ...

    def transport_block_backward(
        self,
        logits: torch.Tensor,
        cosines: torch.Tensor,
        targets: torch.Tensor,
        m: torch.Tensor,
        mean: torch.Tensor,
        coefficients: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write the gradient: e^(z - m) * (flat + slope * (c - mean)), and `peak` at the target.

        Args:
            logits: As in the forward.
            cosines: As in the forward.
            targets: As in the forward.
            m: As in the forward.
            mean: DEMD, [n], in m's dtype; its difference from c comes first because large slopes
                belong to rows where it is small.
            coefficients: (flat, peak, slope), [3, n], in m's dtype. A row whose coefficients are
                all 0 gets a gradient of exactly 0 whatever its logits hold.
            out: Where to write, [n, V]; may be the logits or the cosines.
        """
        ...
