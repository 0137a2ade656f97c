"""`make setup`: this Makefile with a real venv and pip, on packages of a few bytes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READY = ".venv/.setup-"
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
# Builds nothing, so that pip needs no package for it.
BACKEND = """
import shutil

def build_editable(folder, config_settings=None, metadata_directory=None):
    return shutil.copy("toy-1-py3-none-any.whl", folder).rpartition("/")[2]
"""


def write_wheel(folder: Path, name: str, metadata: str = "", files: int = 0) -> None:
    """Write version 1 of a package, its metadata in front of its files, as some builders do."""
    info = f"{name}-1.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as wheel:
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{metadata}"
        wheel.writestr(f"{info}/METADATA", head)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        for i in range(files):
            wheel.writestr(f"{name}/{i}.txt", "whole")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the Makefile and the installer, a folder of wheels, and a broken .venv."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copytree(ROOT / "tools" / "setup", folder / "tools" / "setup")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "constraints.txt").write_text("torch==1\n")
    (folder / "wheels").mkdir()
    for name, files in (("torch", 0), ("small", 0), ("large", 2000)):
        write_wheel(folder / "wheels", name, files=files)
    extras = {"quickstart": "small", "test": "large", "lint": "nowhere"}.items()
    needs = [f"Provides-Extra: {e}\nRequires-Dist: {n}; extra == '{e}'\n" for e, n in extras]
    write_wheel(folder, "toy", "".join(needs))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=folder, check=True)
    (folder / ".venv" / "rest").touch()
    return folder


def start(clone: Path, *words: str) -> subprocess.Popen[str]:
    """Start make without the settings that this machine has for pip, or a make around the tests."""
    others = ("PIP_", "MAKE", "MFLAGS")
    own = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": f"{clone}/wheels"}
    return subprocess.Popen(
        ["make", *words],
        cwd=clone,
        env={**own, **pip, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def make(clone: Path, *words: str) -> tuple[int, list[str], list[str]]:
    """Run make; return its status and the lines of both streams."""
    process = start(clone, *words)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out.splitlines(), errors.splitlines()


def due(clone: Path, target: str) -> list[str]:
    """The stages that make would run."""
    status, lines, errors = make(clone, "--dry-run", target)
    assert (status, errors) == (0, [])
    return [line.split()[-1] for line in lines if "install.sh" in line]


@pytest.fixture(scope="module")
def lines(clone: Path) -> list[str]:
    """What make prints while it installs what the quickstart needs."""
    status, lines, errors = make(clone, READY + "quickstart")
    assert (status, errors) == (0, [])
    return lines


def test_setup_names_what_to_install_where_there_is_no_python(clone: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(clone, tmp_path / "copy", symlinks=True)
    (copy / "tools/setup/find_python.sh").write_text("#!/bin/sh\necho 'no Python' >&2\nexit 1\n")
    status, lines, (error, _) = make(copy, "setup")
    assert (status, lines, error) == (2, [], "no Python")


@pytest.mark.slow
def test_setup_says_each_stage_in_a_line(clone: Path, lines: list[str]) -> None:
    titles = ["Python in .venv", "PyTorch, most of the download", "what quickstart needs"]
    assert [re.sub(r"\d+ s$", "", line) for line in lines] == [f"setup: {t} ... " for t in titles]
    assert "Successfully installed torch-1" in (clone / "build" / "setup-torch.log").read_text()
    # It had no pip.
    assert not (clone / ".venv" / "rest").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "extras"),
    [
        ("quickstart", []),
        ("bench", []),
        ("lint", ["lint"]),
        ("test", ["test"]),
        ("test-compat", ["test"]),
        ("test-torch", ["test"]),
        ("setup", ["test", "lint"]),
    ],
)
@pytest.mark.usefixtures("lines")
def test_target_installs_what_it_needs_and_once(
    clone: Path, target: str, extras: list[str]
) -> None:
    assert due(clone, target) == extras
    (clone / "constraints.txt").touch()
    assert due(clone, target) == ["python", "torch", "quickstart", *extras]
    for stage in ("python", "torch", "quickstart"):
        (clone / (READY + stage)).touch()


@pytest.mark.slow
@pytest.mark.usefixtures("lines")
def test_setup_names_the_log_and_its_last_line(clone: Path) -> None:
    status, lines, (error, from_make) = make(clone, READY + "lint")
    assert (status, lines) == (2, ["setup: what lint needs ... failed"])
    assert error == (
        "setup: error: what lint needs: status 1; build/setup-lint.log ends with: "
        'ERROR: No matching distribution found for nowhere; extra == "lint"'
    )
    assert from_make.startswith("make: *** ")


@pytest.mark.slow
@pytest.mark.usefixtures("lines")
def test_setup_repairs_what_was_killed(clone: Path) -> None:
    process = start(clone, READY + "test")
    (site,) = clone.glob(".venv/lib/python3*/site-packages")
    deadline = time.monotonic() + 60
    while not (site / "large" / "100.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # The next pip would take it for installed.
    assert (site / "large-1.dist-info" / "METADATA").exists()
    assert not (site / "large" / "1999.txt").exists()
    status, lines, _ = make(clone, READY + "test")
    assert (status, len(lines)) == (0, 1)
    assert (site / "large" / "1999.txt").read_text() == "whole"
