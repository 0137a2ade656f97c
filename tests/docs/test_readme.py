"""The README is short, and its code runs."""

from __future__ import annotations

import re

import torch
from support.documents import blocks, text_of, without_blocks

from megatron_mile.integration import versions

README = text_of("README.md")
WORDS, WORDS_OF_PARAGRAPH = 1200, 60


def paragraphs(text: str) -> list[str]:
    """Paragraphs, items of lists and rows of tables; no code."""
    parts = re.split(r"\n\s*\n|\n(?=\||- |\d+\. )", without_blocks(text))
    return [part.strip() for part in parts if part.strip()]


def test_paragraphs_are_told_apart() -> None:
    text = "one\ntwo\n\n- three\n- four\n\n```bash\nfive\n```\n\n| six |\n|---|\n"
    assert paragraphs(text) == ["one\ntwo", "- three", "- four", "| six |", "|---|"]


def test_readme_is_short() -> None:
    assert len(README.split()) <= WORDS
    assert [part for part in paragraphs(README) if len(part.split()) > WORDS_OF_PARAGRAPH] == []


def test_readme_python_block_runs() -> None:
    (block,) = blocks(README, "python")
    names: dict[str, object] = {}
    exec(block, names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_readme_names_the_versions() -> None:
    first, last = (
        version.rpartition(".")[0] for version in (versions.TESTED[0], versions.TESTED[-1])
    )
    assert f"megatron-core {first} to {last}" in README
    assert f"| {', '.join(versions.TESTED)} | run, by `make test-compat` |" in text_of(
        "docs/modes.md"
    )
