"""Takes the texts, their sentences, and the domain of the Pile out of what documents.py reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tools.common.cli import ToolError
from tools.data.documents import Record


class BadLineError(ToolError):
    """A line that cannot be read at all; `--skip-bad-lines` leaves it out."""


def content_of(record: Record) -> dict[str, Any]:
    """Decode a record.

    Args:
        record: from `read_records`.

    Returns:
        Its JSON object; a plain-text file is one with the key `text` alone.

    Raises:
        BadLineError: not UTF-8, not a JSON object.
    """
    try:
        text = record.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLineError(
            f"{record.origin}: not UTF-8 ({error.reason} at byte {error.start}); convert the file"
        ) from error
    if not record.is_json:
        return {"text": text}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadLineError(
            f"{record.origin}: malformed JSON ({error}); expected one JSON object on each line"
        ) from error
    if not isinstance(value, dict):
        raise BadLineError(f"{record.origin}: a JSON {type(value).__name__}; expected an object")
    return value


def texts_of(record: Record, content: dict[str, Any], key: str) -> list[str]:
    """Pick out the texts under a key.

    Args:
        record: where it comes from, for messages.
        content: what `content_of` gave for it.
        key: of the JSON object.

    Returns:
        One text for a string, several for a list of strings.

    Raises:
        BadLineError: the text cannot be written as UTF-8.
        ToolError: the key is missing or holds no text.
    """
    if key not in content:
        raise ToolError(f"{record.origin}: no key {key!r}, only {sorted(content)}; see --json-keys")
    value = content[key]
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ToolError(f"{record.origin}: the value of {key!r} is not text; expected a string")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BadLineError(
            f"{record.origin}: the value of {key!r} holds half of a surrogate pair at "
            f"{error.start}; repair the line"
        ) from error
    return texts


def domain_of(record: Record, content: dict[str, Any]) -> str:
    """Return the domain of the Pile that a document belongs to.

    Args:
        record: where it comes from, for messages.
        content: what `content_of` gave for it.

    Raises:
        ToolError: the document names none.
    """
    meta = content.get("meta")
    domain = meta.get("pile_set_name") if isinstance(meta, dict) else None
    if not isinstance(domain, str) or not domain:
        raise ToolError(
            f"{record.origin}: no domain; --split-domains expects "
            '{"meta": {"pile_set_name": "Pile-CC"}, ...} on every line'
        )
    return domain


def sentence_splitter(language: str) -> Callable[[str], list[str]]:
    """Load NLTK's Punkt model of a language, which must lie on this machine.

    Args:
        language: name of a Punkt model, such as `english`.

    Returns:
        Text -> its sentences; the white space between two of them is dropped.

    Raises:
        ToolError: NLTK or its model of the language is missing; nothing is downloaded.
    """
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError:
        raise ToolError("--split-sentences needs `pip install 'nltk>=3.9'`") from None
    try:
        split: Callable[[str], list[str]] = PunktTokenizer(language).tokenize
    except (LookupError, ValueError) as error:
        raise ToolError(
            f"--split-sentences: NLTK has no punkt_tab model {language!r} here; where there is a "
            "network, run `python -m nltk.downloader -d FOLDER punkt_tab`, copy FOLDER here and "
            "set NLTK_DATA=FOLDER"
        ) from error
    return split
