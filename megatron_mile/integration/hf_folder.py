"""The safetensors files of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_mile.errors import MileError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[str, Path]:
    """List the tensors of a model and the files that hold them: of one file, or by its index.

    Raises:
        FileNotFoundError: There is neither.
        MileError: The index is damaged, or names files elsewhere.
        safetensors.SafetensorError: The one file cannot be read.
    """
    from safetensors import safe_open

    if (folder / WHOLE).is_file():  # as transformers looks
        with safe_open(folder / WHOLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / WHOLE)
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MileError(f"{path}: not JSON ({error})") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(map(_is_beside, places.values())):
        raise MileError(f"{path}: expected weight_map with names of files beside it")
    return {tensor: folder / name for tensor, name in places.items()}


def _is_beside(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name
