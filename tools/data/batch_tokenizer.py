"""Encodes many texts at a time with the library below a Megatron tokenizer, exactly as it does one.

Two kinds of BPE encode each piece of text once and remember it, see `PieceCache`: byte-level BPE
without normalizer, as GPT-2's and those of train_tokenizer.py; and SentencePiece's BPE without
normalizer, as LLaMA's. Any other Hugging Face tokenizer encodes a batch, without the offsets that
nobody asks for. Every other library is asked text by text.

Measured as CPU time of whole runs, start-up taken off, in documents of 5 kB against a loop of json,
tokenize and Megatron's builder, in turns on two cores of an Intel Xeon: byte-level BPE on 33 MB
2.8 to 4.9 times as fast with one worker and 2.3 to 3.6 with two; SentencePiece's BPE of 32,000
tokens on 260 MB of documentation and code 2.0 and 1.9, on 60 MB of code alone 2.5 and 2.3.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import string
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np

from tools.data.sentencepiece_model import SPACE_MARK, entries, plain_bpe

# Texts -> for each its ids [n], int32 or int64.
BatchTokenizer = Callable[[Sequence[str]], list[np.ndarray]]

# The code points with Unicode's property White_Space, which \s is to the tokenizers library;
# Python's \s has U+001C to U+001F too.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# What GPT-2's pattern finds where it meets no letter beyond ASCII ...
_ASCII = (
    f"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^{_SPACE}A-Za-z0-9]+"
    f"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)
_PIECES_OF_ASCII = re.compile(_ASCII)
# ... and with a word that has one, and the white space before it, as one piece.
_PIECES = re.compile(f"[{_SPACE}]*[^{_SPACE}]*[^\\x00-\\x7f{_SPACE}][^{_SPACE}]*|{_ASCII}")
_LONG_PIECE = 32
_MANY_PIECES = 1 << 18
# Flags that change what a tokenizer gives; its files are compared by content.
_SETTINGS = (
    "tokenizer_type",
    "special_tokens",
    "tiktoken_pattern",
    "tiktoken_num_special_tokens",
    "tokenizer_sentencepiece_legacy",
    "tokenizer_hf_no_use_fast",
    "tokenizer_hf_no_include_special_tokens",
)


class PieceCache:
    """Encodes each piece of text once as long as it is remembered.

    This is exact where the texts are cut only between characters that the tokenizer never joins.
    """

    def __init__(
        self,
        split: Callable[[str], list[str]],
        encode: Callable[[list[str]], Iterable[Sequence[int]]],
    ) -> None:
        """Keep the two functions.

        Args:
            split: cuts a text into pieces.
            encode: gives the ids of each piece as the tokenizer does inside a text.
        """
        self._split, self._encode = split, encode
        self._ids: dict[str, bytes] = {}

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode the texts; the ids of each, [n], int32."""
        split = [self._split(text) for text in texts]
        new = list(set(chain.from_iterable(split)).difference(self._ids))
        for piece, ids in zip(new, self._encode(new), strict=True):
            self._ids[piece] = np.array(ids, dtype=np.int32).tobytes()
        find = self._ids.__getitem__
        found = [np.frombuffer(b"".join(map(find, pieces)), dtype=np.int32) for pieces in split]
        self._forget(new)
        return found

    def _forget(self, new: Sequence[str]) -> None:
        """Bound the memory: long pieces seldom return, and the frequent ones return at once."""
        if len(self._ids) > _MANY_PIECES:
            self._ids.clear()
            return
        for piece in new:
            if len(piece) > _LONG_PIECE:
                del self._ids[piece]


def _byte_level_cache(backend: Any) -> PieceCache | None:
    """Return a cache for a `tokenizers.Tokenizer`, if it is a plain byte-level BPE.

    ByteLevel splits a text by GPT-2's pattern, and BPE never joins across the borders, so the ids
    of a text are those of its pieces. No alternative of the pattern has white space after another
    character, and it looks ahead within white space only: every border between a word and the
    white space behind it is a border of the pattern. Words of ASCII are cut further, as the
    pattern does; for others that would depend on the version of Unicode, so they stay whole.
    """
    content = json.loads(backend.to_str())
    model, splitter = content["model"], content["pre_tokenizer"] or {}
    if not (
        content["normalizer"] is None
        and (model["type"], model.get("dropout")) == ("BPE", None)
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter["add_prefix_space"]
    ):
        return None
    added = [re.escape(token.content) for token in backend.get_added_tokens_decoder().values()]
    # Such a text stays whole; U+180E was white space before Unicode 6.3.
    whole = re.compile("|".join([*added, "\u180e"]))

    def split(text: str) -> list[str]:
        if whole.search(text):
            return [text]
        return (_PIECES_OF_ASCII if text.isascii() else _PIECES).findall(text)

    def encode(pieces: list[str]) -> Iterable[Sequence[int]]:
        encodings = backend.encode_batch_fast(pieces, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)

    return PieceCache(split, encode)


