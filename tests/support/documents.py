"""The documents of this repository, and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# What a target of make or a script hands its flags to.
HANDS_ON = {
    "quickstart": "examples/quickstart.py",
    "bench": "tools/bench/run.py",
    "bench-steps": "tools/bench/train_step.py",
    "examples/continue_with_emo.sh": "examples/pretrain_gpt.py",
}


def text_of(name: str) -> str:
    """A document's text, by its path in the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The words of each command in a document's bash blocks, comments left out."""
    joined = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words for words in lines if words]


def flags_by_script() -> dict[str, set[str]]:
    """The flags that the documents' commands give to each Python script."""
    found: dict[str, set[str]] = {}
    for document in DOCUMENTS:
        for words in commands(document.read_text(encoding="utf-8")):
            words = [part for word in words for part in word.removeprefix("ARGS=").split()]
            words = [HANDS_ON.get(word, word) for word in words]
            scripts = [word for word in words if re.fullmatch(r"(examples|tools)/.*\.py", word)]
            for script in scripts:
                given = words[words.index(script) :]
                flags = {word.partition("=")[0] for word in given if word.startswith("--")}
                found.setdefault(script, set()).update(flags)
    return found
