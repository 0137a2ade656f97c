r"""Evaluates a Megatron checkpoint on held-out data: cross-entropy and perplexity.

    python tools/evaluate.py --load runs/mile/checkpoints \
        --data-prefix data/heldout_text_document \
        --token-frequency data/train_token_frequency.json --output evaluation.json

Every token of the data but the first is predicted once, by plain cross-entropy whatever objective
trained the model: the documents are read as one stream, cut into windows of the training sequence
length. With --token-frequency (made by tools/token_frequency.py) the figures are also given for the
high, medium and low frequency tokens. One process; a checkpoint of any parallel layout.

The JSON: `checkpoint`, `iteration`, `data`, `tokens`, `cross_entropy` (nats), `ppl`, per bucket
`tokens_high`, `cross_entropy_high`, `ppl_high` and so on, `vocab_size`, `padded_vocab_size`,
`megatron_core`, `torch`, `device`, `seconds`. A bucket without tokens has null.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _checkpoint import LoadedModel, checkpoint_folder, choose_device, load_model
from _cli import ToolError, new_parser, one_line_errors, write_whole
from token_frequency import BUCKETS, load_buckets, open_pair
from tqdm import tqdm

PROG = "tools/evaluate.py"


def windows(prefix: str, length: int) -> Iterator[np.ndarray]:
    """Cut the tokens of a pair into windows [length + 1] that share their border token."""
    dataset, tokens = open_pair(prefix)
    dtype = np.dtype(dataset.index.dtype)
    for start in range(0, tokens - 1, length):
        size = min(length + 1, tokens - start)
        yield dataset.bin_reader.read(dtype, size, start * dtype.itemsize).astype(np.int64)


def batches(prefix: str, length: int, size: int) -> Iterator[torch.Tensor]:
    """Stack up to `size` windows of equal length into int64 tensors [b, s + 1]."""
    waiting: list[np.ndarray] = []
    for window in windows(prefix, length):
        if waiting and (len(waiting) == size or len(window) != len(waiting[0])):
            yield torch.from_numpy(np.stack(waiting))
            waiting = []
        waiting.append(window)
    if waiting:
        yield torch.from_numpy(np.stack(waiting))


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


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Run the tool.

    Args:
        args: parsed flags of `parse_args`.

    Returns:
        The content of the JSON file.

    Raises:
        ToolError: checkpoint, data and frequencies cannot be used together.
    """
    started = time.monotonic()
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise ToolError(f"no folder for --output {args.output}; make it first")
    device = choose_device(args.cpu)
    buckets = load_buckets(args.token_frequency) if args.token_frequency else None
    _, tokens = open_pair(args.data_prefix)
    if tokens < 2:
        raise ToolError(f"{args.data_prefix}.bin: {tokens} tokens; expected at least 2")
    folder = checkpoint_folder(args.load, args.ckpt_step)
    loaded = load_model(folder, device)
    sums, counts = _sum_by_bucket(loaded, args, buckets, tokens)
    result = {
        "checkpoint": str(args.load),
        "iteration": loaded.iteration,
        "data": args.data_prefix,
        "tokens": int(counts.sum()),
    }
    if not np.isfinite(sums).all():
        raise ToolError(f"{folder}: the model's cross-entropy is not finite; its training diverged")
    result["cross_entropy"], result["ppl"] = figures(float(sums.sum()), int(counts.sum()))
    for index, name in enumerate(BUCKETS if buckets is not None else ()):
        result[f"tokens_{name}"] = int(counts[index])
        mean, ppl = figures(float(sums[index]), int(counts[index]))
        result[f"cross_entropy_{name}"], result[f"ppl_{name}"] = mean, ppl
    return {**result, **_conditions(loaded, buckets), "seconds": time.monotonic() - started}


def _sum_by_bucket(
    loaded: LoadedModel, args: argparse.Namespace, buckets: np.ndarray | None, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return summed nats and numbers of tokens per bucket, [3] fp64 and int64."""
    sums, counts = np.zeros(len(BUCKETS)), np.zeros(len(BUCKETS), dtype=np.int64)
    limit = loaded.args.padded_vocab_size if buckets is None else len(buckets)
    if limit > loaded.args.padded_vocab_size:
        raise ToolError(
            f"{args.token_frequency}: made for a vocabulary of {limit}, but the model has "
            f"{loaded.args.padded_vocab_size}; give the tokenizer's own frequencies"
        )
    with tqdm(total=tokens - 1, unit="token", unit_scale=True, disable=None) as bar:
        for batch in batches(args.data_prefix, loaded.args.seq_length, args.micro_batch_size):
            if not 0 <= int(batch.min()) <= int(batch.max()) < limit:
                raise ToolError(
                    f"{args.data_prefix}.bin: token ids {batch.min()} to {batch.max()} do not fit "
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


def table(result: dict[str, Any]) -> str:
    """Lay the figures out for people."""
    rows = [f"{'tokens':10}{'count':>12}{'cross-entropy':>16}{'ppl':>12}"]
    for suffix in ("", *("_" + name for name in BUCKETS)):
        if result.get("ppl" + suffix) is not None:
            rows.append(
                f"{suffix[1:] or 'all':10}{result['tokens' + suffix]:>12,}"
                f"{result['cross_entropy' + suffix]:>16.4f}{result['ppl' + suffix]:>12.3f}"
            )
    return "\n".join(rows)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (default: that of the process)."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--load", required=True, help="Megatron checkpoint folder (torch_dist)")
    add("--ckpt-step", type=int, help="iteration (default: the latest)")
    add("--data-prefix", required=True, help="held-out data, path without .bin and .idx")
    add("--token-frequency", help="JSON of tools/token_frequency.py, for figures per bucket")
    add("--output", help="JSON file to write (default: none, the table only)")
    add("--micro-batch-size", type=int, default=8, help="windows at a time (default: %(default)s)")
    add("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    args = parser.parse_args(argv)
    if args.micro_batch_size < 1:
        parser.error(f"--micro-batch-size {args.micro_batch_size}: expected at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    args = parse_args(argv)
    warnings.simplefilter("ignore")  # Megatron's own notices about missing GPU packages
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with one_line_errors(PROG):
        result = evaluate(args)
        if args.output:
            write_whole(Path(args.output), json.dumps(result, indent=2) + "\n")
        print(table(result))


if __name__ == "__main__":
    # A clone that is not installed is found too.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
