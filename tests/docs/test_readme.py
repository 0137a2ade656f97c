"""The README is run: its code blocks, its flags, its file names."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mile.integration.arguments import add_arguments

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_readme_is_complete() -> None:
    assert not re.findall(r"\b[A-Z]+_[A-Z_]{4,}\b", README.replace("MEGATRON_LM_DIR", ""))


def test_readme_python_blocks_run() -> None:
    (block,) = blocks("python")
    names: dict[str, object] = {}
    exec(block, names)
    assert names["logits"].grad.abs().sum() > 0  # type: ignore[attr-defined]


def test_readme_lists_every_flag_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(--mile-[a-z-]+)` \| `?([^`|]+?)`? \|", README, flags=re.M))
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    actions = {action.option_strings[0]: action.default for action in parser._actions}
    assert rows == {
        flag: ("off" if default is False else str(default)) for flag, default in actions.items()
    }


def test_readme_names_files_that_exist() -> None:
    named = re.findall(r"\b(?:examples|tools|megatron_mile)/[\w/.]+\.(?:py|png|csv|sh)", README)
    named += re.findall(r"\]\((?!http)([^)#]+)\)", README)
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert named
    assert not missing


def test_makefile_has_the_targets_that_readme_and_contributing_name() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.M))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))


@pytest.mark.slow
def test_readme_training_command_runs() -> None:
    (command,) = [block for block in blocks("bash") if block.startswith("torchrun")]
    words = shlex.split(command.replace("\\\n", " "))
    loopback = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *loopback, *words[1:]],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    log = result.stdout + result.stderr
    assert "objective    mile (gamma 1, sigma 1 nats" in log
    assert len(re.findall(r"iteration +\d+/ +4 .*lm loss: .*mile entropy: ", log)) == 4
