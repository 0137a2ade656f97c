"""EMO: cross-entropy, mixed with the distance of the model's distribution from the target.

    D_t = sum_k q_k c_k,   c_k = 1 - cos(e_k, e_y)      in [0, 2], 0 with all mass on y
    mode 1      L_t = (nll + sg(nll / (D + 1e-10)) D) / 2
    mode 2      L_t = sg(D / (nll + 1e-10)) nll + D
    mode alone  L_t = D

with sg = stop gradient and e the rows of a cost matrix that never gets a gradient. The distance D
is the cost of the product coupling (DEMD in the paper), an upper bound of the earth mover distance
and equal to it for a one-hot target. Ren et al., "EMO: Earth Mover Distance Optimization for
Auto-Regressive Language Modeling", arXiv 2310.04691; the authors' code is github.com/DRSY/EMO: mode
1 is `emo` in language_modeling/gpt2.py, mode 2 `emo2_*` in emo_patch.py, and continual training was
the distance alone by its issue 5. Options from there:

- emo_gt_q: D + sg(q_y) takes the place of D, so that the ratio of mode 1 goes to 0 for tokens that
  are well predicted; the gradient of D itself stays, so that the distance alone stays as it is
  (emo_patch.py since commit b6a7d7a, `adaptive_emo` in gpt2.py);
- emo_cap: the ratio of mode 1 is at most this; 3 in the package EMOLoss 0.0.3 and in
  continual_finetuning.

Where that code differs: it forms 1 - sum q K, which may be negative in bf16; it computes in the
model's dtype, where 1e-10 is 0 in fp16; it divides by zero for zero rows of the cost matrix.
"""

import torch

from megatron_mile.objectives._objective import Mix, Objective, Setting

_EPS = 1e-10


def mix(
    nll: torch.Tensor, distance: torch.Tensor, emo_mode: str, emo_gt_q: bool, emo_cap: float
) -> Mix:
    """Return the loss of each token and the factors of its gradient.

    Args:
        nll: -ln q_y, nats, >= 0.
        distance: D, no unit, in [0, 2]; shape and dtype of `nll`.
        emo_mode: One of the modes above.
        emo_gt_q: As above; not in the mode alone.
        emo_cap: As above, in mode 1; 0 is none.
    """
    if emo_mode == "alone":
        return Mix(distance, torch.zeros_like(nll), torch.ones_like(nll))
    counted = distance + torch.exp(-nll) if emo_gt_q else distance
    if emo_mode == "2":
        # Not counted / (nll + eps) * nll, which is NaN where the target's logit is -inf.
        return Mix(
            counted / (1 + _EPS / nll) + counted, counted / (nll + _EPS), torch.ones_like(nll)
        )
    ratio = nll / (counted + _EPS)
    if emo_cap:
        ratio = ratio.clamp(max=emo_cap)
    return Mix(0.5 * (nll + ratio * counted), torch.full_like(nll, 0.5), 0.5 * ratio)


OBJECTIVE = Objective(
    name="emo",
    label="EMO",
    equation="w = 1, and cross-entropy is mixed with the distance of the model's distribution from "
    "the target in an embedding",
    paper="arXiv 2310.04691",
    settings=(
        Setting(
            "emo_mode",
            "1",
            "how nll and distance D are mixed, ratios held constant: 1 (nll + (nll / D) D) / "
            "2, of the value of nll; 2 (D / nll) nll + D; alone D",
            choices=("1", "2", "alone"),
            shown="mode {}".format,
        ),
        Setting(
            "emo_gt_q",
            False,
            "take D + p_y for the distance D in modes 1 and 2, with the gradient of D alone, "
            "as the authors' emo_patch.py since 2023-11-21",
            shown=lambda on: "gt_q" if on else "",
        ),
        Setting(
            "emo_cap",
            0.0,
            "largest ratio nll / D in mode 1, no unit, >= 0; 0 is no cap, 3 that of the "
            "authors' package EMOLoss 0.0.3",
            shown=lambda cap: f"ratio at most {cap:g}" if cap else "",
        ),
    ),
    mix=mix,
)
