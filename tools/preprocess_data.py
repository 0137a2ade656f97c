r"""Turns text into the .bin/.idx pairs that Megatron trains on.

    python tools/preprocess_data.py --input corpus/ --output-prefix data/corpus \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model data/tokenizer \
        --append-eod --workers 4

writes data/corpus_text_document.bin and .idx, for `--data-path data/corpus_text_document`.

The flags and files are those of Megatron-LM's own tools/preprocess_data.py (its sentence splitting
and partitions left out), and so are the bytes written. It also reads folders, patterns, plain text,
.zst and .gz (see _documents.py), and needs megatron-core alone. Documents keep the order of the
input whatever `--workers` is. An existing pair is replaced; if the run fails or is interrupted with
Ctrl-C the existing pair stays, and after `kill -9` there is no .idx that could be taken for whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, closing

from _cli import ToolError, new_parser, one_line_errors
from _documents import find_files, read_records, total_bytes
from _encode import Encoder, encode_all
from _indexed_pair import IndexedPairWriter
from _megatron import add_tokenizer_flags, build_tokenizer
from tqdm import tqdm

PROG = "tools/preprocess_data.py"


def preprocess(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags of `parse_args`.

    Raises:
        ToolError: the input, the tokenizer or the output cannot be used; an existing pair stays.
    """
    files = find_files(args.input)
    keys = list(dict.fromkeys(args.json_keys))
    encoder = Encoder(build_tokenizer(args), keys, args.append_eod)
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(
                IndexedPairWriter(f"{args.output_prefix}_{key}_document", encoder.vocab_size)
            )
            for key in keys
        }
        size = total_bytes(files)
        bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, disable=None))
        records = read_records(files, bar.update)
        encoded = stack.enter_context(closing(encode_all(records, encoder, args.workers)))
        for number, document in enumerate(encoded, start=1):
            for key, (ids, lengths) in document.items():
                writers[key].add(ids, lengths)
            if number % args.log_interval == 0:
                bar.set_postfix(documents=number, refresh=False)
        for key, writer in writers.items():
            if not writer.tokens:
                raise ToolError(f"empty corpus: no token under {key!r} in {' '.join(args.input)}")
        for writer in writers.values():
            writer.commit()
    for writer in writers.values():
        print(
            f"{writer.prefix}: {writer.documents:,} documents, {writer.tokens:,} tokens"
            f" as {writer.dtype.__name__}, vocabulary {encoder.vocab_size:,}"
        )


def _positive(text: str) -> int:
    """Parse a positive number for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (default: that of the process)."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders or glob patterns")
    add("--json-keys", nargs="+", default=["text"], help="one pair for each (default: text)")
    add("--output-prefix", required=True, help="the pair is PREFIX_KEY_document.bin and .idx")
    add("--append-eod", action="store_true", help="end each document with the eod token")
    add("--workers", type=_positive, default=1, help="processes (default: %(default)s)")
    add(
        "--log-interval",
        type=_positive,
        default=1000,
        help="documents between updates of the count in the bar (default: %(default)s)",
    )
    add_tokenizer_flags(parser, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    args = parse_args(argv)
    with one_line_errors(PROG):
        preprocess(args)


if __name__ == "__main__":
    main()