def _sentencepiece_cache(library: Any) -> PieceCache | None:
    """Return a cache for Megatron's SentencePieceTokenizer, if its model is a plain BPE.

    The vocabulary decides what BPE can join: where no entry has a space after another character,
    or a newline at all, texts can be cut before spaces and around newlines; and always between
    letters and what no entry joins to them, mostly digits and signs. The space that SentencePiece
    puts before a text is put there by hand, so that other pieces get none.
    """
    try:
        model = plain_bpe(library)
    except ImportError:  # of protobuf
        return None
    across = re.compile(f"[^{SPACE_MARK}]{SPACE_MARK}|\n")
    if model is None or any(map(across.search, entries(model))):
        return None
    normalizer = model.normalizer_spec
    start = " " if normalizer.add_dummy_prefix else ""
    normalizer.add_dummy_prefix = False
    processor = type(library.tokenizer)(model_proto=model.SerializeToString())
    words = (word.lstrip(SPACE_MARK) for word in entries(model))
    letters = re.escape("".join(sorted(_joined(words, string.ascii_letters))))
    pieces = re.compile(f" *[{letters}]+|\n+| *[^ \n{letters}]+| +")

    def split(text: str) -> list[str]:
        return [start + text] if SPACE_MARK in text else pieces.findall(start + text)

    return PieceCache(split, lambda pieces: processor.encode(pieces, num_threads=1))


def _joined(words: Iterable[str], some: Iterable[str]) -> set[str]:
    """Return these characters, all that stand beside one of them in a word, beside those, ..."""
    pairs = {pair for word in words for pair in pairwise(word)}
    found = set(some)
    while more := {char for pair in pairs if found.intersection(pair) for char in pair} - found:
        found |= more
    return found


def batch_tokenizer(tokenizer: Any) -> BatchTokenizer:
    """Return the fastest exact way to encode a batch of texts.

    Args:
        tokenizer: from `build_tokenizer`.
    """
    library, backend = tokenizer._tokenizer, _backend(tokenizer)
    if backend is not None:
        return _hugging_face(library, backend)
    is_sentencepiece = hasattr(getattr(library, "tokenizer", None), "serialized_model_proto")
    cache = _sentencepiece_cache(library) if is_sentencepiece else None
    return cache or (
        lambda texts: [np.array(tokenizer.tokenize(text), dtype=np.int64) for text in texts]
    )


def _hugging_face(library: Any, backend: Any) -> BatchTokenizer:
    """Encode with the backend of Megatron's HuggingFaceTokenizer."""
    special = bool(library.include_special_tokens and backend.num_special_tokens_to_add(False))

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    return (None if special else _byte_level_cache(backend)) or encode


def _backend(tokenizer: Any) -> Any:
    """Return the `tokenizers.Tokenizer` below a Megatron tokenizer, None for other libraries."""
    return getattr(getattr(tokenizer._tokenizer, "tokenizer", None), "backend_tokenizer", None)


def fingerprint(tokenizer: Any, args: argparse.Namespace) -> str:
    """Return a SHA-256 over what decides the ids of a tokenizer, wherever its files lie.

    Args:
        tokenizer: from `build_tokenizer`.
        args: the flags that it was built from.
    """
    library = tokenizer._tokenizer
    inner: Any = getattr(library, "tokenizer", None)
    backend = _backend(tokenizer)
    if backend is not None:
        content = backend.to_str().encode()
    elif hasattr(inner, "serialized_model_proto"):
        content = inner.serialized_model_proto()
    elif args.tokenizer_type == "NullTokenizer":
        content = b""
    else:
        content = repr(library.vocab).encode()
    settings = {name: getattr(args, name) for name in _SETTINGS}
    settings |= {"vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod}
    return hashlib.sha256(json.dumps(settings).encode() + content).hexdigest()
