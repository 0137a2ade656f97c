"""The objective as a loss of hidden states: output projection and loss in one autograd node.

    forward    block of hidden states --GEMM--> block of logits --> 4 numbers per token
               all tokens: one all_gather of them, loss and coefficients
    backward   the same block of logits again --> its gradient in place --GEMM--> d hidden
                                                                        --GEMM--> d weight

The logits [tokens, V/tp] never exist as a whole, at the price of four GEMMs instead of three. What
is saved is the hidden states and a few numbers per token; the block is the only extra memory that
counts.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import (
    TokenLoss,
    as_token_loss,
    check_dtypes,
    check_given,
    scale,
    weigh_shard,
)
from megatron_mile.nodes import Given, Inputs, first_order
from megatron_mile.ops import dispatch
from megatron_mile.ops.per_token import beside
from megatron_mile.parallel import ProcessGroup, group_size
from megatron_mile.parallel.hidden import gather_sequence, start_reduce
from megatron_mile.parallel.vocab import VocabShard

# How large a block of logits is, where nobody says otherwise. The more tokens it has, the less
# often is d weight, [V/tp, H] in fp32, read and written; two CPU cores gain nothing from more.
_GPU_BLOCK_BYTES = 1 << 29
_CPU_BLOCK_BYTES = 1 << 27


class _Settings(NamedTuple):
    """What does not change from block to block."""

    config: ObjectiveConfig
    shard: VocabShard
    chunk_tokens: int
    sequence_parallel: bool
    ignore_index: int
    given: Given


def linear_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    config: ObjectiveConfig,
    tp_group: ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
    inputs: Inputs | None = None,
    token_weight: torch.Tensor | None = None,
    accuracy: bool = False,
) -> TokenLoss:
    """Return `token_loss(hidden @ weight.T, targets, ...)` without holding all the logits.

    The logits have the dtype of the hidden states; the gradient of the weight is accumulated in
    fp32 (fp64 for fp64) over the blocks. With a tensor-parallel group the gradient of the hidden
    states is summed over it, as by Megatron's ColumnParallelLinear.

    Args:
        hidden: [..., H] in fp64, fp32, bf16 or fp16; all tokens, or with `sequence_parallel` this
            rank's part of the first dimension.
        weight: [V/tp, H], dtype of `hidden`: this rank's rows of the output layer.
        targets: Integers, [...], of all tokens: ids in the whole vocabulary.
        config: The objective.
        tp_group: As in `token_loss`.
        vocab_range: As in `token_loss`.
        ignore_index: As in `token_loss`.
        chunk_tokens: Tokens whose logits exist at a time, >= 1; None for as many as `block_tokens`
            says.
        vocab_size: As in `token_loss`.
        sequence_parallel: Gather `hidden` over the group along its first dimension, in the forward
            and again in the backward, and scatter its gradient likewise.
        gradient_accumulation_fusion: Add the weight's gradient to `weight.main_grad`, where there
            is one, as Megatron's flag of that name does; `weight.grad` is then a placeholder for
            its hooks.
        inputs: As in `token_loss`.
        token_weight: As in `token_loss`, of all tokens.
        accuracy: As in `token_loss`.

    Raises:
        ValueError: Shapes, dtypes, the vocabulary's range or size do not fit, or the objective
            needs cost rows (emo), or an input that is not given.
    """
    if config.definition.needs_cost:
        raise ValueError(f"objective {config.objective} has no form without logits; use token_loss")
    _check_tensors(hidden, weight, targets, group_size(tp_group) if sequence_parallel else 1)
    given = Given(inputs or {}, token_weight, accuracy)
    check_given(config, given, targets)
    if chunk_tokens is None:
        chunk_tokens = block_tokens(weight.size(0), weight.itemsize, weight.device)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected 1 or more")
    shard = VocabShard.of(weight.size(0), vocab_range, tp_group, vocab_size)
    settings = _Settings(config, shard, chunk_tokens, sequence_parallel, ignore_index, given)
    main_grad = getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
    results = _LinearLoss.apply(hidden, weight, targets, settings, main_grad)
    return as_token_loss(results, config, token_weight)


def block_bytes(device: torch.device) -> int:
    """Return how many bytes of logits exist at a time."""
    return _CPU_BLOCK_BYTES if device.type == "cpu" else _GPU_BLOCK_BYTES


def block_tokens(columns: int, itemsize: int, device: torch.device) -> int:
    """Return how many tokens' logits these are, a multiple of 128 as tiles of products like it.

    Args:
        columns: V/tp.
        itemsize: Bytes of a logit.
        device: Where the logits are.
    """
    return max(block_bytes(device) // max(columns * itemsize, 1) // 128, 1) * 128


class _LinearLoss(torch.autograd.Function):
    """loss = w(nll, H) * nll of hidden @ weight.T, block after block of tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        settings: _Settings,
        main_grad: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """Return (loss, nll, entropy, weight, valid), then z-loss and accuracy if there are."""
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.main_grad = settings, main_grad
        config, shard = settings.config, settings.shard
        ctx.implementation, _ = dispatch.select(config.backend, hidden.device, hidden.dtype)
        ctx.per_token = beside(ctx.implementation)
        local, valid = ctx.per_token.locate(targets, shard.start, shard.end, settings.ignore_index)
        rows, flat_targets = _rows(hidden, settings), local.flatten()
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wanted = config.wanted
        stats = hidden.new_empty(wanted.number, *targets.shape, dtype=dtype)
        for block, logits in _blocks(rows, weight, settings):
            part = ctx.implementation.token_stats(logits, flat_targets[block], wanted=wanted)
            stats.view(wanted.number, -1)[:, block] = part
        fields, coefficients = weigh_shard(
            ctx.per_token, stats, valid, config, shard, settings.given
        )
        ctx.save_for_backward(hidden, weight, local, stats[0], coefficients)
        loss, nll, entropy, weights, *others = fields.unbind()
        ctx.mark_non_differentiable(nll, entropy, weights, valid, *others[bool(config.z_loss) :])
        return loss, nll, entropy, weights, valid, *others

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of hidden and weight in their dtypes."""
        if all(grad is None for grad in grads):
            return None, None, None, None, None
        hidden, weight, targets, m, coefficients = ctx.saved_tensors
        settings: _Settings = ctx.settings
        rows = _rows(hidden, settings)
        scaled = scale(ctx.per_token, coefficients, m, settings.config, grads)
        scaled = scaled.map(torch.flatten)
        flat_targets, maxima = targets.flatten(), m.flatten()
        d_rows = rows.new_empty(rows.shape)
        d_weight = _accumulator(weight, ctx.main_grad) if ctx.needs_input_grad[1] else None
        for block, logits in _blocks(rows, weight, settings):
            d_logits = ctx.implementation.token_stats_backward(
                logits, flat_targets[block], maxima[block], scaled.part(block), out=logits
            )
            torch.mm(d_logits, weight[: settings.shard.columns], out=d_rows[block])
            if block.stop >= len(rows):  # the reduction runs beside the last block's d weight
                d_hidden = d_rows.view(*targets.shape, rows.size(-1))
                reduced = start_reduce(d_hidden, settings.shard.group, settings.sequence_parallel)
            if d_weight is not None:
                _add_product(d_weight[: settings.shard.columns], d_logits, rows[block])
        return reduced(), _finished(d_weight, weight, ctx.main_grad), None, None, None


def _rows(hidden: torch.Tensor, settings: _Settings) -> torch.Tensor:
    """Return the hidden states of all tokens, [T, H]."""
    whole = gather_sequence(hidden, settings.shard.group) if settings.sequence_parallel else hidden
    return whole.reshape(-1, whole.size(-1))


def _blocks(
    rows: torch.Tensor, weight: torch.Tensor, settings: _Settings
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield which tokens, and their logits [n, columns], which the next block overwrites."""
    size = min(settings.chunk_tokens, max(len(rows), 1))
    buffer = rows.new_empty(size, settings.shard.columns)
    for start in range(0, max(len(rows), 1), size):
        block = slice(start, start + size)
        part = rows[block]
        yield block, torch.mm(part, weight[: settings.shard.columns].t(), out=buffer[: len(part)])


