"""Encodes documents into token ids, in order, with one process or several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from tools.common.cli import ToolError
from tools.data.batch_tokenizer import batch_tokenizer
from tools.data.documents import Position, Record
from tools.data.growing_pair import Part
from tools.data.texts import BadLineError, content_of, domain_of, texts_of

# A worker gets this much at a time: enough to outweigh the trip, little enough to share evenly.
_BATCH_RECORDS = 64
_BATCH_BYTES = 1 << 20

# What goes into one pair: a domain (None without --split-domains) and a JSON key.
Stream = tuple[str | None, str]


class Batch(NamedTuple):
    """What the encoder makes of some records."""

    parts: dict[Stream, Part]
    documents: int
    bad_lines: list[str]
    """What is wrong with the lines that were skipped."""
    size: int
    """Bytes of the records."""
    end: Position
    """Where reading goes on after them."""


class _Document(NamedTuple):
    origin: str
    domain: str | None
    texts: dict[str, list[str]]


class Encoder:
    """Encodes records into token ids, in this process or in a worker."""

    def __init__(
        self,
        tokenizer: Any,
        keys: Sequence[str],
        dtype: type[np.number],
        *,
        append_eod: bool = False,
        split_domains: bool = False,
        skip_bad_lines: bool = False,
        splitter: Callable[[str], list[str]] | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            tokenizer: from `build_tokenizer`.
            keys: JSON keys to encode.
            dtype: of the token ids in the .bin.
            append_eod: whether each document ends with the tokenizer's end-of-document token.
            split_domains: whether documents are kept apart by their domain of the Pile.
            skip_bad_lines: whether lines that cannot be read are left out instead of an error.
            splitter: splits a text into sequences; None for one sequence a text.

        Raises:
            ToolError: the tokenizer has no end-of-document token.
        """
        self._tokenize, self._dtype = batch_tokenizer(tokenizer), dtype
        self._keys, self._splitter = list(dict.fromkeys(keys)), splitter
        self._split_domains, self._skip_bad_lines = split_domains, skip_bad_lines
        self._vocab_size = tokenizer.vocab_size  # counted anew at each look
        eod = tokenizer.eod if append_eod else None
        if append_eod and (eod is None or eod < 0):
            raise ToolError(
                "--append-eod: the tokenizer has no end-of-document token; give it an eos token"
                " or leave --append-eod out"
            )
        self._end = [] if eod is None else [np.array([eod])]

    def __call__(self, records: Sequence[Record]) -> Batch:
        """Encode some records.

        Raises:
            ToolError: a record holds no text, or the tokenizer cannot encode it.
        """
        documents: list[_Document] = []
        bad_lines = []
        for record in records:
            try:
                documents.append(self._read(record))
            except BadLineError as error:
                if not self._skip_bad_lines:
                    raise
                bad_lines.append(str(error))
        size = sum(len(record.raw) for record in records)
        return Batch(self._parts(documents), len(documents), bad_lines, size, records[-1].end)

    def _read(self, record: Record) -> _Document:
        """Take out of a record what is to be encoded."""
        content = content_of(record)
        texts = {key: texts_of(record, content, key) for key in self._keys}
        if self._splitter:
            split = self._splitter
            texts = {
                key: [s for text in found for s in split(text)] for key, found in texts.items()
            }
        # Megatron's NullTokenizer cannot read an empty text.
        texts = {key: [text for text in found if text] for key, found in texts.items()}
        domain = domain_of(record, content) if self._split_domains else None
        return _Document(record.origin, domain, texts)

    def _parts(self, documents: Sequence[_Document]) -> dict[Stream, Part]:
        """Encode the documents; one without tokens stays empty, without end token."""
        found = iter(self._encode(documents))
        gathered: dict[Stream, tuple[list[np.ndarray], list[int], list[int]]] = {}
        for document in documents:
            for key, texts in document.texts.items():
                ids, lengths, counts = gathered.setdefault((document.domain, key), ([], [], []))
                sequences = [row for row in islice(found, len(texts)) if len(row)]
                ids += sequences
                lengths += map(len, sequences)
                counts.append(len(sequences))
                if sequences and self._end:
                    ids += self._end
                    lengths[-1] += 1
        return {
            stream: Part(
                np.concatenate([*ids, np.array([], np.int32)]).astype(self._dtype),
                np.array(lengths, dtype=np.int32),
                np.array(counts, dtype=np.int32),
            )
            for stream, (ids, lengths, counts) in gathered.items()
        }

    def _encode(self, documents: Sequence[_Document]) -> list[np.ndarray]:
        """Return the ids of every text, in order."""
        texts = [
            (document.origin, text)
            for document in documents
            for found in document.texts.values()
            for text in found
        ]
        try:
            rows = self._tokenize([text for _, text in texts])
        except Exception:  # each tokenizer library has errors of its own; find the text
            rows = [self._encode_one(origin, text) for origin, text in texts]
        for (origin, _), ids in zip(texts, rows, strict=True):
            if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
                raise ToolError(
                    f"{origin}: token ids {ids.min()} to {ids.max()} do not fit the vocabulary of"
                    f" {self._vocab_size}; check the tokenizer or --vocab-size"
                )
        return rows

    def _encode_one(self, origin: str, text: str) -> np.ndarray:
        try:
            return self._tokenize([text])[0]
        except Exception as error:
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


def _encode_batch(records: list[Record]) -> Batch:
    """Encode one batch in a worker."""
    return _worker_encoder(records)


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
) -> Generator[Batch, None, None]:
    """Encode records in order with a bounded number of batches in flight.

    Args:
        records: the documents.
        encoder: does the work.
        workers: processes; 1 encodes in this process.

    Yields:
        What the encoder returns for consecutive records, in their order.

    Raises:
        ToolError: a record cannot be encoded, or a worker died.
    """
    if workers == 1:
        yield from map(encoder, _batches(records))
        return
    # Forked workers share the loaded tokenizer; starting Megatron anew takes each of them seconds.
    context = multiprocessing.get_context("fork")
    start = (encoder, os.getpid())
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=start)
    pending: deque[Future[Batch]] = deque()
    try:
        for batch in _batches(records):
            pending.append(pool.submit(_encode_batch, batch))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ToolError("a worker was killed (out of memory?); try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
