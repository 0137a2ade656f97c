"""The objective as a loss of logits: statistics, weight and gradient joined in one autograd node.

The forward reads the logits once and exchanges four numbers per token over the tensor-parallel
group, with label smoothing six, and for a weight that contains sum_k p_k^2 another one. The
backward reads them once, writes the gradient once, and exchanges nothing. What is saved for it is
the logits themselves and a few numbers per token. EMO has a node of its own, in `emo`.

    logits [..., V/tp]  --ops.token_stats--> (m, S, T, z_y) of this shard
                        --parallel.vocab-->  those of all shards, one all_gather
                        --ops.per_token-->   those of the whole vocabulary, nll and entropy
                        --objectives-->      weight
                        --ops.per_token-->   loss, and the coefficients of its gradient
    d logits            <--ops.token_stats-- coefficients times the incoming gradient
"""

from typing import Any, NamedTuple

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows, EmoLoss, TargetCosts
from megatron_mile.nodes import (
    SPENT,
    Given,
    Inputs,
    NodeSettings,
    check_token_weight,
    first_order,
    of_tokens,
    with_hits,
)
from megatron_mile.objectives import NEED_COST
from megatron_mile.ops import dispatch
from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.per_token import PerToken, beside
from megatron_mile.parallel import ProcessGroup
from megatron_mile.parallel.tokens import masked, normaliser
from megatron_mile.parallel.vocab import VocabShard, gather_stats


class TokenLoss(NamedTuple):
    """The loss per token; every field has the shape of the targets.

    Numbers are fp64 for fp64 logits and fp32 for the others, and 0 at ignored tokens. Only `loss`
    and `z_loss` carry a gradient.
    """

    loss: torch.Tensor
    """w * nll, not normalised, of the smoothed nll with label smoothing; for power its value; for
    emo the sum that its mode makes of nll and distance."""
    nll: torch.Tensor
    """Plain cross-entropy -ln p_y, nats."""
    entropy: torch.Tensor
    """H = -sum_j p_j ln p_j, nats."""
    weight: torch.Tensor
    """w, times the token's own weight if it has one; w is 1 for emo."""
    valid: torch.Tensor
    """bool: the target is not ignore_index."""
    emo: torch.Tensor | None = None
    """The distance D, no unit, in [0, 2], of an objective that has one (emo); else None."""
    z_loss: torch.Tensor | None = None
    """c (ln sum_k e^z_k)^2 with the setting `z_loss` as c, which is added to the normalised loss;
    None where that is 0."""
    token_weight: torch.Tensor | None = None
    """Weights of tokens as they were given, which `weight` and `loss` contain; else None."""
    accuracy: torch.Tensor | None = None
    """1 where the target has the largest logit, alone or with others, else 0; None if not asked."""

    def alpha_mode(self, config: ObjectiveConfig) -> str:
        """How alpha is formed: as `config` says, but not none for weights of tokens alone."""
        return config.alpha_mode if self.token_weight is None else config.normalize


