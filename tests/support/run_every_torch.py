"""Test the library itself, without Megatron, on older versions of torch, one after the other.

Each version is installed once into .compat/torch-VERSION, an environment of its own with this
Python: up to 3 GB to load and 7 GB on disk, because wheels for Linux bring CUDA along.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".compat"
TESTED = ("2.4.1", "2.8.0", "2.9.1", "2.10.0")
# What the tests need beside torch; the interpreter of Triton before 3.5 breaks on a later numpy.
OTHERS = ("numpy<2.3", "pytest", "hypothesis")
# The tests that need nothing else, by what they are about; `test_compiled` holds one Triton's code.
AREAS = {
    "objective": ("objectives", "config", "dispatch", "reduce_loss"),
    "loss": ("loss", "loss_edges", "reference", "chunked", "threads"),
    "emo": ("emo", "emo_edges", "emo_ops"),
    "ranks": ("tests/parallel",),
    "kernels": ("tests/kernels", "--ignore=tests/kernels/test_compiled.py"),
}
TIMEOUT_S = 1800


def install(version: str, cache: Path) -> Path:
    """Make the environment of a version in the cache, whole or not at all; return its Python.

    Raises:
        subprocess.CalledProcessError: It cannot be made, and pip has said why.
    """
    folder = cache / f"torch-{version}"
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        print(f"{version}: installing into {folder}", flush=True)
        venv = ("venv", "--clear", "--without-pip", folder)
        pip = ("pip", "--python", python, "--disable-pip-version-check", "install", "--quiet")
        for words in (venv, (*pip, f"torch=={version}", *OTHERS)):
            subprocess.run([sys.executable, "-m", *words], check=True)
        done.touch()
    return python


def run_tests(version: str, cache: Path, areas: list[str]) -> bool:
    """Run the tests of these areas on one version, and return whether all passed."""
    python, fine = install(version, cache), True
    for area in areas:
        start = time.monotonic()
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths(area)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        printed = done.stdout.strip() or done.stderr.strip() or "nothing printed"
        if done.returncode not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            fine = False
            print(printed, file=sys.stderr)
        passed = time.monotonic() - start
        print(f"{version}: {area}: {printed.splitlines()[-1]} ({passed:.0f} s)", flush=True)
    return fine


def paths(area: str) -> list[str]:
    """Return what pytest is given for an area."""
    return [name if "/" in name else f"tests/unit/test_{name}.py" for name in AREAS[area]]


def main(arguments: list[str], cache: Path = CACHE) -> int:
    """Test the versions named, or all; 0 if every test passed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version", nargs="*", default=TESTED, help="default: %(default)s")
    parser.add_argument("--areas", nargs="+", choices=AREAS, default=list(AREAS))
    args = parser.parse_args(arguments)
    failed = []
    for version in args.version:
        try:
            if not run_tests(version, cache, args.areas):
                failed.append(version)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"{version}: {error}", file=sys.stderr)
            failed.append(version)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
