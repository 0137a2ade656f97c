"""Splits text into sentences with NLTK's Punkt, whose models must lie on this machine."""

from __future__ import annotations

from collections.abc import Callable

from tools.common.cli import ToolError


def sentence_splitter(language: str) -> Callable[[str], list[str]]:
    """Load the model of a language.

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
