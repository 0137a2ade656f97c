"""EAFT: tokens of which the model is certain count less, by their entropy.

    loss_t = alpha * (H_t / scale)^a * nll_t,    H_t = -sum_j p_j ln p_j  (nats), held constant

"Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting", arXiv
2601.02151; the authors' code is in forks that github.com/PRIS-CV/EAFT links, and since 2026-01 in
LlamaFactory (`_eaft_cross_entropy` in src/llamafactory/train/trainer_utils.py). It is meant for
fine-tuning. Where that code differs:

- its H is that of the 20 largest probabilities alone, renormalised, so at most ln 20 = 2.996, and
  lower than the entropy of all; here H is that of all tokens. With at most 20 tokens that have a
  probability both are the same;
- it divides by 3, about ln 20, so that its weight is at most 1. The default scale here is 3 too,
  but the weight may then reach ln V / 3, 3.5 at 32000 tokens; `eaft_scale` = ln V bounds it by 1.
  With alpha the scale has no effect;
- its loss is not normalised: `normalize="none"` repeats it.
"""

import math

import torch

from megatron_mile.objectives._objective import Objective, Setting

_LARGEST = 20 * math.log(2)  # the entropy of a uniform distribution over 2^20 tokens


def weight(
    nll: torch.Tensor, entropy: torch.Tensor, eaft_scale: float, eaft_exponent: float
) -> torch.Tensor:
    """Return w = (H / scale)^a, without unit; 1 for a = 0 even at H = 0."""
    return (entropy / eaft_scale).pow(eaft_exponent)


def weight_slope(
    nll: torch.Tensor, entropy: torch.Tensor, eaft_scale: float, eaft_exponent: float
) -> torch.Tensor:
    """Return dw/dH = (a / scale) (H / scale)^(a-1), per nat; 0 for a = 0."""
    if eaft_exponent == 0:
        return torch.zeros_like(entropy)  # not 0 * H^-1, which is NaN at H = 0
    return eaft_exponent / eaft_scale * (entropy / eaft_scale).pow(eaft_exponent - 1)


def check(eaft_scale: float, eaft_exponent: float) -> None:
    """Raise ValueError where the weight may pass 1e30, of 3e38 that fp32 can hold."""
    if eaft_exponent * math.log(_LARGEST / eaft_scale) > math.log(1e30):
        raise ValueError(
            f"eaft_exponent={eaft_exponent} with eaft_scale={eaft_scale}: a weight may reach "
            f"{_LARGEST / eaft_scale:.3g}^{eaft_exponent:g}, and fp32 cannot sum up what is over "
            f"1e30; use a smaller exponent, or eaft_scale >= {_LARGEST:.1f}"
        )


def check_slope(eaft_scale: float, eaft_exponent: float) -> None:
    """Raise ValueError where the slope has no bound."""
    if 0 < eaft_exponent < 1:
        raise ValueError(
            f"entropy_grad=True with eaft_exponent={eaft_exponent}: the weight's slope has no "
            "bound at zero entropy; use eaft_exponent >= 1, or entropy_grad=False"
        )


OBJECTIVE = Objective(
    name="eaft",
    label="EAFT",
    equation="w = (H / scale)^a with H the entropy of the model's distribution in nats",
    paper="arXiv 2601.02151",
    settings=(
        Setting(
            "eaft_scale",
            3.0,
            "what the entropy is divided by in the weight, nats, >= 0.001; without effect unless "
            "normalize is none",
            low=0.001,
            shown="scale {:g} nats".format,
        ),
        Setting(
            "eaft_exponent",
            1.0,
            "exponent a of the weight, no unit, >= 0; 0 is plain cross-entropy",
            shown="exponent {:g}".format,
        ),
    ),
    weight=weight,
    weight_slope=weight_slope,
    check=check,
    check_slope=check_slope,
)
