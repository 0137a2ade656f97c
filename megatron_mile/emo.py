"""EMO as a loss of logits: cost rows, distance, mix and gradient in one autograd node.

    forward    target rows [T, d], by an all_reduce that may have begun before the logits
               block of logits, block of products --> 6 numbers per token
               all tokens: one all_gather of them, loss and coefficients
    backward   block of logits, block of products --> gradient

The products of target rows and cost rows are one GEMM of the output layer's size. They are kept
where the gradient will lie; in place, where there is no such tensor, for rows of another dtype, and
in a second backward they are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.nodes import SPENT, Given, NodeSettings, first_order, of_tokens, with_hits
from megatron_mile.objectives import Mix
from megatron_mile.ops import dispatch
from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.emo.blocked import gradient_of_all, stats_of_all
from megatron_mile.ops.per_token import beside
from megatron_mile.ops.per_token.reference import columns_of, merge
from megatron_mile.parallel import ProcessGroup
from megatron_mile.parallel.vocab import VocabShard, gather_stats, start_lookup, vocabulary_end

# Rows whose norms are taken at once on a CPU, which first converts what it is given.
_NORM_ROWS = 512


class CostRows:
    """This shard's rows e_k of EMO's cost matrix, c_k = 1 - cos(e_k, e_y).

    A row of zeros (padding), or of a norm whose square underflows, has the cost 1 with every other.
    The rows never get a gradient. Every loss takes them as they are when their norms are
    taken, at `fetch`, where fp16 and fp64 are copied; norms are taken anew each time, because no
    tensor tells whether an optimizer has written to it. Products of them run in their dtype.

    Raises:
        ValueError: The rows are no floating matrix.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        """Take the rows.

        Args:
            rows: [V/tp, d] in fp64, fp32, bf16 or fp16, in the order of the logits' columns; any
                width d.
        """
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError(
                f"cost rows are {rows.dtype} {tuple(rows.shape)}; expected floating [V/tp, d]"
            )
        self.rows = rows.detach()
        self.table: tuple[torch.Tensor, torch.Tensor] | None = None
        """Products of the vocabulary's unit rows with this shard's, [V, V/tp], and the scale of the
        latter, [V/tp], if `tabulate` has made them."""
        self._scaled: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep_norms(self) -> CostRows:
        """Take the norms once, and return this object; for a fixed matrix.

        The rows must stay as they are from here on; in fp16 and fp64 they are copied.
        """
        self._scaled = _with_scale(self.rows)
        return self

    def tabulate(
        self, tp_group: ProcessGroup | None = None, vocab_range: tuple[int, int] | None = None
    ) -> CostRows:
        """Compute all products once, V * V/tp of them, and return this object.

        Target rows then need neither product nor exchange, and the rows must stay as they are. For
        a fixed matrix; it communicates, and waits for the device.

        Args:
            tp_group: Tensor-parallel group that shares the vocabulary; None for this rank alone.
            vocab_range: (start, end) of this shard; None for equal shards in rank order.
        """
        shard = VocabShard.of(len(self.rows), vocab_range, tp_group)
        device = self.rows.device
        ids = torch.arange(vocabulary_end(shard, device), device=device)
        fetched = self.fetch(ids, tp_group, vocab_range)
        self.table = fetched.products(slice(None), None), fetched.scale
        return self

    def fetch(
        self,
        targets: torch.Tensor,
        tp_group: ProcessGroup | None = None,
        vocab_range: tuple[int, int] | None = None,
    ) -> TargetCosts:
        """Start to fetch the targets' rows; `token_loss` takes what this returns as its cost.

        It depends on the targets alone, so it may run while the model computes the logits. All
        ranks of the group must call it at the same point, and the rows must not change until the
        backward.

        Args:
            targets: Integers, [...]: ids in the whole vocabulary.
            tp_group: As in `tabulate`.
            vocab_range: As in `tabulate`.
        """
        if self.table is not None:
            ids = targets.flatten().long().clamp(0, len(self.table[0]) - 1)
            return TargetCosts(self, targets.shape, *self.table, ids=ids)
        shard = VocabShard.of(len(self.rows), vocab_range, tp_group)
        rows, scale = self._scaled or _with_scale(self.rows)
        columns = columns_of(targets.flatten(), shard.start, shard.end)
        waiting = start_lookup(rows, scale, columns, shard.group)
        return TargetCosts(self, targets.shape, rows, scale, wait=waiting)


