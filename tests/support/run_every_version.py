"""Run the tests marked `compat` on every supported version of megatron-core, one after the other.

Each version is installed once into .compat/VERSION (12 to 21 MB; 0.12 and 0.13 are compiled, which
needs a C++ compiler). Python, torch and everything else are those of this environment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from megatron_mile.integration import versions  # noqa: E402  (this clone's, whatever is installed)

CACHE = ROOT / ".compat"
TIMEOUT_S = 900
# What a test is about, by a part of its name; the columns of the table.
AREAS = {
    "drift_checks": "patching",
    "hook_checks": "patching",
    "hook_loss": "loss",
    "hook_shard": "TP=2",
    "hook_data": "reports",
    "fused_linear": "fused",
    "arguments": "arguments",
    "launcher": "launcher",
    "core_loop": "bare loop",
}


class Framework(NamedTuple):
    """What is installed to test with a framework on top of Megatron."""

    folder: str
    """Its name in the cache."""
    packages: tuple[str, ...]
    test: str
    """The name of a file in tests/megatron."""


# Frameworks on top of Megatron, by the word that asks for them: their folder in the cache, what is
# installed there without its dependencies (Bridge's import asks for all of it), and their test.
FRAMEWORKS = {
    "megatron-bridge": Framework(
        "megatron-bridge-0.6.2",
        (
            "megatron-bridge==0.6.2",
            "transformers==5.12.1",
            "tokenizers==0.22.2",
            "huggingface-hub==1.33.0",
            "diffusers==0.42.1",
            "peft==0.21.2",
            "nvidia-modelopt==0.47.0",
            "hydra-core==1.3.8",
            "antlr4-python3-runtime==4.9.3",
            "einops==0.8.2",
            "pulp==4.2.0",
            "orloge==1.0.0",
            "cpsat-logutils==1.0.0",
        ),
        "test_bridge.py",
    )
}


class Result(NamedTuple):
    """What the tests of one version came to."""

    version: str
    imported: str | None
    """The version that the tests really imported, None where they did not get as far."""
    passed: bool
    outcomes: dict[str, Counter[str]]
    """How many tests of an area had which outcome: passed, skipped or failed."""
    seconds: float

    @property
    def fine(self) -> bool:
        """Whether all tests passed, on the version that was asked for."""
        return self.passed and self.imported == self.version


def install(version: str, cache: Path, package: str | None = None) -> Path:
    """Install megatron-core into a folder of its own in the cache, whole or not at all; once.

    Args:
        version: What it is asked for by.
        cache: Where its folder will lie.
        package: What pip is to install, None for this version from PyPI.

    Raises:
        subprocess.CalledProcessError: pip failed, and has said why.
    """
    folder = cache / version
    if not folder.is_dir():
        with _fresh(folder) as new:
            _pip(new, package or f"megatron-core=={version}")
            # Wheels leave `megatron` a namespace, into which Python joins every other megatron that
            # it finds; as a package it hides them.
            (new / "megatron" / "__init__.py").touch()
    return folder


@contextlib.contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """Give a folder of another name, which gets this one if all goes well."""
    print(f"installing into {folder}", flush=True)
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        yield new
        new.rename(folder)


def _pip(folder: Path, *packages: str) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    subprocess.run([*pip, "--no-deps", "--target", folder, *packages], check=True)


def run_framework(name: str, cache: Path) -> bool:
    """Install a framework on top of Megatron once, and run its test; whether that passed."""
    framework = FRAMEWORKS[name]
    if not (cache / framework.folder).is_dir():
        with _fresh(cache / framework.folder) as new:
            _pip(new, *framework.packages)
    test = ROOT / "tests" / "megatron" / framework.test
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test)
    return subprocess.run(pytest, cwd=ROOT, timeout=TIMEOUT_S, check=False).returncode == 0


def run_checkout(checkout: str) -> Result:
    """Install from a checkout of Megatron-LM, for once because it changes, and run the tests."""
    with tempfile.TemporaryDirectory() as cache:
        folder = install("checkout", Path(cache), os.path.abspath(checkout))
        (info,) = folder.glob("megatron_core-*.dist-info")
        return run_tests(info.name.removesuffix(".dist-info").partition("-")[2], folder)


def run_tests(version: str, folder: Path) -> Result:
    """Run the tests in a process that finds this version, in this folder, first."""
    start = time.monotonic()
    print(f"{version}: testing", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        pytest = (sys.executable, "-m", "pytest", "-q", "-m", "compat", "-p", "no:cacheprovider")
        done = subprocess.run(
            [*pytest, f"--junitxml={report}", ROOT / "tests" / "megatron"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(folder)},
            timeout=TIMEOUT_S,
            check=False,
        )
        tree = ElementTree.parse(report) if report.exists() else None
    imported, outcomes = read_report(tree)
    seconds = time.monotonic() - start
    return Result(version, imported, done.returncode == 0, outcomes, seconds)


def read_report(
    tree: ElementTree.ElementTree | None,
) -> tuple[str | None, dict[str, Counter[str]]]:
    """Read the imported version and the outcomes by area from pytest's JUnit report."""
    outcomes: dict[str, Counter[str]] = {area: Counter() for area in AREAS.values()}
    if tree is None:
        return None, outcomes
    for case in tree.iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "skipped" if kinds == {"skipped"} else "failed" if kinds else "passed"
        for part, area in AREAS.items():
            if part in case.attrib["name"]:
                outcomes[area][outcome] += 1
    imported = tree.find(".//property[@name='megatron_core']")
    return None if imported is None else imported.attrib["value"], outcomes


def table(results: list[Result]) -> str:
    """Lay the results out: tests passed, or failed of all, or "-" where all were skipped."""
    areas = list(dict.fromkeys(AREAS.values()))
    rows = [["version", "imported", *areas, "seconds"]]
    for result in results:
        cells = [_cell(result.outcomes[area]) for area in areas]
        seconds = f"{result.seconds:.0f}"
        rows.append([result.version, result.imported or "nothing", *cells, seconds])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cell(outcomes: Counter[str]) -> str:
    if outcomes["failed"]:
        return f"{outcomes['failed']} of {outcomes.total()} failed"
    return f"{outcomes['passed']} ok" if outcomes["passed"] else "-"


def main(arguments: list[str], cache: Path = CACHE) -> int:
    """Test the versions named, or all; 0 if every test passed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = f"default: all; or {', '.join(FRAMEWORKS)}, or a checkout of Megatron-LM"
    parser.add_argument("version", nargs="*", default=versions.TESTED, help=names)
    failed, results = [], []
    for name in parser.parse_args(arguments).version:
        try:
            if name in FRAMEWORKS:
                failed += [] if run_framework(name, cache) else [name]
            elif os.path.isdir(os.path.join(name, "megatron", "core")):
                results.append(run_checkout(name))
            else:
                results.append(run_tests(name, install(name, cache)))
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"{name}: {error}", file=sys.stderr)
            results.append(Result(name, None, False, read_report(None)[1], 0))
    if results:
        print(f"\n{table(results)}")
    failed += [result.version for result in results if not result.fine]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
