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

import math

import torch

from megatron_mile.objectives._objective import GAMMA, Objective, Setting

SIGMA = Setting(
    "sigma", 1.0, "added to the entropy in the weight, nats, >= 0", shown="sigma {:g} nats".format
)


def weight(
    nll: torch.Tensor, entropy: torch.Tensor, gamma: float | torch.Tensor, sigma: float
) -> torch.Tensor:
    """Return w = (sigma + H)^gamma, without unit; 1 for gamma = 0 even at sigma + H = 0."""
    return (sigma + entropy).pow(gamma)


def weight_slope(
    nll: torch.Tensor, entropy: torch.Tensor, gamma: float | torch.Tensor, sigma: float
) -> torch.Tensor:
    """Return dw/dH = gamma (sigma + H)^(gamma-1), per nat; 0 for gamma = 0."""
    # For gamma = 0 not 0 * (sigma + H)^-1, which is NaN at sigma + H = 0.
    if isinstance(gamma, torch.Tensor):  # at whose value one must not look: that would wait for it
        return (gamma * (sigma + entropy).pow(gamma - 1)).masked_fill(gamma == 0, 0)
    if gamma == 0:
        return torch.zeros_like(entropy)
    return gamma * (sigma + entropy).pow(gamma - 1)


def check(gamma: float, sigma: float) -> None:
    """Raise ValueError where the weight may pass 1e30, of 3e38 that fp32 can hold."""
    largest = sigma + 20 * math.log(2)  # a uniform distribution over 2^20 tokens
    if gamma * math.log(largest) > math.log(1e30):
        raise ValueError(
            f"gamma={gamma} with sigma={sigma}: a weight may reach {largest:.1f}^{gamma:g}, and "
            f"fp32 cannot sum up what is over 1e30; use gamma <= {30 / math.log10(largest):.1f}"
        )


def check_slope(gamma: float, sigma: float) -> None:
    """Raise ValueError where the slope has no bound."""
    if sigma == 0 and 0 < gamma < 1:
        raise ValueError(
            f"entropy_grad=True with sigma=0 and gamma={gamma}: the weight's slope has no "
            "bound at zero entropy; use sigma > 0, gamma >= 1, or entropy_grad=False"
        )


OBJECTIVE = Objective(
    name="mile",
    label="MiLe Loss",
    equation="w = (sigma + H)^gamma with H the entropy of the model's distribution in nats",
    paper="arXiv 2310.19531",
    settings=(GAMMA, SIGMA),
    weight=weight,
    weight_slope=weight_slope,
    check=check,
    check_slope=check_slope,
)
