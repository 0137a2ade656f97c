"""The objective as a loss of logits: statistics, weight and gradient joined in one autograd node.

The forward reads the logits once and exchanges four numbers per token over the tensor-parallel
group; the backward reads them once, writes the gradient once, and exchanges nothing. What is saved
for it is the logits themselves and a few numbers per token.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megatron_mile.config import ObjectiveConfig
from megatron_mile.objectives import OBJECTIVES
from megatron_mile.ops import dispatch
from megatron_mile.parallel import ProcessGroup
from megatron_mile.parallel.tokens import masked, normaliser
from megatron_mile.parallel.vocab import join_stats, local_targets, shard_range


class TokenLoss(NamedTuple):
    """The loss per token; every field has the shape of the targets.

    Numbers are fp64 for fp64 logits and fp32 for the others, and 0 at ignored tokens. Only `loss`
    carries a gradient.
    """

    loss: torch.Tensor
    """w * nll, not normalised."""
    nll: torch.Tensor
    """Plain cross-entropy -ln p_y, nats."""
    entropy: torch.Tensor
    """H = -sum_j p_j ln p_j, nats."""
    weight: torch.Tensor
    """w."""
    valid: torch.Tensor
    """bool: the target is not ignore_index."""


def token_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    config: ObjectiveConfig,
    tp_group: ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
) -> TokenLoss:
    """Return the weighted loss of every token: w(nll, H) * nll.

    A target that is neither `ignore_index` nor held by a shard gives a loss and gradient of NaN,
    so that the host's NaN check stops the job. A token that is ignored, or whose incoming gradient
    is exactly 0, gets a gradient of exactly 0 whatever its logits and target hold.

    Args:
        logits: [..., V/tp] in fp64, fp32, bf16 or fp16, with any strides. -inf masks an entry.
        targets: Integers, [...]: ids in the whole vocabulary.
        config: The objective.
        tp_group: Tensor-parallel group that shares the vocabulary; None for this rank alone.
        vocab_range: (start, end) of this rank's shard; None for equal shards in rank order.
        ignore_index: Target of tokens that have no loss.
        inplace: Consume the logits: the gradient ends up over them, and the forward may already
            overwrite them. Operations that saved them earlier then raise in their backward, a
            second backward raises, and what a later read of the logits gives is undefined. The
            logits never change without it.

    Raises:
        ValueError: Shapes, dtypes or the vocabulary range do not fit, or the logits overlap in
            memory and `inplace` is set.
    """
    _check_tensors(logits, targets)
    if inplace and _overlaps(logits):
        raise ValueError(
            f"inplace=True with logits that overlap in memory (strides {tuple(logits.stride())}); "
            "pass inplace=False or logits.contiguous()"
        )
    start, end = shard_range(logits.size(-1), vocab_range, tp_group)
    local = local_targets(targets, start, end)
    valid = targets.long() != ignore_index  # as uint8, -100 would be 156
    loss, nll, entropy, weight = _WeightedLoss.apply(
        logits, local, valid, config, tp_group, inplace
    )
    return TokenLoss(loss, nll, entropy, weight, valid)


def reduce_loss(
    out: TokenLoss, mask: torch.Tensor, config: ObjectiveConfig, group: ProcessGroup | None = None
) -> torch.Tensor:
    """Return this rank's scalar loss alpha * sum(mask * out.loss) / sum(mask), both sums local.

    Args:
        out: What `token_loss` returned.
        mask: Loss mask >= 0, shape of out.loss, any real or bool dtype. Tokens with mask 0
            contribute and receive exactly 0, even where their loss is NaN.
        config: The objective; `config.normalize` says how alpha is formed.
        group: Ranks over which alpha is formed (data x context parallel); None for this rank alone.

    Returns:
        0-d, dtype of out.loss; 0 where sum(mask) is 0. alpha is detached; ignored tokens have no
        part in it.

    Raises:
        ValueError: The mask does not fit out.loss.
    """
    if mask.shape != out.loss.shape or mask.is_complex():
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; expected a real or bool tensor of the "
            f"loss's shape {tuple(out.loss.shape)}"
        )
    alpha = normaliser(out.weight, mask * out.valid, config.normalize, group)
    count = mask.double().sum()
    mean = masked(out.loss, mask).sum() / torch.where(count == 0, 1, count)
    return (alpha * mean).to(out.loss.dtype)


class _WeightedLoss(torch.autograd.Function):
    """loss = w(nll, H) * nll of vocabulary-parallel logits, with its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        valid: torch.Tensor,
        config: ObjectiveConfig,
        group: ProcessGroup | None,
        inplace: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Return (loss, nll, entropy, weight) from the logits and the targets' local columns."""
        ctx.implementation, _ = dispatch.select(config.backend, logits.device, logits.dtype)
        ctx.inplace, ctx.spent = inplace, False
        # The gradient through the entropy needs z - m once more, not only its exponential.
        ctx.consumed = inplace and ctx.needs_input_grad[0] and not config.entropy_grad
        shard = ctx.implementation.token_stats(logits, targets, ctx.consumed)
        stats = join_stats(shard, group)
        results, coefficients = _weigh(stats, config)
        if inplace:
            # Whoever saved the logits must learn now, also if the write waits for the backward.
            torch.autograd.graph.increment_version(logits)
        coefficients = _rebase(coefficients, shard[0] - stats[0]).masked_fill(~valid, 0)
        ctx.save_for_backward(logits, targets, shard[0], coefficients)
        loss, *others = results.masked_fill(~valid, 0).to(shard.dtype).unbind()
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient in the logits' dtype, over the logits' storage if in place."""
        if ctx.spent:
            raise RuntimeError(
                "token_loss(inplace=True) has already written its gradient over the logits; use "
                "inplace=False to run the backward twice"
            )
        logits, targets, m, coefficients = ctx.saved_tensors
        scaled = (coefficients * grad).masked_fill(grad == 0, 0).to(m.dtype)
        ctx.spent = ctx.inplace
        out = logits.detach() if ctx.inplace else None
        gradient = ctx.implementation.token_stats_backward(
            logits, targets, m, scaled, out, ctx.consumed
        )
        return gradient, None, None, None, None, None


def _weigh(stats: torch.Tensor, config: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, nll, H, w) and the gradient's coefficients at an incoming gradient of 1.

    With p = e^(z-m) / S the gradient w (p - 1_y) - nll w'(H) p (ln p + H) is
    e^(z-m) (flat + tilt (z-m)) - w 1_y; tilt is 0 and left out where w is held constant. At the
    target it is one number per token, peak, so that no rounding of a logit's exponential enters
    p_y - 1. Everything is fp64, because a large gamma amplifies the rounding of H.

    Args:
        stats: (m, S, T, z_y) of the whole vocabulary, fp64 [4, ...].
        config: The objective.

    Returns:
        fp64 [4, ...], and (flat, peak) or (flat, peak, tilt), fp64 [2 or 3, ...].
    """
    m, total, moment, z_y = stats
    log_total, spread = total.log(), -moment / total
    nll = log_total - (z_y - m)
    entropy = (log_total + spread).clamp(min=0)
    objective = OBJECTIVES[config.objective]
    weight = objective.weight(nll, entropy, config)
    loss = weight * nll
    # A weight may be finite where no shard held the target; the gradient must not be.
    height = weight.masked_fill(nll.isnan(), torch.nan)
    flat, peak, tilts = height / total, height * torch.expm1(-nll), []
    if config.entropy_grad:
        tilt = -nll * objective.weight_slope(nll, entropy, config) / total
        flat = flat + tilt * spread
        peak = peak + tilt * torch.exp(z_y - m) * (z_y - m + spread)
        tilts = [tilt]
    return torch.stack([loss, nll, entropy, weight]), torch.stack([flat, peak, *tilts])


def _rebase(coefficients: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Make coefficients of e^(z-m) those of e^(z-m_r), with m_r the maximum of this shard alone.

    Args:
        coefficients: (flat, peak) or (flat, peak, tilt), fp64 [2 or 3, ...].
        shift: m_r - m, fp64 [...]; -inf or NaN where the shard has no finite logit.
    """
    flat, peak, *tilts = coefficients
    shift = torch.where(shift > -torch.inf, shift, 0)  # e^(z-m_r) is 0 there: any finite shift
    scale = shift.exp()
    flat = scale * (flat + tilts[0] * shift if tilts else flat)
    return torch.stack([flat, peak, *(scale * tilt for tilt in tilts)])


def _check_tensors(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise ValueError unless logits are floating [..., V] and targets integers [...]."""
    if logits.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype}; expected fp64, fp32, bf16 or fp16")
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"targets are {targets.dtype}; expected integers such as torch.int64")
    if logits.dim() == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and logits {tuple(logits.shape)}; expected "
            "the logits' shape without its last dimension"
        )


def _overlaps(tensor: torch.Tensor) -> bool:
    """Tell whether two elements may share memory: a stride inside the reach of smaller ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
