"""How often each token occurs: the file of tools/token_frequency.py, its buckets, its tables.

Buckets, after MiLe Loss (arXiv 2310.19531): with the tokens sorted by count, high are the most
frequent ones that make up 80 % of all occurrences, medium the next 15 %, low the last 5 %.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_mile.errors import MileError

BUCKETS = ("high", "medium", "low")
# Percent of all occurrences at which medium and low begin.
BORDERS = (80, 95)
_TOOL = "tools/token_frequency.py"


class TokenFrequencies(NamedTuple):
    """What such a file says, one entry for each token id."""

    counts: list[int]
    """Occurrences, >= 0, not all 0."""
    buckets: list[int]
    """Index into `BUCKETS`."""

    @property
    def digest(self) -> str:
        """SHA-256 of the counts, from which all else follows."""
        return hashlib.sha256(json.dumps(self.counts).encode()).hexdigest()


def assign_buckets(counts: Sequence[int]) -> list[int]:
    """Sort token ids into the buckets, a token on a border into the more frequent one.

    In order of the counts, largest first, ties by id, a token is high if those before it make up
    less than 80 %, medium if less than 95 %, else low. One that never occurs is low.

    Args:
        counts: Occurrences of each token id, not all zero; compared as integers, never rounded.

    Returns:
        Index into `BUCKETS` for each token id.
    """
    total, before, buckets = sum(counts), 0, [0] * len(counts)
    for token in sorted(range(len(counts)), key=lambda token: -counts[token]):  # stable
        buckets[token] = sum(before * 100 >= border * total for border in BORDERS)
        before += counts[token]
    return buckets


def read_frequencies(path: str | Path) -> TokenFrequencies:
    """Read what tools/token_frequency.py wrote.

    Raises:
        MileError: There is no such file, it cannot be read, or it is not what that tool writes.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        counts, buckets = content["counts"], content["bucket"]
        _refuse_negative(path, counts)
        if _is_whole(content):
            return TokenFrequencies(counts, buckets)
    except OSError as error:
        raise MileError(f"{path}: {error.strerror or error}; make it with {_TOOL}") from error
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise MileError(f"{path}: not a token frequency file; make it with {_TOOL}")


def _refuse_negative(path: str | Path, counts: Sequence[int]) -> None:
    token = next((token for token, count in enumerate(counts) if count < 0), None)
    if token is not None:
        raise MileError(
            f"{path}: token {token} has the count {counts[token]}; expected 0 or more; make it "
            f"anew with {_TOOL}"
        )


def _is_whole(content: dict[str, Any]) -> bool:
    """Whether there is a bucket for each token id, the one that its count gives."""
    buckets, counts = content["bucket"], content["counts"]
    numbers = (content["vocab_size"], content["tokens"], *buckets, *counts)
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and len(buckets) == len(counts) == content["vocab_size"] > 0
        and sum(counts) == content["tokens"] > 0
        and assign_buckets(counts) == buckets
    )


def check_vocabulary(frequencies: TokenFrequencies, path: str, words: int, columns: int) -> None:
    """Raise unless frequencies are of a vocabulary from `words` to `columns` tokens.

    Args:
        frequencies: What was read.
        path: From where.
        words: The tokenizer's size.
        columns: Of the model's vocabulary with its padding.

    Raises:
        MileError: They are not.
    """
    size = len(frequencies.counts)
    if not words <= size <= columns:
        raise MileError(
            f"{path}: made for a vocabulary of {size}, but the tokenizer has {words} tokens and "
            f"the model {columns} columns; count the data of this tokenizer with {_TOOL}"
        )


class FrequencyTables:
    """The frequencies on a device, to be looked up by target; one gather each, nothing waits."""

    def __init__(
        self, frequencies: TokenFrequencies, columns: int, device: torch.device | str
    ) -> None:
        """Lay out tables [columns]; padding never occurs and is low."""
        padding = columns - len(frequencies.counts)
        counts = torch.tensor(frequencies.counts, dtype=torch.float64)
        low = BUCKETS.index("low")
        buckets = torch.tensor(frequencies.buckets + [low] * padding, dtype=torch.int8)
        relative = torch.cat([counts / counts.sum(), counts.new_zeros(padding)])
        self._buckets, self._relative = buckets.to(device), relative.to(device)

    def buckets(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the index into `BUCKETS` of each label, int8, the shape of `labels`."""
        return _look_up(self._buckets, labels)

    def inputs(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what `token_loss` takes: "frequency", the labels' share of all tokens, fp64."""
        return {"frequency": _look_up(self._relative, labels)}


def _look_up(table: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the entries [...] of labels [...]; any for those outside, which have no loss."""
    return table[labels.long().clamp(0, len(table) - 1)]
