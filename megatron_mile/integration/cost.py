"""EMO's cost rows for a model: its output layer's as they are, or its part of a fixed matrix."""

from __future__ import annotations

from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.integration.arguments import COST_FLAG
from megatron_mile.integration.errors import MileError
from megatron_mile.integration.models import tp_group, unwrap
from megatron_mile.transport import CostRows

# A table of all cosines takes the place of product and exchange up to this size on each rank.
TABLE_BYTES = 1 << 28


def output_rows(model: Any) -> CostRows:
    """Return the rows of this rank's output layer, tied or not, as they are now.

    Raises:
        MileError: The model has no weight [V/tp, h] of its own there.
    """
    layer = getattr(model, "output_layer", None)
    weight = getattr(layer, "weight", None)
    if weight is None and getattr(model, "share_embeddings_and_output_weights", False):
        weight = model.shared_embedding_or_output_weight()
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.numel():
        raise MileError(
            f"{type(model).__name__} has no output layer's weight that {COST_FLAG} output-layer "
            f"could take; give {COST_FLAG} a fixed matrix"
        )
    return CostRows(weight)


def check_matrix(matrix: torch.Tensor, words: int, columns: int) -> None:
    """Raise unless a matrix has a row for every token, and no more than the model has columns.

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
        cost.tabulate(group)
    return cost


def check_objective(config: ObjectiveConfig, fused_linear: bool, cost: CostRows | None) -> None:
    """Raise unless the objective takes a fused projection or cost rows where they are given."""
    is_emo = config.objective == "emo"
    if fused_linear and is_emo:
        raise MileError("fused_linear=True cannot be combined with the objective emo; leave it out")
    if cost is not None and not is_emo:
        raise MileError(f"cost rows with the objective {config.objective}; they are for emo")
