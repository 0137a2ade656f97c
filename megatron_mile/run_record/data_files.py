"""Refuses data files that training would read wrongly, late or without a word."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

from megatron_mile.errors import MileError

_MAGIC, _HEAD = b"MMIDIDX\0\0", struct.Struct("<9sQBQQ")
INDEX_HEAD_BYTES = _HEAD.size
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}


class IndexHead(NamedTuple):
    """Head of an .idx.

    Behind it come the length of each sequence, i32; the offset of each in the .bin in bytes, i64;
    and the number of sequences before each document and in all, i64.
    """

    kind: int
    """Code of the tokens' type."""
    sequences: int
    borders: int
    """Number of documents, plus 1."""
    version: int = 1

    def pack(self) -> bytes:
        """Return the bytes of the file."""
        return _HEAD.pack(_MAGIC, self.version, self.kind, self.sequences, self.borders)

    @staticmethod
    def read(file: BinaryIO) -> IndexHead | None:
        """Read the head of an .idx; None for a file of another kind.

        Raises:
            struct.error: It is cut short.
        """
        content = file.read(_HEAD.size)
        if not content.startswith(_MAGIC):
            return None
        _, version, kind, sequences, borders = _HEAD.unpack(content)
        return IndexHead(kind, sequences, borders, version)


def check_pairs(prefixes: list[str]) -> None:
    """Refuse what training would only notice late, or never.

    Args:
        prefixes: paths without suffix; those that are no pair of .bin and .idx, or cannot be read,
            are passed over, and so are pipes.

    Raises:
        MileError: A .bin is shorter than its .idx says, or pairs have different tokenizers.
    """
    tokenizers = {}
    for prefix in prefixes:
        pair, info = (f"{prefix}.bin", f"{prefix}.idx"), f"{prefix}.info"
        if not all(map(os.path.isfile, pair)):
            continue
        with contextlib.suppress(OSError):
            _check_length(prefix)
            if os.path.isfile(info) and (tokenizer := _tokenizer(info)):
                tokenizers[info] = tokenizer
    check_tokenizers(tokenizers)


def check_tokenizers(tokenizers: Mapping[str, str]) -> None:
    """Refuse pairs that were made with different tokenizers.

    Args:
        tokenizers: by the path of the .info.

    Raises:
        MileError: Two differ.
    """
    first: dict[str, str] = {}
    for path, tokenizer in tokenizers.items():
        first.setdefault(tokenizer, path)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise MileError(
            f"{other}: made with another tokenizer than {one}; preprocess one of them again, "
            "or, if you know that both give the same ids, remove one .info"
        )


def _check_length(prefix: str) -> None:
    """Raise for a .bin that ends before its .idx does; OSError where one of them is not there."""
    held, said = os.path.getsize(f"{prefix}.bin"), _tokens_end(f"{prefix}.idx")
    if said is not None and held < said:
        raise MileError(
            f"{prefix}.bin: {held} bytes, but its .idx describes {said}; preprocess it again"
        )


def _tokenizer(path: str) -> str | None:
    """The tokenizer that a pair was made with; None where no .info of ours says so."""
    try:
        return tokenizer_of(path)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def tokenizer_of(path: str) -> str:
    """The tokenizer that an .info names; errors of every kind where it is damaged."""
    with open(path, encoding="utf-8") as file:
        return str(json.load(file)["tokenizer"])


def _tokens_end(path: str) -> int | None:
    """Bytes of the .bin that an .idx describes; None for an index of another kind.

    Raises:
        OSError: It cannot be read.
        MileError: It is cut short.
    """
    with open(path, "rb") as file:
        try:
            head = IndexHead.read(file)
            if head is None:
                return None
            if not head.sequences:
                return 0
            file.seek(INDEX_HEAD_BYTES + 4 * (head.sequences - 1))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(INDEX_HEAD_BYTES + 4 * head.sequences + 8 * (head.sequences - 1))
            (start,) = struct.unpack("<q", file.read(8))
        except (struct.error, ValueError, OverflowError) as error:
            raise MileError(f"{path}: cut short; preprocess the data again") from error
    token_bytes = _TOKEN_BYTES.get(head.kind)
    return start + length * token_bytes if token_bytes else None
