"""What is optimised, as a pure function of a token's statistics: the weight of its cross-entropy.

An objective is a module with `weight` and `weight_slope` (see `Objective`), so a new one is a file
here and a line in `OBJECTIVES`; `emo` has a `mix` beside them, for a second term. No kernel, no
collective and nothing of the host may live here, and nothing of this package is imported but the
configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from megatron_mile.objectives import emo, focal, mile

if TYPE_CHECKING:
    from megatron_mile.config import ObjectiveConfig


class Objective(Protocol):
    """The weight w of loss_t = w_t * nll_t, and its slope in the entropy.

    nll and entropy are floating tensors of one shape, in nats and >= 0; both functions return a
    tensor of that shape and dtype, and are element-wise.
    """

    def weight(
        self, nll: torch.Tensor, entropy: torch.Tensor, config: ObjectiveConfig
    ) -> torch.Tensor:
        """Return w(nll, H)."""
        ...

    def weight_slope(
        self, nll: torch.Tensor, entropy: torch.Tensor, config: ObjectiveConfig
    ) -> torch.Tensor:
        """Return dw/dH, used only where the gradient flows through the entropy."""
        ...


class _CrossEntropy:
    """Plain cross-entropy: w = 1."""

    def weight(
        self, nll: torch.Tensor, entropy: torch.Tensor, config: ObjectiveConfig
    ) -> torch.Tensor:
        return torch.ones_like(entropy)

    def weight_slope(
        self, nll: torch.Tensor, entropy: torch.Tensor, config: ObjectiveConfig
    ) -> torch.Tensor:
        return torch.zeros_like(entropy)


OBJECTIVES: dict[str, Objective] = {"ce": _CrossEntropy(), "mile": mile, "focal": focal, "emo": emo}
# Whose weight is 1 for every token, so that alpha is 1 however it is formed.
UNWEIGHTED = ("ce", "emo")
