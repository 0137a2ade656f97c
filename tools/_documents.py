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
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _cli import ToolError

JSON_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".js")
COMPRESSED_SUFFIXES = (".gz", ".zst")
# Compressed bytes read at a time: gzip can grow them about a thousandfold in memory.
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Record:
    """One document as it stands in its file."""

    origin: str
    """`FILE`, or `FILE:LINE` for a line of JSON; for error messages."""
    raw: bytes
    """The undecoded bytes."""
    is_json: bool
    """Whether `raw` is a JSON object rather than the text itself."""


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


def read_records(files: Iterable[Path], progress: Callable[[int], object]) -> Iterator[Record]:
    """Read the documents of the files in order, keeping one block or line in memory.

    Args:
        files: as `find_files` lists them.
        progress: called with the number of bytes read from disk since its last call.

    Yields:
        One record a document; its bytes are not decoded yet, see `texts_of`.

    Raises:
        ToolError: a compressed file is truncated or not what its name says.
    """
    for path in files:
        blocks = _blocks(path, progress)
        if _content_suffix(path) not in JSON_SUFFIXES:
            yield Record(str(path), b"".join(blocks), is_json=False)
            continue
        for number, line in enumerate(_lines(blocks), start=1):
            if line.strip():
                yield Record(f"{path}:{number}", line, is_json=True)


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


def texts_of(record: Record, keys: Sequence[str]) -> dict[str, list[str]]:
    """Decode a record and pick out its texts.

    Args:
        record: from `read_records`.
        keys: keys of the JSON object; a plain-text file has the key `text` alone.

    Returns:
        For each key its texts in order: one for a string, several for a list of strings.

    Raises:
        ToolError: not UTF-8, not a JSON object, a key that is missing or holds no text.
    """
    try:
        text = record.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ToolError(
            f"{record.origin}: not UTF-8 ({error.reason} at byte {error.start}); convert the file"
        ) from error
    values = _json_object(record.origin, text) if record.is_json else {"text": text}
    return {key: _texts(record.origin, values, key) for key in keys}


def _json_object(origin: str, line: str) -> dict[str, Any]:
    """Parse one line of JSON."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ToolError(
            f"{origin}: malformed JSON ({error}); expected one JSON object on each line"
        ) from error
    if not isinstance(value, dict):
        raise ToolError(f"{origin}: a JSON {type(value).__name__}; expected an object")
    return value


def _texts(origin: str, values: dict[str, Any], key: str) -> list[str]:
    """Return the value of a key as a list of strings."""
    if key not in values:
        raise ToolError(f"{origin}: no key {key!r}, only {sorted(values)}; see --json-keys")
    value = values[key]
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ToolError(f"{origin}: the value of {key!r} is not text; expected a string")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise ToolError(
            f"{origin}: the value of {key!r} holds half of a surrogate pair at {error.start}; "
            "repair the line"
        ) from error
    return texts
