"""Wheels that hold a version and nothing else, for runners that install what they test."""

import zipfile
from pathlib import Path

VERSION = "0.0.1"


def stub_wheel(folder: Path, package: str, module: str) -> Path:
    """Write the wheel of a package whose one module knows its version; return its path."""
    name = package.replace("-", "_")
    path, info = folder / f"{name}-{VERSION}-py3-none-any.whl", f"{name}-{VERSION}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", f"__version__ = {VERSION!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Name: {package}\nVersion: {VERSION}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path