def token_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    config: ObjectiveConfig,
    tp_group: ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
    vocab_size: int | None = None,
    cost: CostRows | TargetCosts | None = None,
    inputs: Inputs | None = None,
    token_weight: torch.Tensor | None = None,
    accuracy: bool = False,
) -> TokenLoss:
    """Return the loss of every token: w(nll, H) * nll, or EMO's; and its z-loss.

    A target that is neither `ignore_index` nor held by a shard gives a loss and gradient of NaN,
    so that the host's NaN check stops the job. A token whose incoming gradient is exactly 0, or
    finite where it is ignored, gets a gradient of exactly 0 whatever its logits and target hold.

    Args:
        logits: [..., V/tp] in fp64, fp32, bf16 or fp16, with any strides. -inf masks an entry,
            and with label smoothing makes the loss infinite, as in torch; the gradient only with
            entropy_grad.
        targets: Integers, [...]: ids in the whole vocabulary.
        config: The objective.
        tp_group: Tensor-parallel group that shares the vocabulary; None for this rank alone.
        vocab_range: (start, end) of this rank's shard; None for equal shards in rank order.
        ignore_index: Target of tokens that have no loss.
        inplace: Consume the logits: the gradient ends up over them, and the forward may already
            overwrite them. Operations that saved them earlier then raise in their backward, a
            second backward raises, and what a later read of the logits gives is undefined. The
            logits never change without it.
        vocab_size: Ids from here on are padding: their columns are left out of the softmax, so of
            nll and entropy, and get gradient 0, and no target may name them. None counts all
            columns, as Megatron does.
        cost: This shard's rows of the cost matrix, one for each column of the logits; for the
            objective emo and no other. With what `CostRows.fetch` returned for these targets the
            exchange of rows has begun earlier.
        inputs: What the objective's functions take by name in place of its settings or beside them,
            on the logits' device and without a gradient: 0-d, or a number per token, [...].
        token_weight: Factors >= 0 of the tokens' weights and losses, [...], real or bool, without a
            gradient; ce and emo have an alpha with them. alpha contains them, so that only their
            ratios count unless `normalize` is none. A negative one makes its token's loss NaN.
        accuracy: Also say whether the target has the largest logit; the logits are not read again.

    Raises:
        ValueError: Shapes, dtypes, the vocabulary's range or size do not fit, the logits overlap
            in memory and `inplace` is set, a cost or an input is missing, or a cost is not taken.
    """
    given = Given(inputs or {}, token_weight, accuracy)
    _check_tensors(logits, targets)
    check_given(config, given, targets)
    _check_cost(logits, targets, config, cost)
    _refuse_overlap(logits, inplace)
    shard = VocabShard.of(logits.size(-1), vocab_range, tp_group, vocab_size)
    settings = NodeSettings(config, shard, inplace, ignore_index, given)
    if cost is None:
        results = _WeightedLoss.apply(logits, targets, settings)
    else:
        rows = cost.fetch(targets, tp_group, vocab_range) if isinstance(cost, CostRows) else cost
        results = EmoLoss.apply(logits, targets, settings, rows)
    return as_token_loss(results, config, token_weight)


def reduce_loss(
    out: TokenLoss, mask: torch.Tensor, config: ObjectiveConfig, group: ProcessGroup | None = None
) -> torch.Tensor:
    """Return this rank's scalar loss alpha * sum(mask * out.loss) / sum(mask), both sums local.

    The z-loss is added to it: sum(mask * out.z_loss) / sum(mask), without alpha.

    Args:
        out: What `token_loss` returned.
        mask: Loss mask >= 0, shape of out.loss, any real or bool dtype. Tokens with mask 0
            contribute and receive exactly 0, even where their loss is NaN.
        config: The objective; `out.alpha_mode(config)` says how alpha is formed.
        group: Ranks over which alpha is formed (data x context parallel); None for this rank alone.

    Returns:
        0-d, dtype of out.loss; 0 where sum(mask) is 0. alpha is detached; ignored tokens have no
        part in it.

    Raises:
        ValueError: The mask does not fit out.loss, or normalize is batch, for which one micro-batch
            is not enough.
    """
    mode = out.alpha_mode(config)
    if mode == "batch":
        raise ValueError(
            "normalize='batch' needs the weights of the whole global batch; where this call sees "
            "all of it use 'global', else divide the sum of mask * out.loss over the batch by that "
            "of mask * out.weight"
        )
    if mask.shape != out.loss.shape or mask.is_complex():
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; expected a real or bool tensor of the "
            f"loss's shape {tuple(out.loss.shape)}"
        )
    alpha = normaliser(out.weight, mask * out.valid, mode, group)
    count = mask.double().sum()
    count = torch.where(count == 0, 1, count)
    total = alpha * (masked(out.loss, mask).sum() / count)
    if out.z_loss is not None:
        total = total + masked(out.z_loss, mask).sum() / count
    return total.to(out.loss.dtype)


