"""DEFT: tokens that the model finds unlikely count less, the more so the surer it is of others.

    loss_t = alpha * p_y^a * nll_t,    a = sum_k p_k^2    in (0, 1], no unit

a is the concentration of the model's distribution (e^-H2, with H2 its Renyi entropy of order 2): 1
where one token has all the mass, where the weight is p_y, and near 0 where the distribution is
flat, where the loss is cross-entropy. The weight is held constant in the gradient.

Wang et al., "Gradients Must Earn Their Influence: Unifying SFT with Generalized Entropic
Objectives", arXiv 2602.11424; the authors' code is the objective DEFT in
main_verl/trainer/fsdp_sft_trainer.py of github.com/luludus/DEFT at commit 5d75af4. Where that code
differs:

- its loss is (1 - p_y^a) / (a + 1e-6) with a held constant, whose gradient is that of p_y^a nll
  with the weight held constant, times a / (a + 1e-6); so the values of the two losses differ, and
  gradients agree up to 1e-6 / a, which is 0.03 for a flat distribution over 32000 tokens;
- it has no alpha; `normalize="none"` leaves it out here;
- its mean is over the tokens of a rank, in fp32 as here.
"""

import torch

from megatron_mile.objectives._objective import Objective


def weight(nll: torch.Tensor, entropy: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Return w = p_y^a with a = `squares`, in [0, 1]."""
    return torch.exp(-nll * squares)


OBJECTIVE = Objective(
    name="deft",
    label="DEFT",
    equation="w = p_y^a with a = sum_k p_k^2 of the model's distribution",
    paper="arXiv 2602.11424",
    weight=weight,
    needs_squares=True,
)
