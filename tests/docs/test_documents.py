"""The documents are run: links, files, flags and commands of README, docs/ and CONTRIBUTING."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.documents import DOCUMENTS, ROOT, blocks, commands, text_of, without_blocks

from megatron_mile.integration.arguments import add_arguments

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def anchors(document: Path) -> set[str]:
    """What links to a document's headings end with, as GitHub makes it of them."""
    text = without_blocks(document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}


def broken_links(document: Path, text: str) -> Iterator[str]:
    """Yield the relative links that lead to no file, or to no heading of it."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    assert list(broken_links(document, document.read_text(encoding="utf-8"))) == []


def test_broken_links_are_found() -> None:
    text = "[a](no.md) [b](docs/modes.md#no) [c](docs/modes.md#flags) [d](https://e.org)"
    assert list(broken_links(ROOT / "README.md", text)) == ["no.md", "docs/modes.md#no"]


@each_document
def test_named_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    kinds = r"py|png|csv|sh|sbatch|md"
    named = re.findall(rf"\b(?:examples|tools|tests|docs|megatron_mile)/[\w/.]+\.(?:{kinds})", text)
    named = [name for name in named if "NAME" not in name]
    assert [name for name in named if not (ROOT / name).is_file()] == []


@each_document
def test_named_flags_exist(document: Path) -> None:
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    text = document.read_text(encoding="utf-8")
    known = {action.option_strings[0] for action in parser._actions}
    known |= {f"--mile-{name}" for name in re.findall(r'Setting\(name="(\w+)"', text)}
    assert set(re.findall(r"--mile-[a-z][a-z-]*", text)) <= known


def test_modes_list_every_flag_with_its_default() -> None:
    pattern = r"^\| `(--mile-[a-z-]+)` \| `?([^`|]+?)`? \|"
    rows = dict(re.findall(pattern, text_of("docs/modes.md"), flags=re.M))
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    actions = {action.option_strings[0]: action.default for action in parser._actions}
    assert rows == {
        flag: ("off" if default is False else str(default)) for flag, default in actions.items()
    }


def test_make_has_the_targets_that_are_named() -> None:
    texts = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", texts, flags=re.M))
    assert {"quickstart", "test", "bench"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.M))


def missing_of_tree(tree: str) -> list[str]:
    """Return the paths that an indented tree names and that do not exist."""
    missing, folders = [], []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"  +", line.strip())[0].split(", ")
        paths = [Path(*folders[:depth], name) for name in names]
        missing += [str(path) for path in paths if not (ROOT / path).exists()]
        folders = [*folders[:depth], names[0]]
    return missing


def test_missing_of_tree_finds_files_at_every_depth() -> None:
    tree = "docs/, no/    a\n  modes.md    b\n  no.md\nmegatron_mile/\n  ops/\n    no.py  c\n"
    assert missing_of_tree(tree) == ["no", "docs/no.md", "megatron_mile/ops/no.py"]


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/design.md",
    ],
)
def test_tree_is_there(name: str) -> None:
    (tree,) = [block for block in blocks(text_of(name), "text") if "megatron_mile/" in block]
    assert missing_of_tree(tree) == []


def test_the_objective_of_the_design_is_one_file(tmp_path: Path) -> None:
    block, _ = blocks(text_of("docs/design.md"), "python")  # the other: test_objective_file.py
    shutil.copytree(ROOT / "megatron_mile", tmp_path / "megatron_mile")
    (tmp_path / "megatron_mile" / "objectives" / "linear.py").write_text(block)
    code = """
import argparse, torch
from megatron_mile import ObjectiveConfig, token_loss
from megatron_mile.integration.arguments import add_arguments
logits, targets = torch.randn(9, 50).double().requires_grad_(), torch.arange(9)
out = token_loss(logits, targets, ObjectiveConfig(objective="linear", slope=0.25))
assert torch.equal(out.weight, 1 + 0.25 * out.entropy)
assert torch.equal(out.loss, out.weight * out.nll)
print(add_arguments(argparse.ArgumentParser()).format_help())
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "linear w = 1 + slope H" in " ".join(result.stdout.split())
    assert "--mile-slope" in result.stdout


def run(words: list[str], **options: object) -> str:
    """Run a command of a document; return both of its streams."""
    result = subprocess.run(
        [sys.executable, *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return str(result.stdout + result.stderr)


# In one process, because most of the time goes into imports.
IN_TURN = """
import json, runpy, sys
for _, script, *flags in json.loads(sys.argv[1]):
    sys.argv = [script, *flags]
    sys.path[0] = "tools"
    runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_data_is_made_as_written(tmp_path: Path) -> None:
    for folder in ("docs", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    steps = commands(text_of("docs/data-and-tools.md"))[:3]
    assert {step[0] for step in steps} == {"python"}
    run(["-c", IN_TURN, json.dumps(steps)], cwd=tmp_path)
    made = {path.name for path in (tmp_path / "data").iterdir()}
    assert {"tokenizer", "docs_text_document.bin", "docs_text_document.idx"} < made
    assert "docs_text_document_token_frequency.json" in made


def test_other_scripts_are_called_as_written() -> None:
    (words,) = [x for x in commands(text_of("docs/objectives.md")) if "examples/" in " ".join(x)]
    # A folder in the place of the checkpoint, and a command that only says what it would run.
    shell = " ".join(words).replace("runs/quickstart/mile/checkpoints", "docs")
    result = subprocess.run(
        ["bash", "-c", f"PYTHON=echo {shell}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    script = "examples/pretrain_gpt.py --tensor-model-parallel-size 2 --load docs --finetune"
    assert f"{script} --use-checkpoint-args --save runs/emo --" in result.stdout


@pytest.mark.slow
def test_training_command_runs() -> None:
    (command,) = [x for x in commands(text_of("docs/modes.md")) if x[0] == "torchrun"]
    loopback = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    log = run(["-m", "torch.distributed.run", *loopback, *command[1:]], cwd=ROOT)
    assert "objective    mile (gamma 1, sigma 1 nats" in log
    assert len(re.findall(r"iteration +\d+/ +4 .*lm loss: .*mile entropy: ", log)) == 4