class _WeightedLoss(torch.autograd.Function):
    """loss = w(nll, H) * nll of vocabulary-parallel logits, with its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, settings: NodeSettings
    ) -> tuple[torch.Tensor, ...]:
        """Return (loss, nll, entropy, weight, valid), then z-loss and accuracy if there are."""
        config, shard, inplace, ignore_index, given = settings
        ctx.set_materialize_grads(False)
        ctx.implementation, _ = dispatch.select(config.backend, logits.device, logits.dtype)
        ctx.per_token = beside(ctx.implementation)
        ctx.settings, ctx.spent = settings, False
        # The gradient through the entropy needs z - m once more, not only its exponential.
        ctx.consumed = inplace and ctx.needs_input_grad[0] and config.entropy_slope is None
        local, valid = ctx.per_token.locate(targets, shard.start, shard.end, ignore_index)
        inside = logits[..., : shard.columns]
        stats = ctx.implementation.token_stats(inside, local, ctx.consumed, config.wanted)
        fields, coefficients = weigh_shard(ctx.per_token, stats, valid, config, shard, given)
        if inplace:
            # Whoever saved the logits must learn now, also if the write waits for the backward.
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(logits, local, stats[0], coefficients)
        loss, nll, entropy, weight, *others = fields.unbind()
        ctx.mark_non_differentiable(nll, entropy, weight, valid, *others[bool(config.z_loss) :])
        return loss, nll, entropy, weight, valid, *others

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient in the logits' dtype, over the logits' storage if in place."""
        if ctx.spent:
            raise RuntimeError(SPENT)
        if all(grad is None for grad in grads):
            return None, None, None
        logits, local, m, coefficients = ctx.saved_tensors
        scaled = scale(ctx.per_token, coefficients, m, ctx.settings.config, grads)
        ctx.spent = inplace = ctx.settings.inplace
        out = logits.detach() if inplace else torch.empty_like(logits)
        columns = ctx.settings.shard.columns
        inside = (..., slice(columns))
        ctx.implementation.token_stats_backward(
            logits[inside], local, m, scaled, out[inside], ctx.consumed
        )
        out[..., columns:].zero_()
        return out, None, None


def as_token_loss(
    results: tuple[torch.Tensor, ...], config: ObjectiveConfig, token_weight: torch.Tensor | None
) -> TokenLoss:
    """Return what a node gave: five fields, then distance, z-loss and accuracy if there are."""
    loss, nll, entropy, weight, valid, *others = results
    emo = others.pop(0) if config.definition.needs_cost else None
    z_loss = others.pop(0) if config.z_loss else None
    accuracy = others[0] if others else None
    return TokenLoss(loss, nll, entropy, weight, valid, emo, z_loss, token_weight, accuracy)


def scale(
    per_token: PerToken,
    coefficients: torch.Tensor,
    m: torch.Tensor,
    config: ObjectiveConfig,
    grads: tuple[torch.Tensor | None, ...],
) -> Coefficients:
    """Return the coefficients times the incoming gradients.

    Args:
        per_token: What computes them.
        coefficients: As `weigh_shard` returned them.
        m: Maximum of this shard, [...].
        config: The objective.
        grads: Gradients of what the node returned, [...] or None; not all None.
    """
    grad, z_grad = grads[0], grads[5] if config.z_loss else None
    if grad is None:
        grad = torch.zeros_like(m)
    if z_grad is None and config.z_loss:
        z_grad = torch.zeros_like(m)
    return per_token.scale(coefficients, grad, m.dtype, bool(config.label_smoothing), z_grad)


