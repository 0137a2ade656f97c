"""What is installed, what would run, and what of Megatron would be patched or called.

Usage:
    python -m megatron_mile          exit code 1 if the installed Megatron does not fit
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Callable
from importlib import metadata

import torch

import megatron_mile

OK = "ok"
ABSENT = "absent: this wheel has no megatron.training; the launcher needs Megatron-LM's"


def environment() -> list[tuple[str, str]]:
    """(name, version or state) of what a job meets on this machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpu = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "none: CPU mode with --mile-cpu"
    return [
        ("megatron_mile", megatron_mile.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("GPU", gpu),
        *((name, _version(name)) for name in ("triton", "transformer_engine", "apex")),
        ("megatron-core", _megatron()),
    ]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "found" if importlib.util.find_spec(distribution) else "not installed"


def _megatron() -> str:
    from megatron_mile.errors import MileCompatError
    from megatron_mile.integration import host, versions

    if not torch.cuda.is_available():
        os.environ.setdefault(*versions.IMPORT_WITHOUT_GPU)
    try:
        return host.host_version()
    except MileCompatError:
        return "not installed"  # the table below says why


def check_host() -> list[tuple[str, str]]:
    """(symbol, OK, ABSENT or what is wrong) for each symbol of Megatron that a job needs."""
    from megatron_mile.errors import MileCompatError
    from megatron_mile.integration import host, versions

    def state_of(check: Callable[[], object]) -> str:
        try:
            check()
        except MileCompatError as error:
            return str(error)
        return OK

    find = importlib.util.find_spec
    wheel_without = bool(find("megatron")) and not find("megatron.training")
    rows = []
    for symbol in (*versions.CORE, *versions.TRAINING):
        absent = symbol in versions.TRAINING and wheel_without
        state = ABSENT if absent else state_of(functools.partial(host.resolve, symbol))
        rows.append((f"{symbol.module}.{symbol.name}", state))
    return [*rows, ("models that take their loss from it", state_of(host.loss_owner))]


def main() -> int:
    """Print the report; return 0 if all of Megatron that is needed is as expected."""
    argparse.ArgumentParser(
        prog="python -m megatron_mile",
        description="Report the environment and what a job would patch or call.",
    ).parse_args()
    warnings.simplefilter("ignore")  # Megatron's own notices about missing GPU packages
    for name, state in environment():
        print(f"{name:20} {state}")
    print("\nwould be patched or called:")
    host = check_host()
    for name, state in host:
        print(f"  {name}  {state}")
    return 0 if {state for _, state in host} <= {OK, ABSENT} else 1


if __name__ == "__main__":
    sys.exit(main())
