"""Counts how often each token occurs, and sorts the vocabulary into high, medium and low.

    python tools/token_frequency.py --data-prefix data/corpus_text_document --vocab-size 4096

writes data/corpus_text_document_token_frequency.json, from which tools/evaluate.py reports the
perplexity per bucket.

Buckets, after MiLe Loss (arXiv 2310.19531): with the tokens sorted by count, high are the most
frequent ones that make up 80 % of all occurrences, medium the next 15 %, low the last 5 %. Exactly:
order by count, largest first, ties by id; a token is high if the tokens before it make up less than
80 %, medium if less than 95 %, else low. So the token on a border belongs to the more frequent
bucket, and a token that never occurs is low.

The file is JSON: `vocab_size`; `tokens`, all occurrences; `shares` of the occurrences and `sizes`
in token ids of each bucket; `counts` and `bucket` (0 high, 1 medium, 2 low), one entry for each id;
`source`, the data prefixes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _cli import ToolError, new_parser, one_line_errors, read_json, write_whole
from _megatron import add_tokenizer_flags, build_tokenizer, check_vocabulary, tokenizer_files
from _output import output_file
from _pair_reader import files_of, open_pair
from tqdm import tqdm

PROG = "tools/token_frequency.py"
BUCKETS = ("high", "medium", "low")
# Percent of all occurrences at which medium and low begin.
BORDERS = (80, 95)
_BLOCK_TOKENS = 1 << 22


def assign_buckets(counts: np.ndarray) -> np.ndarray:
    """Sort token ids into the three frequency buckets of the module docstring.

    Args:
        counts: occurrences [V], int64, not all zero. Up to 9e16 in all, where 100 times the sum
            still fits; the borders are compared in integers, so nothing is rounded.

    Returns:
        Index into `BUCKETS` for each token id, [V], int8.
    """
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    bucket = np.empty(len(counts), dtype=np.int8)
    bucket[order] = sum(before * 100 >= border * counts.sum() for border in BORDERS)
    return bucket


def load_buckets(path: str | Path) -> np.ndarray:
    """Read the buckets that this tool wrote.

    Args:
        path: the JSON file.

    Returns:
        Index into `BUCKETS` for each token id, [V], int8.

    Raises:
        ToolError: the file is not what this tool writes.
        OSError: it cannot be read.
    """
    try:
        content = read_json(path)
        if _is_whole(content):
            return np.array(content["bucket"], dtype=np.int8)
    except (ValueError, KeyError, TypeError, OverflowError):
        pass
    raise ToolError(f"{path}: not a token frequency file; make it with {PROG}")


def _is_whole(content: dict[str, Any]) -> bool:
    """Whether there is a bucket for each token id, the one that its count gives."""
    bucket, counts = content["bucket"], content["counts"]
    numbers = (content["vocab_size"], content["tokens"], *bucket, *counts)
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and len(bucket) == len(counts) == content["vocab_size"] > 0
        and sum(counts) == content["tokens"] > 0
        and assign_buckets(np.array(counts, dtype=np.int64)).tolist() == bucket
    )


def count_tokens(prefix: str, counts: np.ndarray) -> None:
    """Add the tokens of one .bin/.idx pair to the counts, block by block.

    Args:
        prefix: path of the pair without suffix.
        counts: occurrences [V], int64; changed in place.

    Raises:
        ToolError: the pair is incomplete or damaged, or holds ids outside the vocabulary.
    """
    dataset, tokens = open_pair(prefix)
    dtype = dataset.index.dtype
    with tqdm(total=tokens, unit="token", unit_scale=True, disable=None) as bar:
        for start in range(0, tokens, _BLOCK_TOKENS):
            size = min(_BLOCK_TOKENS, tokens - start)
            ids = dataset.bin_reader.read(dtype, size, start * np.dtype(dtype).itemsize)
            if not 0 <= ids.min() <= ids.max() < len(counts):
                raise ToolError(
                    f"{prefix}.bin: token ids {ids.min()} to {ids.max()} do not fit the vocabulary"
                    f" of {len(counts)}; give the tokenizer that made the data"
                )
            counts += np.bincount(ids, minlength=len(counts))
            bar.update(size)


def summarize(counts: np.ndarray, source: Sequence[str]) -> dict[str, Any]:
    """Build the content of the JSON file from the counts [V] of the data prefixes."""
    bucket = assign_buckets(counts)
    occurrences = [int(counts[bucket == index].sum()) for index in range(len(BUCKETS))]
    sizes = [int((bucket == index).sum()) for index in range(len(BUCKETS))]
    total = sum(occurrences)
    return {
        "vocab_size": len(counts),
        "tokens": total,
        "shares": {name: part / total for name, part in zip(BUCKETS, occurrences, strict=True)},
        "sizes": dict(zip(BUCKETS, sizes, strict=True)),
        "counts": counts.tolist(),
        "bucket": bucket.tolist(),
        "source": list(source),
    }


def token_frequency(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags of `parse_args`.

    Raises:
        ToolError: the data or the tokenizer cannot be used; nothing is written.
    """
    inputs = [file for prefix in args.data_prefix for file in files_of(prefix)]
    name = args.output
    if name is None:
        name = f"{args.data_prefix[0]}_token_frequency.json"
    output = output_file("--output", name, [*inputs, *tokenizer_files(args)])
    size = build_tokenizer(args).vocab_size if args.tokenizer_type else args.vocab_size
    check_vocabulary(size)
    counts = np.zeros(size, dtype=np.int64)
    for prefix in args.data_prefix:
        count_tokens(prefix, counts)
    if not counts.any():
        raise ToolError(f"no tokens in {' '.join(args.data_prefix)}")
    content = summarize(counts, args.data_prefix)
    write_whole(output, json.dumps(content) + "\n")
    print(f"{name}: {content['tokens']:,} tokens\n{'bucket':8}{'token ids':>12}{'share':>10}")
    for name in BUCKETS:
        print(f"{name:8}{content['sizes'][name]:>12,}{content['shares'][name]:>10.2%}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (default: that of the process)."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--data-prefix", nargs="+", required=True, help="pairs to count, without .bin and .idx")
    add("--output", help="JSON file (default: DATA_PREFIX_token_frequency.json)")
    add_tokenizer_flags(parser, required=False)
    args = parser.parse_args(argv)
    if args.tokenizer_type is None and args.vocab_size is None:
        parser.error("give --vocab-size, or --tokenizer-type and --tokenizer-model")
    if args.output is None and len(args.data_prefix) > 1:
        parser.error("give --output with more than one --data-prefix")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    args = parse_args(argv)
    with one_line_errors(PROG):
        token_frequency(args)


if __name__ == "__main__":
    main()
