"""Trains a byte-level BPE tokenizer on a corpus.

    python tools/train_tokenizer.py --input corpus/ --vocab-size 4096 --output data/tokenizer

writes a Hugging Face tokenizer folder, for `--tokenizer-type HuggingFaceTokenizer
--tokenizer-model data/tokenizer` in Megatron and in tools/preprocess_data.py.

Method: byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over bytes, as GPT-2 does it:
every text can be encoded, and decodes to itself. The same corpus gives the same files.

Two special tokens come first: `<|endoftext|>` (id 0) ends a document. `<|padding|>` (id 1) is never
produced from a corpus: Megatron takes every pad token out of the loss, so a pad that equals the end
token would be warned about, or hide the end of each document from training; and without any pad
Megatron fails on a dataset shorter than one sample.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from tools.common.cli import ToolError, new_parser, run_tool
from tools.common.files import folder_beside, json_text
from tools.common.outputs import output_file, output_place
from tools.common.tokenizer import check_vocabulary
from tools.data.documents import find_files, read_records, total_bytes
from tools.data.texts import content_of, texts_of

PROG = "tools/train_tokenizer.py"
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SMALLEST_VOCABULARY = 256 + 2  # every byte, and the special tokens
LARGEST_FREQUENCY = 2**31 - 1
# In the order in which they are put in place: tokenizer.json makes the folder usable.
FILES = ("tokenizer_config.json", "tokenizer.json")


def train(texts: Iterator[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    """Train a tokenizer.

    Args:
        texts: the corpus.
        vocab_size: number of token ids, special tokens included; fewer where the corpus has no more
            pairs to merge.
        min_frequency: how often a pair must occur to be merged.

    Returns:
        A tokenizer whose encoding is lossless.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, output: Path) -> None:
    """Write the tokenizer folder: into a temporary one first, then renamed.

    Args:
        tokenizer: from `train`.
        output: the folder; one that `check_output` let pass may exist.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # LLaMA knows no other
    }
    # The library's own `save` ends in an error of no kind where the disk is full.
    contents = (json_text(config), tokenizer.to_str(pretty=True))
    with folder_beside(output) as folder:
        for name, content in zip(FILES, contents, strict=True):
            (folder / name).write_text(content, encoding="utf-8")
        if output.exists():
            for name in FILES:
                (folder / name).replace(output / name)
        else:
            folder.rename(output)


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse a folder that cannot be written, or whose content would be lost or mixed with others.

    Args:
        output: folder to write.
        overwrite: whether the files of an earlier tokenizer may be replaced.
        inputs: files of the corpus.

    Raises:
        ToolError: the folder holds a tokenizer and `overwrite` is not set, or an input, or other
            files; or it cannot be made.
    """
    held = sorted(os.listdir(output)) if output.exists() else []
    others = [name for name in held if name not in FILES]
    if others:
        raise ToolError(f"--output {output} holds other files ({others[0]}); choose a new folder")
    if held and not overwrite:
        raise ToolError(f"--output {output} holds a tokenizer; give --overwrite or a new folder")
    for name in held:
        output_file("--output", output / name, inputs)
    for path in (output, output / FILES[-1]):
        output_place("--output", path)


def train_tokenizer(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags.

    Raises:
        ToolError: the input or the output folder cannot be used; nothing is changed.
    """
    check_vocabulary(args.vocab_size, SMALLEST_VOCABULARY)
    if not 1 <= args.min_frequency <= LARGEST_FREQUENCY:
        raise ToolError(f"--min-frequency {args.min_frequency}: expected 1 to {LARGEST_FREQUENCY}")
    files = find_files(args.input)
    output = Path(os.path.realpath(args.output))
    check_output(output, args.overwrite, files)
    characters = 0

    def corpus(bar: tqdm) -> Iterator[str]:
        nonlocal characters
        for record in read_records(files, bar.update):
            content = content_of(record)
            for key in args.json_keys:
                texts = texts_of(record, content, key)
                characters += sum(map(len, texts))
                yield from texts

    with tqdm(total=total_bytes(files), unit="B", unit_scale=True, disable=None) as bar:
        tokenizer = train(corpus(bar), args.vocab_size, args.min_frequency)
    if not characters:
        raise ToolError(f"empty corpus: no text in {' '.join(args.input)}")
    save(tokenizer, output)
    size = tokenizer.get_vocab_size()
    short = f" (the corpus gives no more than these of {args.vocab_size:,})"
    print(
        f"{args.output}: {size:,} tokens{short if size < args.vocab_size else ''}"
        f" from {characters:,} characters"
    )


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders or glob patterns")
    add("--json-keys", nargs="+", default=["text"], help="keys to learn from (default: text)")
    add(
        "--vocab-size",
        type=int,
        default=4096,
        help="number of token ids, 256 bytes and two special tokens among them (default: "
        "%(default)s)",
    )
    add(
        "--min-frequency",
        type=int,
        default=2,
        help="occurrences that a pair needs to be merged (default: %(default)s)",
    )
    add("--output", required=True, help="folder to write")
    add("--overwrite", action="store_true", help="replace the tokenizer in --output")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), train_tokenizer, argv)


if __name__ == "__main__":
    main()
