"""Focal Loss: tokens that the model already predicts well count less.

    loss_t = alpha * (1 - p_y)^gamma * nll_t,    p_y = e^(-nll_t)

Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002, equation 4; the weight is
held constant in the gradient, as in the MiLe authors' baseline (`FocalLoss` in utils/trainer.py of
github.com/suu990901/LLaMA-MiLe-Loss) and unlike Lin et al. Where that baseline differs: it computes
in the model's dtype, and ignored tokens enter its alpha with weight 0, which raises alpha.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_mile.config import ObjectiveConfig


def weight(nll: torch.Tensor, entropy: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Return w = (1 - p_y)^gamma in [0, 1]; 1 for gamma = 0 even at p_y = 1."""
    # expm1 keeps the digits of 1 - p_y where p_y is close to 1.
    return (-torch.expm1(-nll)).clamp(min=0).pow(config.gamma)


def weight_slope(nll: torch.Tensor, entropy: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Return dw/dH = 0: the weight does not contain the entropy."""
    return torch.zeros_like(entropy)
