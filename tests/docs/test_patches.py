"""patches/: each fits its release's lines, and apply.sh changes all or nothing.

The wheels hold no pretrain_gpt.py, so a stand-in is built here from each patch's own context. With
MEGATRON_LM_DIR the real one is patched, and trains.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATCHES = ROOT / "patches"
RELEASES = sorted(path.name for path in PATCHES.glob("core_v*"))
INFO = "megatron/core/package_info.py"


def _stand_in(folder: Path, release: str) -> Path:
    """Write a checkout of the release with the lines that its patch expects where it does."""
    major, minor, patch = release.removeprefix("core_v").split(".")
    info = folder / INFO
    info.parent.mkdir(parents=True)
    info.write_text(f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\n")
    text = next((PATCHES / release).glob("*.patch")).read_text()
    first = int(re.search(r"^@@ -(\d+)", text, re.M)[1])  # type: ignore[index]
    context = [line[1:] for line in text.splitlines() if line.startswith(" ")]
    lines = ["import torch"] * (first - 1) + context
    (folder / "pretrain_gpt.py").write_text("\n".join(lines) + "\n")
    return folder


def _apply(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PATCHES / "apply.sh"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("release", RELEASES)
def test_apply_puts_the_call_before_the_first_import(tmp_path: Path, release: str) -> None:
    run = _apply(_stand_in(tmp_path, release))
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "pretrain_gpt.py").read_text().splitlines()
    call = next(i for i, line in enumerate(lines) if line.startswith("prepare_script()"))
    assert call < lines.index("from gpt_builders import gpt_builder")
    again = _apply(tmp_path)
    assert again.returncode == 1
    assert again.stderr.strip().endswith("is there already")
    assert (tmp_path / "pretrain_gpt.py").read_text().splitlines() == lines


def test_apply_changes_nothing_where_it_does_not_fit(tmp_path: Path) -> None:
    script = _stand_in(tmp_path, RELEASES[-1]) / "pretrain_gpt.py"
    script.write_text(script.read_text().replace("gpt_builders", "my_builders"))
    before = script.read_text()
    run = _apply(tmp_path)
    assert run.returncode == 1
    assert "does not fit; nothing was changed" in run.stderr
    assert script.read_text() == before


def test_apply_takes_back_what_is_no_python(tmp_path: Path) -> None:
    script = _stand_in(tmp_path, RELEASES[-1]) / "pretrain_gpt.py"
    script.write_text(script.read_text() + "def broken(:\n")
    before = script.read_text()
    run = _apply(tmp_path)
    assert run.returncode == 1
    assert "taken back: pretrain_gpt.py is no Python" in run.stderr
    assert script.read_text() == before


def test_apply_names_the_releases_it_knows(tmp_path: Path) -> None:
    assert "expected a Megatron-LM checkout" in _apply(tmp_path).stderr
    info = _stand_in(tmp_path, RELEASES[-1]) / INFO
    info.write_text("MAJOR = 0\nMINOR = 5\n")
    run = _apply(tmp_path)
    assert run.returncode == 1
    assert all(release in run.stderr for release in RELEASES)


@pytest.mark.skipif("MEGATRON_LM_DIR" not in os.environ, reason="MEGATRON_LM_DIR is not set")
def test_patched_checkout_trains_without_the_launcher(tmp_path: Path) -> None:
    from support.training_runs import MILE, TP2, command_line, read_scalars, torchrun

    checkout = tmp_path / "checkout"
    shutil.copytree(os.environ["MEGATRON_LM_DIR"], checkout)
    applied = _apply(checkout)
    if "-m megatron_mile.launch instead" in applied.stderr:
        pytest.skip("no patch for the release of this checkout")
    assert applied.returncode == 0, applied.stderr
    run = torchrun(2, checkout / "pretrain_gpt.py", *command_line(tmp_path / "run", TP2, MILE))
    assert run.returncode == 0, run.stderr[-3000:]
    assert "mile loss" in read_scalars(tmp_path / "run")
