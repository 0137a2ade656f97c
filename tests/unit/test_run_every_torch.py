"""The runner behind `make test-torch`, on a wheel made here: nothing is downloaded."""

import subprocess
from pathlib import Path

import pytest
from support import run_every_torch
from support.stub_wheels import VERSION, stub_wheel


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch that holds its version and nothing else, in pip's only index."""
    wheel = stub_wheel(tmp_path / "wheels", "torch", "torch")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(run_every_torch, "OTHERS", ())
    return wheel


def test_install_is_an_environment_of_its_own_made_once(wheel: Path, tmp_path: Path) -> None:
    python = run_every_torch.install(VERSION, tmp_path / "cache")
    code = "import torch; print(torch.__version__)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == VERSION
    wheel.unlink()
    assert run_every_torch.install(VERSION, tmp_path / "cache") == python


def test_main_tells_what_failed(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [VERSION, "0.0.2", "--areas", "objective"]
    assert run_every_torch.main(words, tmp_path / "cache") == 1
    told = capsys.readouterr()
    assert f"{VERSION}: objective: " in told.out
    assert "No module named pytest" in told.out
    assert told.out.splitlines()[-1] == f"failed: {VERSION}, 0.0.2"
    # What was left by a failure is not taken for an environment.
    with pytest.raises(subprocess.CalledProcessError):
        run_every_torch.install("0.0.2", tmp_path / "cache")


@pytest.mark.parametrize("area", run_every_torch.AREAS)
def test_areas_name_what_is_there(area: str) -> None:
    for path in run_every_torch.paths(area):
        assert (run_every_torch.ROOT / path.removeprefix("--ignore=")).exists()
