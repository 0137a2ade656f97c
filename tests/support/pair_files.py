"""Looks at the files that a data tool left."""

from __future__ import annotations

from pathlib import Path


def pair_bytes(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    """The .bin and the .idx of the pair that preprocessing made with this --output-prefix."""
    stem = f"{prefix}_{key}_document"
    return Path(f"{stem}.bin").read_bytes(), Path(f"{stem}.idx").read_bytes()


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file in the folder with its content."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
