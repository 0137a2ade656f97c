"""EMO's cost rows for a model: its output layer's as they are, or its part of a fixed matrix."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from megatron_mile.emo import CostRows, TargetCosts
from megatron_mile.errors import MileError
from megatron_mile.integration.arguments import COST_FLAG
from megatron_mile.integration.models import tp_group, unwrap

# A table of all products takes the place of product and exchange up to this size on each rank.
TABLE_BYTES = 1 << 28


def output_rows(model: Any) -> CostRows:
    """Return the rows of this rank's output layer, tied or not, as they are now.

    Raises:
        MileError: The model has no weight [V/tp, h] of its own there, or FSDP shards it.
    """
    layer = getattr(model, "output_layer", None)
    weight: Any = getattr(layer, "weight", None)
    if weight is None and getattr(model, "share_embeddings_and_output_weights", False):
        weight = model.shared_embedding_or_output_weight()
    # FSDP's weights, torch's DTensors and Megatron's, are whole only while their layer runs.
    if hasattr(weight, "full_tensor") or hasattr(weight, "__fsdp_param__"):
        raise MileError(
            f"FSDP owns the weight of the output layer of {type(model).__name__}, which "
            f"{COST_FLAG} output-layer reads; give {COST_FLAG} a fixed matrix"
        )
    # A weight that is sharded once more (GTP), or is somebody else's, has other rows.
    shape = () if weight is None else tuple(weight.shape)
    expected = model.vocab_size // tp_group(model).size()
    if len(shape) != 2 or shape[0] != expected:
        raise MileError(
            f"the output layer of {type(model).__name__} has a weight {shape or None}; expected "
            f"{expected} rows for {COST_FLAG} output-layer; give {COST_FLAG} a fixed matrix"
        )
    return CostRows(weight)


def check_matrix(matrix: torch.Tensor, words: int, columns: int) -> None:
    """Raise unless a matrix is finite, has a row for every token and no more than model columns.

    Args:
        matrix: [V, d].
        words: The tokenizer's size.
        columns: Of the model's vocabulary with its padding.

    Raises:
        MileError: It has not.
    """
    if not words <= len(matrix) <= columns:
        raise MileError(
            f"{COST_FLAG} has {len(matrix)} rows, but the tokenizer {words} tokens and the model "
            f"{columns} columns; expected a matrix of the same vocabulary, from {words} to "
            f"{columns} rows (--make-vocab-size-divisible-by widens the model)"
        )
    if not matrix.isfinite().all():
        row = int((~matrix.isfinite()).any(1).nonzero()[0])
        raise MileError(f"{COST_FLAG} has NaN or infinity in row {row}; expected finite numbers")


def fixed_rows(matrix: torch.Tensor, words: int, model: Any) -> CostRows:
    """Return this rank's rows of a fixed matrix, on the model's device and in its dtype.

    The model's padding, from `words` on, has rows of zeros: distance 1 to every token.

    Args:
        matrix: [V, d], checked.
        words: The tokenizer's size.
        model: On the last pipeline stage, wrapped or not.
    """
    module, group = unwrap(model), tp_group(model)
    size, rank = group.size(), group.rank()
    shard = module.vocab_size // size
    mine = matrix[rank * shard : min((rank + 1) * shard, words)]
    weight = next(module.parameters())
    rows = torch.zeros(shard, matrix.size(1), dtype=weight.dtype, device=weight.device)
    rows[: len(mine)].copy_(mine)
    cost = CostRows(rows)
    if module.vocab_size * shard * rows.itemsize <= TABLE_BYTES:
        return cost.tabulate(group)
    return cost.keep_norms()


class RowsAhead:
    """Fetches the targets' rows when a training step enters the model, beside its computation."""

    def __init__(self, model: Any, cost: CostRows | None) -> None:
        """Watch an unwrapped model; `cost` is its fixed matrix, None its output layer."""
        self.cost = cost
        self.position = [*inspect.signature(model.forward).parameters].index("labels")
        self.labels: torch.Tensor | None = None
        self.version = 0
        self.fetched: TargetCosts | None = None
        self.handle = model.register_forward_pre_hook(self._start, with_kwargs=True)

    def stop(self, model: Any) -> None:
        """Watch the model no longer."""
        self.handle.remove()

    def _start(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.labels = kwargs.get("labels", (*args, *[None] * self.position)[self.position])
        self.fetched = None
        last = getattr(model, "post_process", True)
        if self.labels is None or not (torch.is_grad_enabled() and last):
            return
        layer = getattr(model, "output_layer", None)
        # A hook may bring the layer its weight (--overlap-param-gather): until then it is old.
        if self.cost is None and (layer is None or layer._forward_pre_hooks):
            return
        self.version = self.labels._version
        self.fetched = self._fetch(model, self.labels)

    def _fetch(self, model: Any, labels: torch.Tensor) -> TargetCosts:
        cost = self.cost or output_rows(model)
        return cost.fetch(labels.transpose(0, 1), tp_group(model))

    def take(self, model: Any, labels: torch.Tensor) -> TargetCosts:
        """Return the rows of these labels [b, s], fetched now if the step did not begin with it."""
        fetched, self.fetched = self.fetched, None
        if fetched is None or labels is not self.labels or labels._version != self.version:
            return self._fetch(model, labels)
        return fetched