class TargetCosts:
    """Cost rows with the rows of some targets, which may still be on their way."""

    def __init__(
        self,
        cost: CostRows,
        shape: torch.Size,
        matrix: torch.Tensor,
        scale: torch.Tensor,
        ids: torch.Tensor | None = None,
        wait: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        """Take what `fetch` has found.

        Args:
            cost: What was asked.
            shape: Of the targets.
            matrix: The shard's rows [V/tp, d], or the table [V, V/tp].
            scale: 1 / norm of the shard's rows, [V/tp] in fp32 or fp64.
            ids: The targets' rows of the table, [T], if it is one.
            wait: Else what returns their unit rows, [T, d].
        """
        self.cost, self.shape, self.matrix, self.scale = cost, shape, matrix, scale
        self._ids, self._wait = ids, wait
        self._rows: torch.Tensor | None = None

    def products(
        self, tokens: slice, out: torch.Tensor | None, columns: int | None = None
    ) -> torch.Tensor:
        """Return the products of these tokens' unit rows with the shard's rows, [n, V/tp].

        Args:
            tokens: Counted over all dimensions of the targets.
            out: Where they are written, in the dtype of `matrix`; None for a new tensor.
            columns: Number of the shard's first columns that are wanted; None for all.
        """
        if self._ids is not None:
            return torch.index_select(self.matrix[:, :columns], 0, self._ids[tokens], out=out)
        if self._rows is None:
            assert self._wait is not None
            self._rows = self._wait()
        return torch.mm(self._rows[tokens], self.matrix[:columns].t(), out=out)


def _with_scale(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [n, d] as products take them, and the factors [n] that make them unit length.

    The factor of a norm whose square vanishes is 0. Rows in fp16, whose products may overflow, and
    in fp64, whose products may not fit in fp32, are copied and made unit length at once.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    parts = rows.split(_NORM_ROWS) if rows.device.type == "cpu" else (rows,)
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=wide) for part in parts]
    scale = torch.cat(norms).reciprocal_()
    scale.masked_fill_(scale > torch.finfo(wide).tiny ** -0.5, 0)
    if rows.dtype in (torch.float32, torch.bfloat16):
        return rows, scale
    unit = torch.mul(rows, scale.unsqueeze(1), out=torch.empty_like(rows))
    return unit, torch.ones_like(scale)


