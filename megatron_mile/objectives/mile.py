"""MiLe Loss: the entropy of the model's own distribution weights a token's cross-entropy.

    loss_t = alpha * (sigma + H_t)^gamma * nll_t,    H_t = -sum_j p_j ln p_j  (nats)

Su et al., "MiLe Loss" (InfoEntropy Loss in version 2), arXiv 2310.19531; the authors' code is
`MiLeLoss` in utils/trainer.py of github.com/suu990901/LLaMA-MiLe-Loss. Where that code differs:

- it takes H of probabilities clamped to [1e-8, 1], which lifts H by up to 0.0059 nats at 32000
  tokens on peaked rows; here H is exact;
- it computes in the model's dtype, so in bf16 during training; here in fp32 (fp64 for fp64);
- sigma is fixed at 1 there, and the weight is always detached (`entropy_grad=False` here);
- its alpha is `normalize="official"`, and counts ignored tokens too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_mile.config import ObjectiveConfig


def weight(nll: torch.Tensor, entropy: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Return w = (sigma + H)^gamma, without unit; 1 for gamma = 0 even at sigma + H = 0."""
    return (config.sigma + entropy).pow(config.gamma)


def weight_slope(nll: torch.Tensor, entropy: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Return dw/dH = gamma (sigma + H)^(gamma-1), per nat; 0 for gamma = 0."""
    if config.gamma == 0:
        return torch.zeros_like(entropy)  # not 0 * (sigma + H)^-1, which is NaN at sigma + H = 0
    return config.gamma * (config.sigma + entropy).pow(config.gamma - 1)