def weigh_shard(
    per_token: PerToken,
    stats: torch.Tensor,
    valid: torch.Tensor,
    config: ObjectiveConfig,
    shard: VocabShard,
    call: Given,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss per token and the coefficients of this shard's gradient; one all_gather.

    Args:
        per_token: What computes them.
        stats: (m, S, T, z_y) of this shard and what the objective wants beyond them, [4 to 7, ...].
        valid: bool [...]; other tokens get 0 throughout.
        config: The objective.
        shard: What this rank has of the vocabulary.
        call: What it has beside logits and targets.

    Returns:
        (loss, nll, entropy, weight), then z-loss and accuracy if there are, [4 to 6, ...] in the
        dtype of `stats`; and the stacked coefficients, fp64 [2 to 6, ...].
    """
    joined = per_token.join(gather_stats(stats, shard.group), config.wanted)
    nll, entropy = joined[4:6]
    functions = (config.definition.weight, config.entropy_slope, config.definition.value)
    given = {**config.own, **call.inputs}
    if config.definition.needs_squares:
        given["squares"] = joined[-1]
    weight, slope, value = (f if f is None else f(nll, entropy, **given) for f in functions)
    if call.token_weight is not None:
        factor = of_tokens(call.token_weight)
        slope, value = (x if x is None else x * factor for x in (slope, value))
        weight = factor if weight is None else weight * factor
    fields, coefficients = per_token.weigh(
        joined, stats[0], weight, slope, valid, config.extras, value
    )
    return with_hits(fields, joined[0], joined[3], valid) if call.accuracy else fields, coefficients


def check_dtypes(name: str, values: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise ValueError unless the values (called `name`) are floating and the targets integers."""
    if values.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} are {values.dtype}; expected fp64, fp32, bf16 or fp16")
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"targets are {targets.dtype}; expected integers such as torch.int64")


def check_given(config: ObjectiveConfig, given: Given, targets: torch.Tensor) -> None:
    """Raise ValueError where weights of tokens do not fit, or the objective lacks an input."""
    check_token_weight(given.token_weight, targets)
    missing = [name for name in config.definition.inputs if name not in given.inputs]
    if missing:
        raise ValueError(
            f"objective {config.objective} without {', '.join(missing)}; expected "
            f"inputs={{{missing[0]!r}: a tensor of the targets' shape}}, in a Megatron job from "
            "--mile-token-frequency or attach(inputs=)"
        )
    for name, x in given.inputs.items():
        if x.shape not in ((), targets.shape) or x.device != targets.device:
            raise ValueError(
                f"inputs[{name!r}] is {tuple(x.shape)} on {x.device}; expected one number, or one "
                f"for each of the targets {tuple(targets.shape)} on {targets.device}"
            )


def _check_tensors(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise ValueError unless logits are floating [..., V] and targets integers [...]."""
    check_dtypes("logits", logits, targets)
    if logits.dim() == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and logits {tuple(logits.shape)}; expected "
            "the logits' shape without its last dimension"
        )


def _check_cost(
    logits: torch.Tensor,
    targets: torch.Tensor,
    config: ObjectiveConfig,
    cost: CostRows | TargetCosts | None,
) -> None:
    """Raise ValueError unless there is a cost row per column where the objective needs them."""
    if (cost is None) == config.definition.needs_cost:
        given = "no cost" if cost is None else f"a {type(cost).__name__}"
        raise ValueError(
            f"objective {config.objective} with {given}; expected cost=CostRows(rows [V/tp, d]) "
            f"for {', '.join(NEED_COST)}, and none for the others"
        )
    if isinstance(cost, TargetCosts):
        if cost.shape != targets.shape:
            raise ValueError(
                f"cost was fetched for targets {tuple(cost.shape)}; expected those of this call, "
                f"{tuple(targets.shape)}"
            )
        cost = cost.cost
    if cost is not None and (len(cost.rows), cost.rows.device) != (logits.size(-1), logits.device):
        raise ValueError(
            f"cost has {len(cost.rows)} rows on {cost.rows.device} for {logits.size(-1)} columns "
            f"of logits on {logits.device}; expected one for each, on the same device"
        )


def _refuse_overlap(logits: torch.Tensor, inplace: bool) -> None:
    """Raise ValueError where a gradient written over the logits would overwrite itself."""
    if inplace and _overlaps(logits):
        raise ValueError(
            f"inplace=True with logits that overlap in memory (strides {tuple(logits.stride())}); "
            "pass inplace=False or logits.contiguous()"
        )


def _overlaps(tensor: torch.Tensor) -> bool:
    """Tell whether two elements may share memory: a stride inside the reach of smaller ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
