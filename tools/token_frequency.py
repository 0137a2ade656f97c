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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from tools.common.cli import ToolError, UsageError, new_parser, run_tool
from tools.common.files import write_whole
from tools.common.outputs import output_file
from tools.common.tokenizer import (
    add_tokenizer_flags,
    build_tokenizer,
    check_vocabulary,
    tokenizer_files,
)
from tools.data.frequency_buckets import BUCKETS, assign_buckets
from tools.data.pair_reader import files_of, open_pair

PROG = "tools/token_frequency.py"
_BLOCK_TOKENS = 1 << 22


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
    bucket = np.array(assign_buckets(counts.tolist()))
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
        args: parsed flags.

    Raises:
        ToolError: the data or the tokenizer cannot be used; nothing is written.
    """
    if args.tokenizer_type is None and args.vocab_size is None:
        raise UsageError("give --vocab-size, or --tokenizer-type and --tokenizer-model")
    if args.output is None and len(args.data_prefix) > 1:
        raise UsageError("give --output with more than one --data-prefix")
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


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--data-prefix", nargs="+", required=True, help="pairs to count, without .bin and .idx")
    add("--output", help="JSON file (default: DATA_PREFIX_token_frequency.json)")
    add_tokenizer_flags(parser, required=False)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), token_frequency, argv)


if __name__ == "__main__":
    main()
