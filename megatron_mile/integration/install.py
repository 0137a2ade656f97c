"""Patch and unpatch the one method that Megatron's language models call for their loss.

`LanguageModule.compute_language_model_loss`, checked to be still what was tested.
"""

from __future__ import annotations

import importlib
import inspect
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows
from megatron_mile.integration import models, versions
from megatron_mile.integration.cost import RowsAhead, check_objective, output_rows, stop_fetching
from megatron_mile.integration.errors import MileCompatError, MileError
from megatron_mile.integration.loss_func import Window, current_window, differentiated
from megatron_mile.integration.models import (
    METHOD,
    check_shard,
    check_vocab_size,
    installed_config,
    logits_are_read,
    tp_group,
    unwrap,
)
from megatron_mile.integration.output_layer import (
    DeferredLogits,
    fuse_output_layer,
    restore_output_layers,
)
from megatron_mile.loss import TokenLoss, token_loss
from megatron_mile.ops import dispatch

_attached: weakref.WeakSet[Any] = weakref.WeakSet()


def install(config: ObjectiveConfig) -> None:
    """Patch the class, so that every language model of this process trains with the objective.

    Call it before or after the model is built, and hand Megatron a forward step that
    `wrap_forward_step` has wrapped. A second call replaces the settings of the first; a model that
    `attach` has patched keeps its own.

    Raises:
        MileCompatError: The installed Megatron does not have the method as expected.
        ValueError: The backend does not run here.
    """
    dispatch.select(config.backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    owner = loss_owner()
    setattr(owner, METHOD, _make_hook(_host(owner), config))


def uninstall() -> None:
    """Undo `install` and every `attach`; nothing happens where nothing is patched."""
    owner = loss_owner()
    setattr(owner, METHOD, _host(owner))
    for module in list(_attached):
        module.__dict__.pop(METHOD, None)
        _attached.discard(module)
    restore_output_layers()
    stop_fetching()


def attach(
    model: Any,
    config: ObjectiveConfig,
    vocab_size: int | None = None,
    fused_linear: bool = False,
    cost: CostRows | None = None,
) -> None:
    """Patch one model instance, wrapped or not, or each chunk of a list; the last call holds.

    Args:
        model: Models, with or without DDP and precision wrappers.
        config: The objective.
        vocab_size: The tokenizer's size: columns from there on are padding, which training leaves
            out of the softmax. None counts them, as Megatron does.
        fused_linear: Compute output projection and loss in one, a block of tokens at a time
            (`linear_token_loss`), so that the logits never exist as a whole in training; not emo.
        cost: This rank's rows of EMO's fixed cost matrix; None for the output layer in each step.

    Raises:
        MileCompatError: Megatron's output layer is not as expected (with `fused_linear`).
        MileError: A chunk on the last pipeline stage has no `compute_language_model_loss`, its
            projection cannot be fused, `vocab_size` is not within its vocabulary, or the objective
            takes no `cost` or `fused_linear`.
    """
    check_objective(config, fused_linear, cost)
    for chunk in model if isinstance(model, (list, tuple)) else [model]:
        module = unwrap(chunk)
        _refuse_own_loss(module)
        check_vocab_size(module, vocab_size)
        stop_fetching(module)
        if getattr(module, "post_process", True):
            restore_output_layers(module)
            if fused_linear:
                fuse_output_layer(module, resolve(versions.OUTPUT_LAYER))
        rows = RowsAhead(module, cost).take if config.definition.needs_cost else None
        hook = _make_hook(_host(type(module)), config, vocab_size, rows)
        module.__dict__[METHOD] = types.MethodType(hook, module)
        _attached.add(module)


def _refuse_own_loss(module: Any) -> None:
    """Stop where attaching would drop a loss that is not Megatron's.

    Raises:
        MileError: The model's class, or somebody for this instance, has replaced the method.
    """
    name = type(module).__name__
    if not hasattr(module, METHOD):
        raise MileError(
            f"attach: {name} has no method {METHOD}; expected a Megatron language model such as "
            "GPTModel"
        )
    own = module.__dict__.get(METHOD)
    replaced = own is not None and installed_config(own) is None
    if replaced or _host(type(module)) is not _host(loss_owner()):
        raise MileError(
            f"attach: {name} computes its loss in a {METHOD} of its own, which the objective would "
            "drop; remove it, or train without attach"
        )


def _host(owner: type) -> Callable[..., Any]:
    """The class's method without our hook."""
    method = getattr(owner, METHOD)
    return method.__wrapped__ if installed_config(method) is not None else method


def loss_owner() -> type:
    """The class that owns the loss method, once version and signatures have been checked.

    Raises:
        MileCompatError: Megatron is missing, or differs from what versions.py expects.
    """
    release = _release()
    for symbol in versions.CORE:
        resolve(symbol)
    owner = getattr(importlib.import_module(versions.LOSS_METHOD.module), "LanguageModule")  # noqa: B009
    for module_name, class_name, since in versions.MODELS:
        if release < since:
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


def _release() -> tuple[int, ...]:
    """(major, minor) of the installed Megatron, with a warning where it is outside the window."""
    from packaging.version import Version

    found = _import("megatron.core").__version__
    release = Version(found).release[:2]
    first, last = versions.WINDOW
    if not first <= release <= last:
        warnings.warn(
            f"megatron_mile was tested with megatron-core {', '.join(versions.TESTED)}, not "
            f"{found}; signatures are checked, numbers are not",
            stacklevel=4,
        )
    return release


def _make_hook(
    host: Callable[..., torch.Tensor],
    config: ObjectiveConfig,
    vocab_size: int | None = None,
    rows: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Build the method that replaces `host`; `rows` gives EMO's cost for (model, labels)."""

    def compute_language_model_loss(
        self: Any, labels: torch.Tensor, logits: torch.Tensor | DeferredLogits
    ) -> torch.Tensor:
        """Plain cross-entropy per token, [b, s], of labels [b, s] and logits [s, b, V/tp].

        In training with the gradient of the weighted loss.
        """
        if not differentiated(logits):
            return host(self, labels, logits)
        window = current_window()
        if window is None and models.mtp_heads(self):
            raise MileError(
                "a model with multi-token prediction needs its forward_step wrapped, so that its "
                "main loss can be told from the others: use megatron_mile.wrap_forward_step"
            )
        window = window or Window()  # outside a forward step: fine until a backward comes
        window.calls += 1
        if window.calls <= models.mtp_heads(self):
            return host(self, labels, logits)
        group = tp_group(self)
        targets = labels.transpose(0, 1)
        if isinstance(logits, DeferredLogits):
            check_shard(self, labels, logits.shape(group), group)
            stats = logits.loss(targets, config, group, vocab_size)
        elif config.definition.needs_cost:
            check_shard(self, labels, tuple(logits.shape), group)
            cost = rows(self, labels) if rows else output_rows(self)
            # Not in place: products are kept where the gradient will lie, or would be made twice.
            stats = token_loss(logits, targets, config, group, vocab_size=vocab_size, cost=cost)
        else:
            check_shard(self, labels, tuple(logits.shape), group)
            inplace = not logits_are_read(self)
            stats = token_loss(
                logits, targets, config, group, inplace=inplace, vocab_size=vocab_size
            )
        stats = TokenLoss._make(x if x is None else x.transpose(0, 1).contiguous() for x in stats)
        return window.put(stats, config)

    compute_language_model_loss.__wrapped__ = host  # type: ignore[attr-defined]
    compute_language_model_loss.__megatron_mile__ = config  # type: ignore[attr-defined]
    return compute_language_model_loss
