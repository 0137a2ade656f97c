"""Megatron's checkpoint folder: which iteration is the latest, and the names of its files."""

from __future__ import annotations

from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron's word for weights that come from elsewhere
# In the folder of an iteration, written last, so that a folder with it is whole.
LAST_FILE = "metadata.json"
# How the keys of its state begin.
OF_THE_OPTIMIZER = ("optimizer.", "chained_")


def iteration_name(iteration: int | str) -> str:
    """Name of an iteration's folder; `iteration` is a number, or what the tracker file says.

    Raises:
        ValueError: It is neither a number nor `RELEASE`.
    """
    return RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}"


def latest_name(folder: Path) -> str:
    """Name of the latest iteration's folder.

    Raises:
        FileNotFoundError: There is no tracker file.
        ValueError: It does not hold an iteration.
    """
    return iteration_name((folder / TRACKER).read_text(encoding="utf-8").strip())
