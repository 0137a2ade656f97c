"""The tokenizer of a training run, as its arguments say it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tools.checkpoint.hf_folder import find_tokenizer
from tools.common.tokenizer import SENTENCEPIECE_TYPES, add_tokenizer_flags, build_tokenizer

HUGGING_FACE_TYPE = "HuggingFaceTokenizer"


def own_source(args: argparse.Namespace) -> Path | None:
    """Find the folder or SentencePiece file of a run's tokenizer; None where it is not here."""
    kind, name = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    known = kind in (HUGGING_FACE_TYPE, *SENTENCEPIECE_TYPES)
    return find_tokenizer(Path(name)) if known and name else None


def build_from(source: Path, args: argparse.Namespace) -> Any:
    """Build Megatron's tokenizer from a folder or SentencePiece file, with the run's other flags.

    Only not `--trust-remote-code`: a checkpoint does not decide whether foreign code runs here.

    Raises:
        ToolError: it cannot be read.
    """
    parser = argparse.ArgumentParser()
    add_tokenizer_flags(parser, required=False)
    flags = vars(parser.parse_args([]))
    flags |= {name: value for name, value in vars(args).items() if name in flags}
    flags |= {"tokenizer_model": str(source), "trust_remote_code": False}
    flags["tokenizer_type"] = type_of(source, flags["tokenizer_type"])
    return build_tokenizer(argparse.Namespace(**flags))


def type_of(source: Path, asked: str | None = None) -> str:
    """Megatron's word for the tokenizer of a folder or file; the one asked for, if it can be."""
    if source.is_dir():
        return HUGGING_FACE_TYPE
    return asked if asked and asked in SENTENCEPIECE_TYPES else SENTENCEPIECE_TYPES[0]
