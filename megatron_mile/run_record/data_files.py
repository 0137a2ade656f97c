"""Refuses data files that training would read wrongly, late or without a word."""

from __future__ import annotations

import contextlib
import json
import os
import struct

from megatron_mile.errors import MileError

# Head of .idx: magic, version, code of the token type, sequences, documents + 1. Behind it come
# the length of each sequence, i32, and then the offset of each in the .bin, i64.
_MAGIC, _INDEX = b"MMIDIDX\0\0", struct.Struct("<9sQBQQ")
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}


def check_pairs(prefixes: list[str]) -> None:
    """Refuse what training would only notice late, or never.

    Args:
        prefixes: paths without suffix; those that are no pair of .bin and .idx, or cannot be read,
            are passed over.

    Raises:
        MileError: A .bin is shorter than its .idx says, or pairs have different tokenizers.
    """
    first: dict[str, str] = {}
    for prefix in prefixes:
        with contextlib.suppress(OSError):
            _check_length(prefix)
            tokenizer = _tokenizer(f"{prefix}.info")
            if tokenizer:
                first.setdefault(tokenizer, f"{prefix}.info")
        if len(first) > 1:
            one, other = first.values()
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
        with open(path, encoding="utf-8") as file:
            return str(json.load(file)["tokenizer"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _tokens_end(path: str) -> int | None:
    """Bytes of the .bin that an .idx describes; None for an index of another kind.

    Raises:
        OSError: It cannot be read.
        MileError: It is cut short.
    """
    with open(path, "rb") as file:
        head = file.read(_INDEX.size)
        if not head.startswith(_MAGIC):
            return None
        try:
            _, _, kind, sequences, _ = _INDEX.unpack(head)
            if not sequences:
                return 0
            file.seek(_INDEX.size + 4 * (sequences - 1))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(_INDEX.size + 4 * sequences + 8 * (sequences - 1))
            (start,) = struct.unpack("<q", file.read(8))
        except (struct.error, ValueError, OverflowError) as error:
            raise MileError(f"{path}: cut short; preprocess the data again") from error
    return start + length * _TOKEN_BYTES[kind] if kind in _TOKEN_BYTES else None
