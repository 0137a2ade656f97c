"""Focal Loss: tokens that the model already predicts well count less.

    loss_t = alpha * (1 - p_y)^gamma * nll_t,    p_y = e^(-nll_t)

Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002, equation 4; the weight is
held constant in the gradient, as in the MiLe authors' baseline (`FocalLoss` in utils/trainer.py of
github.com/suu990901/LLaMA-MiLe-Loss) and unlike Lin et al. Where that baseline differs: it computes
in the model's dtype, and ignored tokens enter its alpha with weight 0, which raises alpha.
"""

import torch

from megatron_mile.objectives._objective import GAMMA, Objective


def weight(nll: torch.Tensor, entropy: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    """Return w = (1 - p_y)^gamma in [0, 1]; 1 for gamma = 0 even at p_y = 1."""
    # expm1 keeps the digits of 1 - p_y where p_y is close to 1.
    return (-torch.expm1(-nll)).clamp(min=0).pow(gamma)


OBJECTIVE = Objective(
    name="focal",
    label="Focal Loss",
    equation="w = (1 - p_y)^gamma with p_y the target's probability",
    paper="arXiv 1708.02002",
    settings=(GAMMA,),
    weight=weight,
)
