"""Cross-entropy and perplexity of a Megatron checkpoint on held-out data, in all and per bucket."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tools.checkpoint.megatron_model import (
    LoadedModel,
    checkpoint_folder,
    choose_device,
    load_model,
)
from tools.common.cli import ToolError
from tools.data.frequency_buckets import BUCKETS, load_buckets
from tools.data.pair_reader import open_pair


def batches(dataset: Any, tokens: int, length: int, size: int) -> Iterator[torch.Tensor]:
    """Cut the tokens of a pair into windows that share their border tokens.

    Args:
        dataset: from `open_pair`.
        tokens: in all.
        length: tokens that are predicted in a window.
        size: windows at a time.

    Yields:
        Windows [b, length + 1], int64, b up to `size`; last, what is left over, [1, s + 1].
    """
    dtype = np.dtype(dataset.index.dtype)
    for start in range(0, tokens - 1, length * size):
        count = min(length * size, tokens - 1 - start)
        read = dataset.bin_reader.read(dtype, count + 1, start * dtype.itemsize)
        block, rest = torch.from_numpy(read.astype(np.int64)), count % length
        if count > rest:
            yield block[: count - rest + 1].unfold(0, length + 1, length)
        if rest:
            yield block[count - rest :][None]


@torch.no_grad()
def token_nll(loaded: LoadedModel, batch: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each predicted token.

    Args:
        loaded: the model.
        batch: token ids [b, s + 1], int64.

    Returns:
        nats, [b, s], fp64 on the CPU.
    """
    batch = batch.to(loaded.device)
    tokens, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    positions = torch.arange(tokens.size(1), device=loaded.device).expand_as(tokens)
    return loaded.model(tokens, positions, None, labels=labels).double().cpu()


def figures(total: float, count: int) -> tuple[float | None, float | None]:
    """Mean and perplexity of a summed cross-entropy; None where nothing was counted."""
    return (total / count, math.exp(total / count)) if count else (None, None)


def perplexity(
    load: str,
    step: int | None,
    data_prefix: str,
    token_frequency: str | None,
    *,
    batch_size: int,
    cpu: bool,
) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Args:
        load: a run's checkpoint folder, or that of one iteration.
        step: iteration; None for the latest.
        data_prefix: held-out pair, path without suffix.
        token_frequency: JSON of tools/token_frequency.py, None for no buckets.
        batch_size: windows at a time.
        cpu: use the CPU even where there is a GPU.

    Returns:
        What the docstring of tools/evaluate.py lists, but for `seconds`.

    Raises:
        ToolError: checkpoint, data and frequencies cannot be used together.
    """
    device = choose_device(cpu)
    buckets = load_buckets(token_frequency) if token_frequency else None
    dataset, tokens = open_pair(data_prefix)
    if tokens < 2:
        raise ToolError(f"{data_prefix}.bin: {tokens} tokens; expected at least 2")
    folder = checkpoint_folder(load, step)
    loaded = load_model(folder, device)
    limit = loaded.args.padded_vocab_size if buckets is None else len(buckets)
    if limit > loaded.args.padded_vocab_size:
        raise ToolError(
            f"{token_frequency}: made for a vocabulary of {limit}, but the model has "
            f"{loaded.args.padded_vocab_size}; give the tokenizer's own frequencies"
        )
    with tqdm(total=tokens - 1, unit="token", unit_scale=True, disable=None) as bar:
        stream = batches(dataset, tokens, loaded.args.seq_length, batch_size)
        sums, counts = _sum_by_bucket(loaded, stream, data_prefix, buckets, limit, bar)
    result = {
        "checkpoint": str(load),
        "iteration": loaded.iteration,
        "data": data_prefix,
        "tokens": int(counts.sum()),
    }
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(np.exp(sums / np.maximum(counts, 1))).all():
            raise ToolError(f"{folder}: the perplexity is not finite; the training diverged")
    result["cross_entropy"], result["ppl"] = figures(float(sums.sum()), int(counts.sum()))
    for index, name in enumerate(BUCKETS if buckets is not None else ()):
        result[f"tokens_{name}"] = int(counts[index])
        mean, ppl = figures(float(sums[index]), int(counts[index]))
        result[f"cross_entropy_{name}"], result[f"ppl_{name}"] = mean, ppl
    return {**result, **_conditions(loaded, buckets)}


def _sum_by_bucket(
    loaded: LoadedModel,
    stream: Iterator[torch.Tensor],
    prefix: str,
    buckets: np.ndarray | None,
    limit: int,
    bar: tqdm,
) -> tuple[np.ndarray, np.ndarray]:
    """Return summed nats and numbers of tokens per bucket, [3] fp64 and int64."""
    sums, counts = np.zeros(len(BUCKETS)), np.zeros(len(BUCKETS), dtype=np.int64)
    for batch in stream:
        if not 0 <= int(batch.min()) <= int(batch.max()) < limit:
            raise ToolError(
                f"{prefix}.bin: token ids {batch.min()} to {batch.max()} do not fit "
                f"the vocabulary of {limit}; preprocess it with the model's tokenizer"
            )
        nll = token_nll(loaded, batch).numpy().ravel()
        labels = batch[:, 1:].numpy().ravel()
        where = np.zeros_like(labels) if buckets is None else buckets[labels]
        sums += np.bincount(where, weights=nll, minlength=len(BUCKETS))
        counts += np.bincount(where, minlength=len(BUCKETS))
        bar.update(labels.size)
    return sums, counts


def _conditions(loaded: LoadedModel, buckets: np.ndarray | None) -> dict[str, Any]:
    on_gpu = loaded.device.type == "cuda"
    padded = loaded.args.padded_vocab_size
    return {
        "vocab_size": len(buckets) if buckets is not None else loaded.args.vocab_size or padded,
        "padded_vocab_size": padded,
        "megatron_core": metadata.version("megatron-core"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
