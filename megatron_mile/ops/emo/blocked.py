"""EMO's statistics of all tokens, one block of rows after the other.

    block of products (a GEMM, or rows of a table) + block of logits --> six numbers      forward
    block of products, kept or made again          + block of logits --> gradient         backward

The products are what costs: a GEMM of the size of the output layer's. They are kept where the
gradient will lie, which is written over them, or made twice where there is no such place.
"""

from collections.abc import Callable, Iterator

import torch

from megatron_mile.ops.blocks import Block, Coefficients, row_blocks
from megatron_mile.ops.emo import EmoStats, reference

# Elements of a block of products. On two CPU cores the GEMM took, per row of 32000 columns, 1.7
# of the time of all 2048 rows at once for 64 rows, 1.2 for 131 (2^22), and 1.1 for 524 (2^24).
_BLOCK = 1 << 22
_KEPT_BLOCK = 1 << 24
# On a GPU, 0.5 GiB of bf16: a product of that size keeps all multiprocessors busy.
_GPU_BLOCK = 1 << 28

Products = Callable[[slice, torch.Tensor | None], torch.Tensor]
"""(tokens, out) -> products [n, V] of these tokens, in `out` if it is given."""


def stats_of_all(
    implementation: EmoStats,
    logits: torch.Tensor,
    targets: torch.Tensor,
    products: Products,
    scale: torch.Tensor,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """Return (m, S, T, z_y, R, C) of every token, fp64 [6, ...].

    Args:
        implementation: What computes a block.
        logits: [..., V], any strides.
        targets: Local columns, int64 [...].
        products: Where the products come from, tokens counted over all leading dimensions.
        scale: Their factors, [V] in the dtype of the arithmetic.
        kept: [..., V] in their dtype, filled with the products; None forgets them.
    """
    flat_targets, logits = targets.flatten(), logits.detach()
    stats = logits.new_zeros(6, len(flat_targets), dtype=torch.float64)
    stats[0], stats[3] = -torch.inf, torch.nan  # as without any column
    size = _block_size(implementation, logits, kept is not None)
    for tokens, (block, *places) in _blocks(size, logits, kept):
        made = products(tokens, places[0] if places else None)
        stats[:, tokens] = implementation.emo_stats(block, made, scale, flat_targets[tokens])
        del made  # before the next block of them is made
    return stats.view(6, *targets.shape)


def gradient_of_all(
    implementation: EmoStats,
    logits: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
    distance: torch.Tensor,
    coefficients: Coefficients,
    products: Products | None,
    scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the gradient, [..., V].

    Args:
        implementation: As in the forward.
        logits: As in the forward.
        targets: As in the forward.
        m: Maxima, [...], in the dtype of the arithmetic.
        distance: D, [...], in m's dtype.
        coefficients: All three, [...], in m's dtype.
        products: As in the forward; None where `out` holds them.
        scale: As in the forward.
        out: Where to write; may be the logits.
    """
    flat_targets, maxima, distances = targets.flatten(), m.flatten(), distance.flatten()
    coefficients = coefficients.map(torch.flatten)
    logits = logits.detach()
    size = _block_size(implementation, logits, products is None)
    for tokens, (block, place) in _blocks(size, logits, out):
        made = place if products is None else products(tokens, None)
        implementation.emo_stats_backward(
            block,
            made,
            scale,
            flat_targets[tokens],
            maxima[tokens],
            distances[tokens],
            coefficients.part(tokens),
            place,
        )
        del made


def _block_size(implementation: EmoStats, logits: torch.Tensor, kept: bool) -> int:
    """Return the elements of a block of products, which are kept or made for the block alone.

    Kept ones take no memory of their own, so that on a GPU they are made at once; but plain torch
    adds tensors of the block's size.
    """
    if logits.device.type == "cpu":
        return _KEPT_BLOCK if kept else _BLOCK
    return logits.numel() if kept and implementation is not reference else _GPU_BLOCK


def _blocks(size: int, *tensors: torch.Tensor | None) -> Iterator[Block]:
    """Yield blocks of so many elements of the tensors that are there; none of an empty shard."""
    given = [tensor for tensor in tensors if tensor is not None]
    columns = given[0].size(-1)
    return row_blocks(max(1, size // columns), *given) if columns else iter(())