def weigh_emo(
    stats: torch.Tensor,
    valid: torch.Tensor,
    config: ObjectiveConfig,
    shard: VocabShard,
    dtype: torch.dtype,
    given: Given,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss per token and the coefficients of this shard's gradient; one all_gather.

    With q = e^(z-m) / S, and a and b the factors of the objective's mix, the gradient is
    a (q - 1_y) + b q (c - D) = e^(z-m) (flat + tilt (c - D)) - a 1_y. nll is made of R, the mass
    beside the target, because mode 2 divides by it where it is small.

    Args:
        stats: (m, S, T, z_y, R, C) of this shard, fp64 [6, ...].
        valid: bool [...]; other tokens get 0 throughout.
        config: The objective.
        shard: What this rank has of the vocabulary.
        dtype: Of the fields.
        given: Weights of tokens, which multiply the loss, and whether accuracy is wanted.

    Returns:
        (loss, nll, entropy, weight, distance) and accuracy, [5 or 6, ...]; and the stacked
        coefficients, fp64 [3, ...].
    """
    m, total, moment, z_y, rest, cost = merge(gather_stats(stats, shard.group))
    nll = torch.logaddexp(rest.log() - (z_y - m), torch.zeros_like(m))
    entropy = (total.log() - moment / total).clamp(min=0)
    total = rest + torch.exp(z_y - m)
    distance = cost / total
    mix = config.definition.mix
    assert mix is not None
    mixed, weight = mix(nll, distance, **config.own), torch.ones_like(entropy)
    if given.token_weight is not None:
        weight = of_tokens(given.token_weight)
        nothing = (weight == 0) & ~nll.isnan()  # where a mix may be infinite
        mixed = Mix(*((weight * x).masked_fill(nothing, 0) for x in mixed))
    loss, of_nll, of_distance = mixed
    fields = torch.stack([loss, nll, entropy, weight, distance])
    flat, tilt = of_nll / total, of_distance / total
    peak = of_nll * torch.expm1(-nll) - of_distance * torch.exp(-nll) * distance
    shift = stats[0] - m
    scale = torch.where(shift > -torch.inf, shift, 0).exp()  # no finite logit: any finite shift
    # The backward takes D as rounded here: large tilts must not meet what that leaves out.
    flat = flat - tilt * (distance - distance.to(dtype))
    coefficients = Coefficients(scale * flat, peak, scale * tilt).stack()
    fields = fields.masked_fill(~valid, 0).to(dtype)
    fields = with_hits(fields, m, z_y, valid) if given.accuracy else fields
    return fields, coefficients.masked_fill(~valid, 0)


class EmoLoss(torch.autograd.Function):
    """EMO's loss of vocabulary-parallel logits, with its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        settings: NodeSettings,
        costs: TargetCosts,
    ) -> tuple[torch.Tensor, ...]:
        """Return (loss, nll, entropy, weight, valid, distance), then accuracy if asked."""
        config, shard, inplace, ignore_index, given = settings
        ctx.set_materialize_grads(False)
        statistics, _ = dispatch.select(config.backend, logits.device, logits.dtype)
        ctx.implementation, ctx.per_token = dispatch.emo_beside(statistics), beside(statistics)
        ctx.settings, ctx.spent, ctx.costs = settings, False, costs
        keeps = ctx.needs_input_grad[0] and not inplace and costs.matrix.dtype == logits.dtype
        ctx.kept = torch.empty_like(logits) if keeps else None
        inside = (..., slice(shard.columns))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        local, valid = ctx.per_token.locate(targets, shard.start, shard.end, ignore_index)
        stats = stats_of_all(
            ctx.implementation,
            logits[inside],
            local,
            partial(costs.products, columns=shard.columns),
            costs.scale[: shard.columns].to(dtype),
            ctx.kept[inside] if keeps else None,
        )
        fields, coefficients = weigh_emo(stats, valid, config, shard, dtype, given)
        if inplace:
            # Whoever saved the logits must learn now, although the write waits for the backward.
            torch.autograd.graph.increment_version(logits)
        loss, nll, entropy, weight, distance, *hits = fields.unbind()
        ctx.save_for_backward(logits, local, stats[0].to(dtype), distance, coefficients)
        ctx.mark_non_differentiable(nll, entropy, weight, valid, distance, *hits)
        return loss, nll, entropy, weight, valid, distance, *hits

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient in the logits' dtype, over the logits' storage if in place."""
        if ctx.spent:
            raise RuntimeError(SPENT)
        if grad is None:
            return None, None, None, None
        logits, local, m, distance, coefficients = ctx.saved_tensors
        ctx.spent = inplace = ctx.settings.inplace
        columns = ctx.settings.shard.columns
        inside = (..., slice(columns))
        kept, ctx.kept = ctx.kept, None
        out = kept
        if out is None:
            out = logits.detach() if inplace else torch.empty_like(logits)
        gradient_of_all(
            ctx.implementation,
            logits[inside],
            local,
            m,
            distance,
            ctx.per_token.scale(coefficients, grad, m.dtype),
            partial(ctx.costs.products, columns=columns) if kept is None else None,
            ctx.costs.scale[:columns].to(m.dtype),
            out[inside],
        )
        out[..., columns:].zero_()
        return out, None, None, None
