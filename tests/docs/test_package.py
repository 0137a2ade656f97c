"""What users install: the wheel holds the whole library and imports by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, **options: object) -> str:
    """Run a command and return its standard output."""
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, result.stderr[-2000:]
    return str(result.stdout)


def test_wheel_installs_and_imports(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    # A copy, so that the build leaves nothing behind in the checkout.
    shutil.copytree(ROOT / "megatron_mile", source / "megatron_mile")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", str(site), str(wheel))
    modules = {path.relative_to(ROOT) for path in (ROOT / "megatron_mile").rglob("*.py")}
    assert {path.relative_to(site) for path in (site / "megatron_mile").rglob("*.py")} == modules
    assert (site / "megatron_mile" / "py.typed").is_file()
    metadata = next(site.glob("*.dist-info/METADATA")).read_text()
    assert "License-Expression: Apache-2.0" in metadata
    where = run(
        *(sys.executable, "-c", "import megatron_mile as m; m.token_loss; print(m.__file__)"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert where.strip() == str(site / "megatron_mile" / "__init__.py")
