"""Where and with what a benchmark was made."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from megatron_mile.run_record.record import git_state


def conditions() -> dict[str, str]:
    """Return the columns that say where and with what a run was made."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    versions = {"triton": _version("triton"), "megatron_core": _version("megatron-core")}
    return {"device": _device_name(), "torch": torch.__version__, **versions} | {
        "commit": _commit(),
        "date": now,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Return the commit, with "+" if code that is timed differs from it; "unknown" without git."""
    state = git_state(__file__, "megatron_mile", "tools/bench/*.py")
    return state["commit"][:10] + "+" * state["dirty"] if state else "unknown"
