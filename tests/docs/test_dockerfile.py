"""What can be checked of the Dockerfile without building it, which needs docker and the base."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import megatron_mile
from megatron_mile.run_record.record import noted_commit

ROOT = Path(__file__).resolve().parents[2]
# With the lines joined that end in a backslash, as docker reads them.
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def normal(name: str) -> str:
    """A package's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Version by name of the lines NAME==VERSION."""
    pairs = (line.split("==") for line in text.splitlines() if re.match(r"[\w.-]+==", line))
    return {normal(name): version for name, version in pairs}


def test_dockerfile_is_sound() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    words = [hadolint, ROOT / "Dockerfile"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_dockerfile_copies_what_is_there() -> None:
    sources = [
        name for line in re.findall(r"^COPY (.*) \S+$", TEXT, flags=re.M) for name in line.split()
    ]
    assert {"megatron_mile", "examples", "tools", "constraints.txt"} <= set(sources)
    assert [name for name in sources if not (ROOT / name).exists()] == []


def test_dockerfile_builds_on_the_base_of_the_pinned_megatron() -> None:
    # docker/.ngc_version.dev of Megatron-LM's core_v0.19.0.
    assert re.findall("^FROM (.*)", TEXT, flags=re.M) == ["nvcr.io/nvidia/pytorch:26.06-py3"]
    assert pins(CONSTRAINTS)["megatron-core"].startswith("0.19.")


def test_dockerfile_ends_as_another_user_than_root() -> None:
    *_, last = re.findall(r"^USER (\S+)", TEXT, flags=re.M)
    assert f"useradd --create-home --uid {last} " in TEXT


def test_dockerfile_notes_the_commit_where_a_record_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = re.findall(r"^RUN (if .*COMMIT.*)", TEXT, flags=re.M)
    package = tmp_path / "megatron_mile"
    package.mkdir()
    monkeypatch.setattr(megatron_mile, "__file__", str(package / "__init__.py"))
    for commit, noted in (("", None), ("abc", {"commit": "abc", "dirty": None})):
        shell = ["bash", "-euo", "pipefail", "-c", line]
        subprocess.run(shell, cwd=tmp_path, env={"COMMIT": commit}, check=True)
        assert noted_commit() == noted


def test_dockerfile_keeps_what_the_base_has(tmp_path: Path) -> None:
    """The pins that its awk program joins, for a base such as NVIDIA's."""
    (program,) = re.findall(r"awk -F== '(.*?)'", TEXT)
    base = tmp_path / "base.txt"
    base.write_text("torch==2.13.0a0+1234.nv26.06\nMarkupSafe==2.1.0\ntyping_extensions==4.1.0\n")
    joined = subprocess.run(
        ["awk", "-F==", program, base, ROOT / "constraints.txt"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split("==")[0] for line in joined.splitlines() if "==" in line]
    assert len(set(names)) == len(names)
    kept = pins(base.read_text())
    assert pins(joined) == {**pins(CONSTRAINTS), **kept}
    assert pins(joined)["torch"] == "2.13.0a0+1234.nv26.06"


def test_constraints_pin_what_the_extras_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {line for extra in project["optional-dependencies"].values() for line in extra}
    names = {normal(re.match(r"[\w.-]+", line)[0]) for line in needed}  # type: ignore[index]
    assert {"megatron-core", "pytest", "ruff"} <= names
    assert names - {project["name"]} <= set(pins(CONSTRAINTS))
