"""Imports Megatron, only when it is needed: it takes seconds, and `--help` should not."""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from types import ModuleType

from tools.common.cli import ToolError


def megatron_module(name: str) -> ModuleType:
    """Import a module of megatron.core without its notices.

    Args:
        name: full module name.

    Returns:
        The module.

    Raises:
        ToolError: megatron-core is not installed.
    """
    silence_megatron()
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("megatron", "torch"):
            raise ToolError(
                "megatron-core is not installed; on Python >= 3.12:"
                " pip install '.[train]' in a clone of megatron_mile"
            ) from error
        raise


def silence_megatron() -> None:
    """Keep Megatron's notices about missing GPU packages out of a tool's output, to its end."""
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
