r"""Turns text into the .bin/.idx pairs that Megatron trains on.

    python tools/preprocess_data.py --input corpus/ --output-prefix data/corpus \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model data/tokenizer \
        --append-eod --workers 4

writes data/corpus_text_document.bin and .idx, for `--data-path data/corpus_text_document`, and
beside them .info: what they hold, and a fingerprint of the tokenizer.

The flags and files are those of Megatron-LM's own tools/preprocess_data.py (its partitions left
out), and so are the bytes written. It also reads folders, patterns, plain text, .zst and .gz (see
tools/data/documents.py), and needs megatron-core alone. Documents keep the order of the input
whatever `--workers` is, and memory does not grow with the input.

An interrupted or killed run loses less than one shard, --shard-bytes of text: the same command goes
on where the last whole shard ended. Until the end everything lies in data/corpus.partial/ and an
existing pair stays as it is; after `kill -9` there is no .idx that could be taken for whole.

The Pile, each of its domains as a pair (data/pile_Pile-CC_text_document and so on), for
tools/pile_blend.py:

    python tools/preprocess_data.py --input pile/train --output-prefix data/pile --split-domains \
        --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model --append-eod --workers 64

With --split-sentences each sentence becomes a sequence of its document, as BERT-style datasets want
it, and the pair is PREFIX_text_sentence.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from tools.common.cli import new_parser, run_tool
from tools.common.megatron import megatron_module
from tools.common.tokenizer import add_tokenizer_flags, build_tokenizer, tokenizer_files
from tools.data.batch_tokenizer import fingerprint
from tools.data.documents import find_files, read_records, total_bytes
from tools.data.encoder import Encoder, encode_all
from tools.data.texts import sentence_splitter
from tools.data.work_folder import WorkFolder, check_prefix

PROG = "tools/preprocess_data.py"


def preprocess(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags.

    Raises:
        ToolError: the input, the tokenizer or the output cannot be used; an existing pair stays.
    """
    files = find_files(args.input)
    level = "sentence" if args.split_sentences else "document"
    check_prefix(
        args.output_prefix,
        [f"{'*_' * args.split_domains}{glob.escape(key)}_{level}" for key in args.json_keys],
        [*files, *tokenizer_files(args)],
    )
    tokenizer = build_tokenizer(args)
    # Below 65500 token ids Megatron stores 2 bytes a token, else 4.
    kinds = megatron_module("megatron.core.datasets.indexed_dataset").DType
    dtype = kinds.optimal_dtype(tokenizer.vocab_size)
    encoder = Encoder(
        tokenizer,
        args.json_keys,
        dtype,
        append_eod=args.append_eod,
        split_domains=args.split_domains,
        skip_bad_lines=args.skip_bad_lines,
        splitter=sentence_splitter(args.lang) if args.split_sentences else None,
    )
    settings = _settings(args, files, fingerprint(tokenizer, args))
    with WorkFolder(args.output_prefix, level, dtype, settings) as work:
        if not work.complete:
            _encode_files(args, files, encoder, work)
        pairs = work.publish()
    for prefix, sizes in pairs.items():
        print(
            f"{prefix}: {sizes.documents:,} documents, {sizes.tokens:,} tokens"
            f" as {dtype.__name__}, vocabulary {tokenizer.vocab_size:,}"
        )
    if work.bad_lines:
        print(f"{work.bad_lines:,} bad lines skipped", file=sys.stderr)


def _settings(args: argparse.Namespace, files: Sequence[Path], tokenizer: str) -> dict[str, Any]:
    """Return all that the tokens depend on, under names for error messages."""
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {
        "tokenizer": tokenizer,
        "input (names, sizes, times of change)": hashlib.sha256(
            json.dumps(states).encode()
        ).hexdigest(),
        "--json-keys": args.json_keys,
        "--append-eod": args.append_eod,
        "--split-domains": args.split_domains,
        "--split-sentences": args.lang if args.split_sentences else None,
    }


def _encode_files(
    args: argparse.Namespace, files: Sequence[Path], encoder: Encoder, work: WorkFolder
) -> None:
    """Encode the files from where `work` stands, and save every shard."""
    shown = work.documents
    if shown:
        print(f"going on after {shown:,} finished documents", file=sys.stderr)
    with tqdm(total=total_bytes(files), unit="B", unit_scale=True, disable=None) as bar:
        records = read_records(files, bar.update, work.position)
        with closing(encode_all(records, encoder, _workers(args.workers))) as batches:
            for batch in batches:
                work.add(batch)
                for line in batch.bad_lines:
                    tqdm.write(f"skipped: {line}", file=sys.stderr)
                if work.unsaved >= args.shard_bytes:
                    work.save()
                if work.documents >= shown + args.log_interval:
                    shown = work.documents
                    bar.set_postfix(documents=shown, refresh=False)
    work.save(complete=True)


def _workers(asked: int) -> int:
    """Return how many processes to start: what was asked for, or one for each core."""
    cores = len(os.sched_getaffinity(0))
    if asked > cores:
        print(f"{PROG}: --workers {asked}: using {cores}, one for each core", file=sys.stderr)
    return min(asked, cores)


def _positive(text: str) -> int:
    """Parse a positive number for argparse."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders or glob patterns")
    add("--json-keys", nargs="+", default=["text"], help="one pair for each (default: text)")
    add("--output-prefix", required=True, help="the pair is PREFIX_KEY_document.bin, .idx")
    add("--append-eod", action="store_true", help="end each document with the eod token")
    add(
        "--split-domains",
        action="store_true",
        help="one pair for each domain of the Pile: PREFIX_DOMAIN_KEY_document, by the line's"
        " meta.pile_set_name",
    )
    add(
        "--split-sentences",
        action="store_true",
        help="one sequence for each sentence, found by NLTK: PREFIX_KEY_sentence",
    )
    add("--lang", default="english", help="NLTK's model for that (default: %(default)s)")
    add(
        "--skip-bad-lines",
        action="store_true",
        help="name and count lines that are no JSON object of UTF-8 text, and go on",
    )
    add(
        "--workers",
        type=_positive,
        default=1,
        help="processes, at most one for each core (default: %(default)s)",
    )
    add(
        "--log-interval",
        type=_positive,
        default=1000,
        help="documents between updates of the count in the bar (default: %(default)s)",
    )
    add(
        "--shard-bytes",
        type=_positive,
        default=1 << 28,
        help="text that is finished at a time and survives a kill (default: %(default)s)",
    )
    add_tokenizer_flags(parser, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), preprocess, argv)


if __name__ == "__main__":
    main()
