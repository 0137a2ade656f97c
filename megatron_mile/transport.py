"""EMO as a loss of logits: statistics, distances, mix and gradient joined in one autograd node.

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
from torch.autograd.function import once_differentiable

from megatron_mile.config import ObjectiveConfig
from megatron_mile.ops import dispatch
from megatron_mile.ops.transport.blocked import transport, transport_backward
from megatron_mile.parallel import ProcessGroup
from megatron_mile.parallel.rows import start_lookup, vocabulary_end
from megatron_mile.parallel.vocab import local_targets, shard_range
from megatron_mile.weighting import scale_coefficients, weigh_transport

# Rows whose norms are taken at once on a CPU, which first converts what it is given.
_NORM_ROWS = 512
SPENT = (
    "token_loss(inplace=True) has already written its gradient over the logits; use inplace=False "
    "to run the backward twice"
)


class CostRows:
    """This shard's rows of EMO's cost matrix, c_k = 1 - cos(e_k, e_y).

    A row of zeros (padding), or of a norm whose square underflows, is at distance 1 from every
    other. The rows never get a gradient. Every loss takes them as they are when their norms are
    taken, at `fetch`, where fp16 and fp64 are copied. Products of them run in their dtype.

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
        _, end = shard_range(len(self.rows), vocab_range, tp_group)
        device = self.rows.device
        words = torch.arange(vocabulary_end(end, device, tp_group), device=device)
        fetched = self.fetch(words, tp_group, vocab_range)
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
        start, end = shard_range(len(self.rows), vocab_range, tp_group)
        rows, scale = _with_scale(self.rows)
        waiting = start_lookup(rows, scale, local_targets(targets.flatten(), start, end), tp_group)
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


class TransportLoss(torch.autograd.Function):
    """EMO's loss of vocabulary-parallel logits, with its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        valid: torch.Tensor,
        columns: int,
        config: ObjectiveConfig,
        group: ProcessGroup | None,
        inplace: bool,
        costs: TargetCosts,
    ) -> tuple[torch.Tensor, ...]:
        """Return (loss, nll, entropy, weight, DEMD) from the first `columns` of the logits."""
        statistics, _ = dispatch.select(config.backend, logits.device, logits.dtype)
        ctx.transport = dispatch.transport_beside(statistics)
        ctx.columns, ctx.inplace, ctx.spent, ctx.costs = columns, inplace, False, costs
        keeps = ctx.needs_input_grad[0] and not inplace and costs.matrix.dtype == logits.dtype
        ctx.kept = torch.empty_like(logits) if keeps else None
        inside = logits[..., :columns]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        shard = transport(
            ctx.transport,
            inside,
            targets,
            partial(costs.products, columns=columns),
            costs.scale[:columns].to(dtype),
            ctx.kept[..., :columns] if keeps else None,
        )
        fields, coefficients = weigh_transport(shard, valid, config, group, dtype)
        if inplace:
            # Whoever saved the logits must learn now, although the write waits for the backward.
            torch.autograd.graph.increment_version(logits)
        loss, *others = fields.unbind()
        ctx.save_for_backward(logits, targets, shard[0].to(dtype), others[-1], coefficients)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient in the logits' dtype, over the logits' storage if in place."""
        if ctx.spent:
            raise RuntimeError(SPENT)
        logits, targets, m, mean, coefficients = ctx.saved_tensors
        ctx.spent = ctx.inplace
        kept, ctx.kept = ctx.kept, None
        out = kept
        if out is None:
            out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        transport_backward(
            ctx.transport,
            logits[..., : ctx.columns],
            targets,
            m,
            mean,
            scale_coefficients(coefficients, grad, m.dtype),
            partial(ctx.costs.products, columns=ctx.columns) if kept is None else None,
            ctx.costs.scale[: ctx.columns].to(m.dtype),
            out[..., : ctx.columns],
        )
        out[..., ctx.columns :] = 0
        return out, *[None] * 7
