"""Power family: the loss is a power of the probability, between cross-entropy and probability.

    loss_t = alpha * (1 - p_y^q) / q,    p_y = e^(-nll_t)

Its gradient is that of nll times w = p_y^q, so q = 1 has the gradient of -p_y (and of DFT), and
q -> 0 is cross-entropy, in value too. Li et al., "Beyond Log Likelihood: Probability-Based
Objectives for Supervised Fine-Tuning across the Model Capability Continuum", arXiv 2510.00526; the
authors' code is `GeneralFamily-q` in main_verl/trainer/fsdp_sft_trainer.py of
github.com/GaotangLi/Beyond-Log-Likelihood. It is meant for fine-tuning of models that know the task
already; for others the paper finds plain nll best. Where that code differs:

- it forms e^(q ln p_y) - 1, which loses the digits of a small q nll; here expm1 keeps them;
- its loss is not normalised: `normalize="none"` repeats it;
- its thresholds (tokens with p_y above or below a bound alone) are not built.
"""

import torch

from megatron_mile.objectives._objective import Objective, Setting


def weight(nll: torch.Tensor, entropy: torch.Tensor, power_q: float) -> torch.Tensor:
    """Return w = p_y^q = e^(-q nll), in [0, 1]: the factor of the gradient of nll."""
    return torch.exp(-power_q * nll)


def value(nll: torch.Tensor, entropy: torch.Tensor, power_q: float) -> torch.Tensor:
    """Return (1 - p_y^q) / q, in [0, 1 / q]; close to nll where q nll is small."""
    return torch.expm1(-power_q * nll) / -power_q


OBJECTIVE = Objective(
    name="power",
    label="power of p",
    equation="w = p_y^q in the gradient, of the value (1 - p_y^q) / q in place of w nll",
    paper="arXiv 2510.00526",
    settings=(
        Setting(
            "power_q",
            1.0,
            "exponent q of the probability, no unit, >= 0.000001; towards 0 plain cross-entropy",
            low=1e-6,
            shown="q {:g}".format,
        ),
    ),
    weight=weight,
    value=value,
)
