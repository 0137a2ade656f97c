"""The values that a setting may have, in a checkpoint's stored arguments and in config.json."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

from tools.common.cli import ToolError

LARGEST = 2**31 - 1


class Kind(NamedTuple):
    """The values that a setting may have."""

    text: str
    """For the message: what is expected."""
    fits: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Check a value that was read from a file.

        Raises:
            ToolError: it is of another kind; the message begins with `name`.
        """
        if not self.fits(value):
            raise ToolError(f"{name} is {shown(value)}; expected {self.text}")


def whole(low: int, high: int = LARGEST) -> Kind:
    """A whole number in a range."""
    return Kind(
        f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high
    )


def number(low: float, high: float) -> Kind:
    """A number in a range."""
    return Kind(
        f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high
    )


def or_none(kind: Kind) -> Kind:
    """Such a value, or None."""
    return Kind(f"{kind.text}, or None", lambda v: v is None or kind.fits(v))


SIZE, SWITCH = whole(1), Kind("True or False", lambda v: type(v) is bool)
TEXT = Kind("a text", lambda v: type(v) is str)
TEXTS = Kind("a list of texts", lambda v: type(v) is list and all(map(TEXT.fits, v)))
# What models have, and what Megatron and transformers compute with.
ROPE_BASE, EPSILON, DROPOUT = number(1, 1e18), number(1e-30, 0.1), number(0, 0.99)


def shown(value: object) -> str:
    """Write a value in a line, however long it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)
