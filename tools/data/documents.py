"""Reads documents from the files that `--input` names, in an order that never changes.

Files are recognised by their names:

* `.jsonl`, `.json`: one JSON object a line, the text under a key; empty lines are skipped.
* any other name given by itself, and the names of `TEXT_SUFFIXES` in a folder: plain text, the
  whole file is one document under the key `text`.
* both may be compressed as `.gz` or `.zst`.

All text is UTF-8 and kept as it is: no newline is translated, no white space stripped.
"""

from __future__ import annotations

import glob
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.common.cli import ToolError

JSON_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".js")
COMPRESSED_SUFFIXES = (".gz", ".zst")
# Compressed bytes read at a time: gzip can grow them about a thousandfold in memory.
_BLOCK_BYTES = 1 << 16


class Position(NamedTuple):
    """How far reading has come: a place between two documents."""

    file: int
    """Index of the file in the list of files."""
    line: int
    """Lines of it that are read; a file of plain text is one."""


START = Position(0, 0)


class Record(NamedTuple):
    """One document as it stands in its file."""

    origin: str
    """`FILE`, or `FILE:LINE` for a line of JSON; for error messages."""
    raw: bytes
    """The undecoded bytes."""
    is_json: bool
    """Whether `raw` is a JSON object rather than the text itself."""
    end: Position
    """Where reading goes on after this document."""


def find_files(inputs: Sequence[str]) -> list[Path]:
    """List the files that files, folders and glob patterns name.

    Args:
        inputs: paths or patterns. Folders are walked in sorted order; hidden names and files
            whose suffix is not known are left out there.

    Returns:
        The files, inputs in the given order, the matches of each one sorted.

    Raises:
        ToolError: an input matches nothing.
    """
    files: list[Path] = []
    for given in inputs:
        matches = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        found = [file for match in matches for file in _files_below(Path(match))]
        if not found:
            known = " ".join(JSON_SUFFIXES + TEXT_SUFFIXES)
            raise ToolError(
                f"no input file at {given!r}; expected a file, a glob pattern, or a folder"
                f" with files named {known} (or these with .gz or .zst)"
            )
        files += found
    return files


def _files_below(path: Path) -> Iterator[Path]:
    """Yield `path` itself if it is a file, else the known files of the folder, sorted."""
    if not path.is_dir():
        yield path
        return
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            known = _content_suffix(Path(name)) in JSON_SUFFIXES + TEXT_SUFFIXES
            if known and not name.startswith("."):
                yield Path(folder, name)


def _content_suffix(path: Path) -> str:
    """Return the suffix that tells the content, without that of the compression."""
    return (path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path).suffix.lower()


def total_bytes(files: Iterable[Path]) -> int:
    """Return the size of all files together in bytes, as `read_records` reports it."""
    return sum(path.stat().st_size for path in files)


def read_records(
    files: Sequence[Path], progress: Callable[[int], object], start: Position = START
) -> Iterator[Record]:
    """Read the documents of the files in order, keeping one block or line in memory.

    Args:
        files: as `find_files` lists them.
        progress: called with the number of bytes read from disk since its last call.
        start: leave out what comes before; the files before it are not opened.

    Yields:
        One record a document; its bytes are not decoded yet, see texts.py.

    Raises:
        ToolError: a compressed file is truncated or not what its name says.
    """
    progress(total_bytes(files[: start.file]))
    for index, path in enumerate(files[start.file :], start=start.file):
        skipped = start.line if index == start.file else 0
        blocks = _blocks(path, progress)
        if _content_suffix(path) in JSON_SUFFIXES:
            for number, line in enumerate(_lines(blocks), start=1):
                if number > skipped and line.strip():
                    yield Record(f"{path}:{number}", line, True, Position(index, number))
        elif not skipped:
            yield Record(str(path), b"".join(blocks), False, Position(index, 1))


def _blocks(path: Path, progress: Callable[[int], object]) -> Iterator[bytes]:
    """Yield the decompressed content of a file piece by piece."""

    def read() -> Iterator[bytes]:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                progress(len(block))
                yield block

    if path.suffix not in COMPRESSED_SUFFIXES:
        yield from read()
        return
    new_decoder, failure = _decoder(path)
    try:
        yield from _decompress(read(), new_decoder)
    except (EOFError, failure) as error:
        raise ToolError(
            f"{path}: broken or truncated {path.suffix} file ({error}); get or make it again"
        ) from error


def _decoder(path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """Return a factory of incremental decoders for the file, and the error they raise."""
    if path.suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), zlib.error
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ToolError(f"{path}: reading .zst needs `pip install zstandard`") from None
    # The largest window of the format, as `zstd --long=31` writes it.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, zstandard.ZstdError


def _decompress(blocks: Iterable[bytes], new_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """Decode any number of gzip members or zstd frames; raise EOFError inside or before one.

    The stream readers of `zstandard` take a truncated file for a whole one, so the end of the
    last frame is looked at here.
    """
    decoder, complete = new_decoder(), False
    for block in blocks:
        rest = block
        while rest:
            if complete:
                decoder = new_decoder()
            yield decoder.decompress(rest)
            complete = decoder.eof
            rest = decoder.unused_data if complete else b""
    if not complete:
        raise EOFError("it ends early")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Split at newline bytes; no other Unicode line separator ends a JSON line."""
    pieces: list[bytes] = []
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for line in ended:
            yield b"".join([*pieces, line])
            pieces.clear()
        pieces.append(rest)
    yield b"".join(pieces)
