"""Power-law decay: the rarer the target is in the data, the more its token counts.

    loss_t = alpha * nll_t / (freq(y_t) + eps)^a,    freq(y) = occurrences of y / all tokens

Shao et al., "Power-Law Decay Loss", arXiv 2505.16900, equation 3, which is meant for finetuning;
the authors' code is trainer.py of github.com/shaojintian/power_law_decay. The exponent a and eps
have that code's defaults. Where it differs:

- its freq is the count, here it is the share of all N tokens: eps here does what eps N does there.
  A token that never occurs weighs 1 + 1 / eps times as much there as one that occurs once, here
  1 + 1 / (eps N) times (a = 1);
- it tokenizes the texts anew without special tokens, here all tokens of the training data count;
- it divides by the sum of the weights of each rank's micro-batch, which is `normalize="local"`;
- its weights are fp32, here they are fp64 in a training.

Whether the paper itself normalises, and with which a and eps it was tried: not confirmed.
"""

import math

import torch

from megatron_mile.objectives._objective import Objective, Setting


def weight(
    nll: torch.Tensor,
    entropy: torch.Tensor,
    frequency_exponent: float,
    frequency_eps: float,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """Return w = (freq + eps)^-a, without unit; `frequency` is freq of each target, in [0, 1]."""
    return (frequency.to(nll.dtype) + frequency_eps).pow(-frequency_exponent).expand_as(nll)


def check(frequency_exponent: float, frequency_eps: float) -> None:
    """Raise ValueError where the weight of a token that never occurs passes 1e30."""
    largest = frequency_exponent * (-math.log10(frequency_eps) if frequency_eps else math.inf)
    if frequency_exponent and largest > 30:
        raise ValueError(
            f"frequency_exponent={frequency_exponent} with frequency_eps={frequency_eps}: a token "
            f"that never occurs would weigh 1e{largest:.0f}, and fp32 cannot sum up what is over "
            "1e30; use a larger frequency_eps, such as 1e-7, or a smaller exponent"
        )


OBJECTIVE = Objective(
    name="frequency",
    label="power-law decay",
    equation="w = 1 / (f + eps)^a with f the target's share of all tokens in the data",
    paper="arXiv 2505.16900",
    settings=(
        Setting(
            "frequency_exponent",
            1.0,
            "exponent a of the decay, no unit, >= 0; 0 is plain cross-entropy",
            shown="exponent {:g}".format,
        ),
        Setting(
            "frequency_eps",
            1e-7,
            "added to the share of all tokens, no unit, >= 0",
            shown="eps {:g}".format,
        ),
    ),
    inputs=("frequency",),
    weight=weight,
    check=check,
)
