"""DFT: tokens that the model finds unlikely count less, each by its probability.

    loss_t = alpha * p_y * nll_t,    p_y = e^(-nll_t), held constant

Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
Rectification", arXiv 2508.05629 (Dynamic Fine-Tuning); the authors' code is
verl/verl/trainer/fsdp_dft_trainer.py of github.com/yongliang-wu/DFT. It is meant for fine-tuning: a
model that knows nothing gives all tokens the weight 1/V. Where that code differs, and with it
`dft_loss` of TRL and `use_dft_loss` of LlamaFactory:

- its loss is not normalised: `normalize="none"` repeats it;
- TRL computes in the model's dtype, so in bf16 during training; here in fp32 (fp64 for fp64), as
  LlamaFactory.
"""

import torch

from megatron_mile.objectives._objective import Objective


def weight(nll: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """Return w = p_y = e^(-nll), in [0, 1]."""
    return torch.exp(-nll)


OBJECTIVE = Objective(
    name="dft",
    label="DFT",
    equation="w = p_y, the target's probability",
    paper="arXiv 2508.05629",
    weight=weight,
)
