"""Run the tests marked `compat` on every supported version of megatron-core, one after the other.

Each version is installed once into .compat/VERSION (12 to 21 MB; 0.12 and 0.13 are compiled, which
needs a C++ compiler). Python, torch and everything else are those of this environment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
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


def install(version: str, cache: Path) -> Path:
    """Install megatron-core into a folder of its own in the cache, whole or not at all; once.

    Raises:
        subprocess.CalledProcessError: pip failed, and has said why.
    """
    folder = cache / version
    if folder.is_dir():
        return folder
    print(f"{version}: installing into {folder}", flush=True)
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        new = Path(temporary) / version
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        package = f"megatron-core=={version}"
        subprocess.run([*pip, "--no-deps", "--target", new, package], check=True)
        # Wheels leave `megatron` a namespace, into which Python joins every other megatron that it
        # finds; as a package it hides them.
        (new / "megatron" / "__init__.py").touch()
        new.rename(folder)
    return folder


def run_tests(version: str, cache: Path) -> Result:
    """Run the tests in a process that finds this version first."""
    start = time.monotonic()
    folder = install(version, cache)
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
    parser.add_argument("version", nargs="*", default=versions.TESTED, help="default: all")
    results = []
    for version in parser.parse_args(arguments).version:
        try:
            results.append(run_tests(version, cache))
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"{version}: {error}", file=sys.stderr)
            results.append(Result(version, None, False, read_report(None)[1], 0))
    print(f"\n{table(results)}")
    failed = [result.version for result in results if not result.fine]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