def _accumulator(weight: torch.Tensor, main_grad: torch.Tensor | None) -> torch.Tensor:
    """Return where d weight is added up: main_grad if it is wide enough, else zeros."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if main_grad is not None and main_grad.dtype == dtype:
        return main_grad
    return torch.zeros_like(weight, dtype=dtype)


def _add_product(total: torch.Tensor, d_logits: torch.Tensor, rows: torch.Tensor) -> None:
    """Add d_logits.T @ rows to the wider `total`, rounding nothing before the sum."""
    if total.dtype == rows.dtype:
        total.addmm_(d_logits.t(), rows)
    elif adds_to_wider(rows.device, rows.dtype):
        torch.addmm(total, d_logits.t(), rows, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(d_logits.t().to(total.dtype), rows.to(total.dtype))


def adds_to_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch adds a product of narrow matrices to an fp32 sum here.

    Tried once and not looked up, which waits for the device. A CPU does not, nor does torch before
    2.8; 2.8 and 2.9 have the argument, but take no sum in fp32 (pytorch #154086, #167931).
    """
    return _try_wider_sum(device, dtype)


# As torch.compiler.assume_constant_result does it, whose import brings Dynamo and Triton along.
adds_to_wider._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _try_wider_sum(device: torch.device, dtype: torch.dtype) -> bool:
    from torch._subclasses.fake_tensor import unset_fake_temporarily  # it imports Triton

    with unset_fake_temporarily():  # what has no values cannot be tried
        part = torch.ones(16, 16, dtype=dtype, device=device)
        total = torch.full((16, 16), 1 + 2**-12, dtype=torch.float32, device=device)
        try:
            torch.addmm(total, part, part, out_dtype=torch.float32, out=total)
            return bool((total == 17 + 2**-12).all())  # which neither bf16 nor fp16 can hold
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError):
            return False


def _finished(
    d_weight: torch.Tensor | None, weight: Any, main_grad: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the gradient of the weight, or what stands for it once main_grad has it.

    Megatron's hooks (megatron/core/distributed) run only if there is a gradient; they skip it where
    `grad_added_to_main_grad` is set, unless `zero_out_wgrad` says that they add it.
    """
    if d_weight is None or main_grad is None:
        return d_weight if d_weight is None else d_weight.to(weight.dtype)
    if d_weight is not main_grad:
        main_grad.add_(d_weight)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    zeroed = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if zeroed else torch.empty_like(weight)


def _check_tensors(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, parts: int
) -> None:
    """Raise ValueError unless hidden [..., H], weight [V/tp, H] and targets [...] fit together."""
    check_dtypes("hidden states", hidden, targets)
    if hidden.dtype != weight.dtype or weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)} and the hidden states {hidden.dtype} "
            f"{tuple(hidden.shape)}; expected one dtype, [V/tp, H] and [..., H]"
        )
    tokens = list(hidden.shape[:-1])
    tokens[:1] = [size * parts for size in tokens[:1]]
    if list(targets.shape) != tokens:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; expected {tuple(tokens)}: hidden "
            f"states are {tuple(hidden.shape)} on each of {parts} ranks"
        )
