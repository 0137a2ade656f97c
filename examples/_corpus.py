"""The quickstart's text: documents that every machine has, or the user's own, split in two.

A document is a file of text, a line of a .jsonl file (its key `text`), or, where the corpus is one
file of plain text, a passage of at least `PASSAGE` characters cut at blank lines (at line ends if
there are none). About `HELD_OUT` of the text is held out, in whole documents chosen by a hash of
where they come from: the same corpus is always split alike. Everything is kept in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".js")
SUFFIXES = (".jsonl", *TEXT_SUFFIXES)
# Packages of others, and sources that are mostly tables of test data.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
HELD_OUT = 0.05
PASSAGE = 2000
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar")


class QuickstartError(ValueError):
    """Something that the quickstart cannot use; the message says what to do."""


class Document(NamedTuple):
    """One text of the corpus."""

    origin: str
    """Path relative to the corpus, with `:NUMBER` for a part of a file."""
    text: str


def read_corpus(corpus: Path | None, left_out: Path) -> list[Document]:
    """Read every document of the corpus, in sorted order.

    Args:
        corpus: a file or a folder; None for the standard library of the running Python, with the
            documentation text in it.
        left_out: a folder below which nothing is read: that of the run.

    Returns:
        The documents that hold more than white space, at least two.

    Raises:
        QuickstartError: there are fewer than two, or a file is not what its name says.
    """
    root = Path(sysconfig.get_path("stdlib")) if corpus is None else corpus.resolve()
    files = [root] if root.is_file() else list(_files(root, left_out, corpus is None))
    documents: list[Document] = []
    for file in files:
        origin = file.name if file == root else file.relative_to(root).as_posix()
        try:
            documents += _documents(file, origin, whole=len(files) > 1)
        except UnicodeDecodeError:
            if corpus is not None:
                raise QuickstartError(f"{file}: not UTF-8 text; convert or remove it") from None
    documents = [document for document in documents if document.text.strip()]
    if len(documents) < 2:
        raise QuickstartError(
            f"corpus {root}: {len(files)} readable files with {len(documents)} documents; expected "
            f"a text file, or a folder of {' '.join(SUFFIXES)} files, with at least 2"
        )
    return documents


def _files(root: Path, left_out: Path, is_library: bool) -> Iterator[Path]:
    """Yield the text files below a folder, sorted, without hidden ones and without `left_out`."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".")
            and Path(folder, name) != left_out
            and not (is_library and name in LEFT_OUT)
        )
        for name in sorted(names):
            if name.endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)


def _documents(file: Path, origin: str, whole: bool) -> Iterator[Document]:
    """Yield the documents of one file; `whole`: a text file is one document."""
    if file.suffix in _COMPRESSED:
        raise QuickstartError(f"corpus {file}: compressed; decompress it first")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield Document(f"{origin}:{number}", _text_of(line, f"{file}:{number}"))
    elif whole:
        yield Document(origin, text)
    else:
        for number, passage in enumerate(_passages(text), start=1):
            yield Document(f"{origin}:{number}", passage)


def _text_of(line: str, where: str) -> str:
    """Return the text of a line of .jsonl."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise QuickstartError(f'{where}: expected a JSON object with a string under "text"')
    return text


def _passages(text: str) -> Iterator[str]:
    """Cut a text at blank lines, or at line ends; the passages joined are the text."""
    separator = "\n\n" if "\n\n" in text.strip() else "\n"
    passage = ""
    for block in text.split(separator):
        passage += block + separator
        if len(passage) >= PASSAGE:
            yield passage
            passage = ""
    yield passage.removesuffix(separator)


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Split documents into those to train on and those held out.

    Args:
        documents: at least two.

    Returns:
        (training, held out), neither empty, in the given order. In the order of their hashes,
        documents are held out that together have at most `HELD_OUT` of the characters; if no
        document is so small, the smallest one.
    """
    room = HELD_OUT * sum(len(document.text) for document in documents)
    held = set()
    for document in sorted(documents, key=_rank):
        if len(document.text) <= room:
            held.add(document)
            room -= len(document.text)
    held = held or {min(documents, key=lambda document: len(document.text))}
    return [d for d in documents if d not in held], [d for d in documents if d in held]


def _rank(document: Document) -> bytes:
    """Return the hash that tells a document's place in line, from its origin alone."""
    return hashlib.sha256(document.origin.encode()).digest()


def write(documents: Sequence[Document], path: Path) -> None:
    """Write documents as .jsonl, for the tools."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "origin": document.origin}) + "\n")
