"""The runner behind `make test-compat`, on a wheel made here: nothing is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support import run_every_version
from support.stub_wheels import VERSION, stub_wheel

pytestmark = pytest.mark.slow

IMPORTS = """
import importlib.util, megatron.core
print(megatron.core.__version__, importlib.util.find_spec("megatron.training"))
"""


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A megatron-core that holds its version and nothing else, in pip's only index."""
    wheel = stub_wheel(tmp_path / "wheels", "megatron-core", "megatron/core")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


def test_install_hides_the_megatron_of_the_environment(wheel: Path, tmp_path: Path) -> None:
    folder = run_every_version.install(VERSION, tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [VERSION, "None"]


def test_install_happens_once(wheel: Path, tmp_path: Path) -> None:
    folder = run_every_version.install(VERSION, tmp_path / "cache")
    wheel.unlink()
    assert run_every_version.install(VERSION, tmp_path / "cache") == folder


def test_install_leaves_nothing_when_it_fails(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        run_every_version.install("0.0.2", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_main_tells_what_failed(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_every_version.main([VERSION, "0.0.2"], tmp_path / "cache") == 1
    *_, header, first, second, last = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["version", "imported", "patching"]
    # The tests have run on that wheel, which lacks everything that they need.
    assert first.split()[:2] == [VERSION, VERSION]
    assert first.count(" failed") == 6
    assert second.split()[:2] == ["0.0.2", "nothing"]
    assert last == f"failed: {VERSION}, 0.0.2"


def test_result_of_another_version_is_not_fine() -> None:
    outcomes = {area: Counter(passed=1) for area in run_every_version.AREAS.values()}
    result = run_every_version.Result("0.16.1", "0.16.1", True, outcomes, 1.0)
    assert result.fine
    assert not result._replace(imported="0.19.2").fine
    assert not result._replace(passed=False).fine
