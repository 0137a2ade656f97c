"""Output that nobody reads, or that cannot be written: `| head`, a full disk, a closed stdout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import samples
from support.tool_forker import CUT_OFF, NAMES, TOOLS, ToolForker

BROKEN_PIPE = 141


@pytest.mark.parametrize("name", ["count", "train", "preprocess", "blend", "evaluate", "plot"])
def test_a_cut_off_output_ends_quietly(
    name: str, sample: Path, tmp_path: Path, forker: ToolForker
) -> None:
    command, folder = samples.COMMANDS[name], samples.copy(sample, tmp_path / "folder")
    flags = command.flags if name == "blend" else (*command.flags, *command.output)
    done = forker.run(command.tool, flags, folder, out=CUT_OFF)
    assert done.code == BROKEN_PIPE
    assert "error" not in done.err
    assert "Exception" not in done.err
    if name != "blend":  # what was asked for is there all the same
        for suffix in command.suffixes:
            assert (folder / (command.output[1] + suffix)).exists()


@pytest.mark.parametrize("tool", NAMES)
def test_a_cut_off_help_ends_quietly(tool: str, tmp_path: Path, forker: ToolForker) -> None:
    done = forker.run(tool, ["--help"], tmp_path, out=CUT_OFF)
    assert (done.code, done.err) == (0, "")


def test_an_error_is_told_where_the_output_is_cut_off(tmp_path: Path, forker: ToolForker) -> None:
    flags = ("--data-prefix", "none", "--vocab-size", 9)
    done = forker.run("token_frequency", flags, tmp_path, out=CUT_OFF)
    assert done.code == 1
    assert done.err.startswith("tools/token_frequency.py: error: no file none.idx")


@pytest.mark.parametrize("name", ["evaluate", "convert to hf", "convert to megatron"])
def test_a_tool_that_succeeds_says_nothing_beside_its_result(
    name: str, sample: Path, tmp_path: Path
) -> None:
    """Megatron has a warning for each GPU package that is missing; here in a process of its own."""
    command, folder = samples.COMMANDS[name], samples.copy(sample, tmp_path / "folder")
    words = [sys.executable, TOOLS / f"{command.tool}.py", *command.flags, *command.output]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_an_output_that_cannot_be_written_is_one_line(
    sample: Path, tmp_path: Path, forker: ToolForker
) -> None:
    folder = samples.copy(sample, tmp_path / "folder")
    done = forker.run("pile_blend", samples.COMMANDS["blend"].flags, folder, out="/dev/full")
    assert done.code == 1
    assert done.err.splitlines()[-1] == "tools/pile_blend.py: error: No space left on device"


@pytest.mark.parametrize(
    ("shell", "codes"),
    [("| true; echo ${PIPESTATUS[@]}", "141 0"), (">&-; echo $?", "0"), ("; echo $?", "0")],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_in_a_shell(unbuffered: str, shell: str, codes: str, sample: Path, tmp_path: Path) -> None:
    files = " ".join(str(sample / name) for name in samples.COMMANDS["compare"].inputs)
    command = f"{sys.executable} {TOOLS}/evaluate.py --compare {files} {shell}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    assert done.stdout.splitlines()[-1] == codes
    assert done.stderr == ""


def test_a_name_that_is_no_text_is_printed(
    sample: Path, tmp_path: Path, forker: ToolForker
) -> None:
    folder, name = (
        samples.copy(sample, tmp_path / "folder"),
        b"\xff.json".decode("utf-8", "surrogateescape"),
    )
    flags = (*samples.COMMANDS["count"].flags, "--output", name)
    done = forker.run("token_frequency", flags, folder)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("\\udcff.json: ")
    assert (folder / name).exists()
