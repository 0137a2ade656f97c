"""The installed Megatron: its version, its functions where versions.py expects them, replaced."""

from __future__ import annotations

import functools
import importlib
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

from megatron_mile.errors import MileCompatError
from megatron_mile.integration import versions

METHOD = versions.LOSS_METHOD.name.rsplit(".", 1)[1]


def loss_owner() -> type:
    """The class that owns the loss method, once version and signatures have been checked.

    Raises:
        MileCompatError: Megatron is missing, or differs from what versions.py expects.
    """
    found = _checked_release()
    for symbol in versions.CORE:
        resolve(symbol)
    owner = getattr(importlib.import_module(versions.LOSS_METHOD.module), "LanguageModule")  # noqa: B009
    for module_name, class_name, since in versions.MODELS:
        if found < since:
            continue
        model = getattr(_import(module_name), class_name, None)
        if model is None or METHOD in model.__dict__:
            raise _drift(f"{module_name}.{class_name} without a {METHOD} of its own", model)
    return owner


def resolve(symbol: versions.Symbol) -> Callable[..., Any]:
    """Find a function of Megatron and check its parameters.

    Raises:
        MileCompatError: It is missing, or its parameters are not those expected.
    """
    found: Any = _import(symbol.module)
    for part in symbol.name.split("."):
        found = getattr(found, part, None)
    expected = f"{symbol.module}.{symbol.name}({', '.join(symbol.parameters)})"
    if not callable(found):
        raise _drift(expected, found)
    parameters = tuple(inspect.signature(found).parameters)
    fits = (
        parameters == symbol.parameters if symbol.exact else set(symbol.parameters) <= {*parameters}
    )
    if not fits:
        raise _drift(expected, f"parameters ({', '.join(parameters)})")
    return found


def _import(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.startswith(("megatron.core.", "megatron.training.")):
            raise _drift(f"a module {name}", str(error)) from error
        raise MileCompatError(
            f"cannot import {name}: {error}; install Megatron with "
            "`pip install '.[train]'` in a clone of megatron_mile, or run where Megatron-LM is"
            " (wheels of megatron-core before 0.17 have no megatron.training)"
        ) from error


def host_version() -> str:
    """Version and folder of what is imported: a checkout may lie in front of a wheel."""
    core: Any = _import("megatron.core")
    # The suffix is the commit of whatever repository the folder lies in.
    return f"{core.__version__.split('+')[0]} in {core.__path__[0]}"


def _drift(expected: str, found: Any) -> MileCompatError:
    import megatron.core

    return MileCompatError(
        f"megatron.core {megatron.core.__version__} ({megatron.core.__file__}): expected "
        f"{expected}, found {found}; tested with {', '.join(versions.TESTED)}: install one of "
        "these, or report the version"
    )


def release() -> tuple[int, ...]:
    """(major, minor) of the installed Megatron."""
    from packaging.version import Version

    return Version(_import("megatron.core").__version__).release[:2]


def _checked_release() -> tuple[int, ...]:
    """(major, minor) of the installed Megatron, with a warning where it is outside the window."""
    found = release()
    first, last = versions.WINDOW
    if not first <= found <= last:
        warnings.warn(
            f"megatron_mile was tested with megatron-core {', '.join(versions.TESTED)}, not "
            f"{_import('megatron.core').__version__}; signatures are checked, numbers are not",
            stacklevel=4,
        )
    return found


def replace(symbol: versions.Symbol, wrapper: Callable[[Any], Any]) -> None:
    """Wrap a function of Megatron wherever `megatron.training` has bound it."""
    host = resolve(symbol)
    if getattr(host, "__megatron_mile_job__", False):
        return
    wrapped: Any = functools.wraps(host)(wrapper(host))
    wrapped.__megatron_mile_job__ = True
    for module in (symbol.module, "megatron.training", "megatron.training.training"):
        module_object = importlib.import_module(module)
        if getattr(module_object, symbol.name, None) is host:
            setattr(module_object, symbol.name, wrapped)
