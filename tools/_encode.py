"""Encodes documents into token ids, in order, with one process or several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from _cli import ToolError
from _documents import Record, texts_of

# A worker gets this much at a time: enough to outweigh the trip, little enough to share evenly.
_BATCH_RECORDS = 64
_BATCH_BYTES = 1 << 20

# One document: for each key its token ids [n], int32, and the length of each of its sequences.
Encoded = dict[str, tuple[np.ndarray, list[int]]]


class Encoder:
    """Encodes records into token ids, in this process or in a worker."""

    def __init__(self, tokenizer: Any, keys: Sequence[str], append_eod: bool) -> None:
        """Keep the settings.

        Args:
            tokenizer: from `build_tokenizer`.
            keys: JSON keys to encode.
            append_eod: whether each document ends with the tokenizer's end-of-document token.

        Raises:
            ToolError: the tokenizer has no such token.
        """
        self.tokenizer, self.keys = tokenizer, keys
        self.vocab_size = tokenizer.vocab_size  # counted anew at each look
        eod = tokenizer.eod if append_eod else None
        if append_eod and (eod is None or eod < 0):
            raise ToolError(
                "--append-eod: the tokenizer has no end-of-document token; give it an eos token"
                " or leave --append-eod out"
            )
        self.end: list[int] = [] if eod is None else [eod]

    def __call__(self, record: Record) -> Encoded:
        """Encode one record.

        Raises:
            ToolError: the record holds no text, or the tokenizer cannot encode it.
        """
        texts = texts_of(record, self.keys)
        return {key: self._encode(record.origin, texts[key]) for key in self.keys}

    def _encode(self, origin: str, texts: list[str]) -> tuple[np.ndarray, list[int]]:
        """Encode the texts of one document; an empty one stays empty, without end token."""
        sequences = [found for text in texts if (found := self._tokenize(origin, text))]
        if sequences:
            sequences[-1] = sequences[-1] + self.end
        ids: np.ndarray = np.array(
            [token for sequence in sequences for token in sequence], dtype=np.int64
        )
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ToolError(
                f"{origin}: token ids {ids.min()} to {ids.max()} do not fit the vocabulary of"
                f" {self.vocab_size}; check the tokenizer or --vocab-size"
            )
        return ids.astype(np.int32), [len(sequence) for sequence in sequences]

    def _tokenize(self, origin: str, text: str) -> list[int]:
        """Return the ids of a text."""
        if not text:
            return []  # Megatron's NullTokenizer cannot read an empty text
        try:
            return list(self.tokenizer.tokenize(text))
        except Exception as error:  # each tokenizer library has errors of its own
            raise ToolError(f"{origin}: the tokenizer cannot encode it ({error})") from error


_worker_encoder: Encoder


def _start_worker(encoder: Encoder, parent: int) -> None:
    """Prepare a worker process: leave Ctrl-C to the parent, and end when the parent does."""
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode_batch(batch: list[Record]) -> list[Encoded]:
    """Encode one batch in a worker."""
    return [_worker_encoder(record) for record in batch]


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records for the trip to a worker."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.raw)
        if len(batch) == _BATCH_RECORDS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(
    records: Iterable[Record], encoder: Encoder, workers: int
) -> Generator[Encoded, None, None]:
    """Encode records in order with a bounded number of batches in flight.

    Args:
        records: the documents.
        encoder: does the work.
        workers: processes; 1 encodes in this process.

    Yields:
        The documents in the order of `records`.

    Raises:
        ToolError: a record cannot be encoded, or a worker died.
    """
    if workers == 1:
        yield from map(encoder, records)
        return
    # Forked workers share the loaded tokenizer; starting Megatron anew takes each of them seconds.
    context = multiprocessing.get_context("fork")
    start = (encoder, os.getpid())
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=start)
    pending: deque[Future[list[Encoded]]] = deque()
    try:
        for batch in _batches(records):
            pending.append(pool.submit(_encode_batch, batch))
            if len(pending) > 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise ToolError("a worker was killed (out of memory?); try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
