"""The runner behind `make test-torch`, on a wheel made here: nothing is downloaded."""

import subprocess
import zipfile
from pathlib import Path

import pytest
from support import run_every_torch

VERSION = "0.0.1"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a torch that holds its version and nothing else; pip's only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = f"torch-{VERSION}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{VERSION}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch/__init__.py", f"__version__ = {VERSION!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Name: torch\nVersion: {VERSION}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(run_every_torch, "OTHERS", ())
    return folder


def test_install_is_an_environment_of_its_own_made_once(wheels: Path, tmp_path: Path) -> None:
    python = run_every_torch.install(VERSION, tmp_path / "cache")
    code = "import torch; print(torch.__version__)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == VERSION
    (wheels / f"torch-{VERSION}-py3-none-any.whl").unlink()
    assert run_every_torch.install(VERSION, tmp_path / "cache") == python


def test_main_tells_what_failed(
    wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
