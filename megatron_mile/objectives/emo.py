"""EMO: the earth mover distance between the model's distribution and the target, with nll.

    DEMD_t = sum_k q_k c_k,   c_k = 1 - cos(e_k, e_y)      in [0, 2], 0 with all mass on y
    mode 1      L_t = (nll + sg(nll / (emo + 1e-10)) emo) / 2
    mode 2      L_t = sg(emo / (nll + 1e-10)) nll + emo
    mode alone  L_t = emo

with emo = DEMD, sg = stop gradient, e the rows of a cost matrix that never gets a gradient. DEMD is
the cost of the product coupling, an upper bound of the distance and equal to it for a one-hot
target. Ren et al., "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling",
arXiv 2310.04691; the authors' code is github.com/DRSY/EMO: mode 1 is `emo` in
language_modeling/gpt2.py, mode 2 `emo2_*` in emo_patch.py, and continual training was EMO alone by
its issue 5. Options from there:

- emo_gt_q: emo' = DEMD + sg(q_y) takes the place of emo, so that the ratio of mode 1 goes to 0 for
  tokens that are well predicted; the gradient of emo itself stays, so that EMO alone stays as it is
  (emo_patch.py since commit b6a7d7a, `adaptive_emo` in gpt2.py);
- emo_cap: the ratio of mode 1 is at most this; 3 in the package EMOLoss 0.0.3 and in
  continual_finetuning.

Where that code differs: it forms 1 - sum q K, which may be negative in bf16; it computes in the
model's dtype, where 1e-10 is 0 in fp16; it divides by zero for zero rows of the cost matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from megatron_mile.config import ObjectiveConfig

_EPS = 1e-10
MODES = ("1", "2", "alone")


class Mix(NamedTuple):
    """The loss and how its gradient is made of those of nll and DEMD; all of one shape."""

    loss: torch.Tensor
    of_nll: torch.Tensor
    """Factor of the gradient of nll."""
    of_distance: torch.Tensor
    """Factor of the gradient of DEMD."""


def weight(nll: torch.Tensor, entropy: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Return 1: the modes scale nll and distance themselves, so alpha has nothing to normalise."""
    return torch.ones_like(entropy)


def weight_slope(nll: torch.Tensor, entropy: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Return 0: the entropy has no part."""
    return torch.zeros_like(entropy)


def mix(nll: torch.Tensor, distance: torch.Tensor, config: ObjectiveConfig) -> Mix:
    """Return the loss of each token and the factors of its gradient.

    Args:
        nll: -ln q_y, nats, >= 0.
        distance: DEMD, no unit, in [0, 2]; shape and dtype of `nll`.
        config: The objective.
    """
    if config.emo_mode == "alone":
        return Mix(distance, torch.zeros_like(nll), torch.ones_like(nll))
    emo = distance + torch.exp(-nll) if config.emo_gt_q else distance
    if config.emo_mode == "2":
        # Not emo / (nll + eps) * nll, which is NaN where the target's logit is -inf.
        return Mix(emo / (1 + _EPS / nll) + emo, emo / (nll + _EPS), torch.ones_like(nll))
    ratio = nll / (emo + _EPS)
    if config.emo_cap:
        ratio = ratio.clamp(max=config.emo_cap)
    return Mix(0.5 * (nll + ratio * emo), torch.full_like(nll, 0.5), 0.5 * ratio)
