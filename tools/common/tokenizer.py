"""Megatron's tokenizers, by the flags of a training run; of megatron-core alone."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

from tools.common.cli import ToolError
from tools.common.megatron import megatron_module

# Far above any in use; what is counted, sorted and written for each token id stays in memory.
LARGEST_VOCABULARY = 1 << 24
# One tokenizer under three names.
SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "Llama2Tokenizer", "GPTSentencePieceTokenizer")
TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    *SENTENCEPIECE_TYPES,
    "GPT2BPETokenizer",
    "TikTokenizer",
    "NullTokenizer",
)
# What megatron.core's build_tokenizer reads from the arguments of a training run and the tools have
# no flag for, at the defaults of megatron.training 0.19.2 (class TokenizerConfig).
_OTHER_SETTINGS = {
    "chat_template": None,
    "pad_vocab_size": False,
    "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
    "metadata_path": None,
}


def add_tokenizer_flags(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the tokenizer flags of a Megatron run, under the same names.

    Args:
        parser: gets one argument group.
        required: whether `--tokenizer-type` must be given.
    """
    group = parser.add_argument_group("tokenizer", "give what the training run will be given")
    add = group.add_argument
    add("--tokenizer-type", choices=TOKENIZER_TYPES, required=required)
    add("--tokenizer-model", help="folder, file or Hugging Face name, depending on the type")
    add("--vocab-size", type=int, help="number of token ids (NullTokenizer, TikTokenizer)")
    add("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    add("--merge-file", help="merges.txt of GPT2BPETokenizer")
    add(
        "--tokenizer-special-tokens",
        dest="special_tokens",
        nargs="+",
        help="more special tokens",
    )
    add("--tiktoken-pattern", choices=("v1", "v2"), help="pattern that splits the text")
    add("--tiktoken-num-special-tokens", type=int, default=1000, help="default: %(default)s")
    add(
        "--tokenizer-sentencepiece-legacy",
        action="store_true",
        help="let SentencePiece tokenizers take special tokens",
    )
    add("--tokenizer-hf-no-use-fast", action="store_true", help="Hugging Face's slow class")
    add(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="leave out what a Hugging Face tokenizer adds by itself, such as BOS",
    )
    add("--trust-remote-code", action="store_true", help="run code that comes with a tokenizer")


def build_tokenizer(args: argparse.Namespace) -> Any:
    """Build the tokenizer that a Megatron run with these flags would build.

    Args:
        args: parsed flags of `add_tokenizer_flags`.

    Returns:
        A megatron.core tokenizer: `tokenize(text) -> list[int]`, `vocab_size`, `eod`.

    Raises:
        ToolError: a flag or the tokenizer itself is missing, or it cannot be read.
    """
    _check_source(args)
    # Each document is encoded by itself; worker processes give the parallelism.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    build = megatron_module("megatron.core.tokenizers.utils.build_tokenizer").build_tokenizer
    try:
        return build(argparse.Namespace(**{**_OTHER_SETTINGS, **vars(args)}))
    except Exception as error:  # each tokenizer library has errors of its own
        name = args.tokenizer_model or args.vocab_file or args.tokenizer_type
        raise ToolError(
            f"the tokenizer {name!r} could not be read as {args.tokenizer_type}:"
            f" {str(error) or repr(error)}"
        ) from error


def tokenizer_files(args: argparse.Namespace) -> list[str]:
    """List the files and folders that `build_tokenizer` reads, as far as flags name them.

    Args:
        args: parsed flags of `add_tokenizer_flags`.
    """
    return [path for path in (args.tokenizer_model, args.vocab_file, args.merge_file) if path]


def check_vocabulary(size: int, smallest: int = 1) -> None:
    """Refuse a --vocab-size that no tokenizer can have.

    Raises:
        ToolError: it is out of range.
    """
    if not smallest <= size <= LARGEST_VOCABULARY:
        raise ToolError(f"--vocab-size {size}: expected {smallest} to {LARGEST_VOCABULARY}")


def _check_source(args: argparse.Namespace) -> None:
    """Name a missing flag, file or folder before a library does so at length."""
    kind, model = args.tokenizer_type, args.tokenizer_model
    if args.vocab_size is not None:
        check_vocabulary(args.vocab_size)
    if kind == "NullTokenizer" and args.vocab_size is None:
        raise ToolError("NullTokenizer needs --vocab-size, the number of token ids")
    if kind in ("NullTokenizer", "GPT2BPETokenizer"):
        return
    if model is None:
        raise ToolError(f"{kind} needs --tokenizer-model")
    if os.path.exists(model):
        return
    # A name on the Hugging Face Hub is NAME or OWNER/NAME; a folder called OWNER makes it a path.
    maybe_hub = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model)
    local = os.path.dirname(model) and os.path.isdir(os.path.dirname(model))
    if kind != "HuggingFaceTokenizer" or local or not maybe_hub:
        raise ToolError(f"no tokenizer at {model!r}; check --tokenizer-model")
    print(f"no folder {model!r} here; asking the Hugging Face Hub for it", file=sys.stderr)
