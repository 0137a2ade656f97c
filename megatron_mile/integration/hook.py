"""Patch and unpatch the one method that Megatron's language models call for their loss.

`LanguageModule.compute_language_model_loss`, checked to be still what was tested.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows
from megatron_mile.errors import MileError
from megatron_mile.integration import models, versions
from megatron_mile.integration.arguments import check_objective
from megatron_mile.integration.emo_rows import RowsAhead, output_rows
from megatron_mile.integration.forward import Window, current_window, differentiated
from megatron_mile.integration.fused import (
    DeferredLogits,
    fuse_output_layer,
)
from megatron_mile.integration.host import METHOD, loss_owner, resolve
from megatron_mile.integration.models import (
    check_shard,
    check_vocab_size,
    installed_config,
    logits_are_read,
    tp_group,
    unwrap,
)
from megatron_mile.loss import TokenLoss, token_loss
from megatron_mile.ops import dispatch

InputsOf = Callable[[torch.Tensor], dict[str, torch.Tensor]]

# What takes back what `attach` did to a model; a callback gets the model, so that it holds none.
_undo: weakref.WeakKeyDictionary[Any, list[Callable[[Any], None]]] = weakref.WeakKeyDictionary()


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
    for module in list(_undo):
        _detach(module)


def _detach(module: Any) -> None:
    for undo in _undo.pop(module, []):
        undo(module)


def attach(
    model: Any,
    config: ObjectiveConfig,
    vocab_size: int | None = None,
    fused_linear: bool = False,
    cost: CostRows | None = None,
    inputs: InputsOf | None = None,
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
        inputs: What gives `token_loss` its `inputs` for labels [b, s]; 0-d, or [b, s].

    Raises:
        MileCompatError: Megatron's output layer is not as expected (with `fused_linear`).
        MileError: A chunk on the last pipeline stage has no `compute_language_model_loss`, its
            projection cannot be fused, `vocab_size` is not within its vocabulary, or the objective
            takes no `cost` or `fused_linear`.
    """
    check_objective(config, fused_linear, cost is not None)
    for chunk in model if isinstance(model, (list, tuple)) else [model]:
        module = unwrap(chunk)
        _refuse_own_loss(module)
        check_vocab_size(module, vocab_size)
        _detach(module)
        undo = _undo.setdefault(module, [])
        if fused_linear and getattr(module, "post_process", True):
            undo.append(fuse_output_layer(module, resolve(versions.OUTPUT_LAYER)))
        rows = None
        if config.definition.needs_cost:
            ahead = RowsAhead(module, cost)
            rows = ahead.take
            undo.append(ahead.stop)
        hook = _make_hook(_host(type(module)), config, vocab_size, rows, inputs)
        module.__dict__[METHOD] = types.MethodType(hook, module)
        undo.append(lambda model: model.__dict__.pop(METHOD, None))


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


def _turned(stats: TokenLoss) -> TokenLoss:
    """Return the fields [s, b] as [b, s], contiguous."""
    return TokenLoss._make(x if x is None else x.transpose(0, 1).contiguous() for x in stats)


def _make_hook(
    host: Callable[..., torch.Tensor],
    config: ObjectiveConfig,
    vocab_size: int | None = None,
    rows: Callable[..., Any] | None = None,
    inputs: InputsOf | None = None,
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
        if window is None and models.mtp_heads(self, None):
            raise MileError(
                "a model with multi-token prediction needs its forward_step wrapped, so that its "
                "main loss can be told from the others: use megatron_mile.wrap_forward_step"
            )
        window = window or Window()  # outside a forward step: fine until a backward comes
        window.calls += 1
        if window.calls <= models.mtp_heads(self, window.heads_ran):
            return host(self, labels, logits)
        group = tp_group(self)
        given = inputs(labels) if inputs else {}
        turned = {name: x.t() if x.dim() else x for name, x in given.items()}
        if isinstance(logits, DeferredLogits):
            check_shard(self, labels, logits.shape(group), group)
            stats = logits.loss(labels.transpose(0, 1), config, group, vocab_size, turned)
            stats = _turned(stats)
        elif config.definition.needs_cost:
            check_shard(self, labels, tuple(logits.shape), group)
            cost = rows(self, labels) if rows else output_rows(self)
            # Not in place: products are kept where the gradient will lie, or would be made twice.
            stats = _turned(
                token_loss(
                    logits, labels.transpose(0, 1), config, group, vocab_size=vocab_size, cost=cost
                )
            )
        else:
            check_shard(self, labels, tuple(logits.shape), group)
            loss = functools.partial(
                token_loss,
                config=config,
                tp_group=group,
                inplace=not logits_are_read(self),
                vocab_size=vocab_size,
            )
            if logits.device.type == "cpu":  # which is faster on rows in the order they lie in
                stats = _turned(loss(logits, labels.transpose(0, 1), inputs=turned))
            else:  # nothing per token needs to be turned, which would be a launch for each field
                stats = loss(logits.transpose(0, 1), labels, inputs=given)
        return window.put(stats, config)

    compute_language_model_loss.__wrapped__ = host  # type: ignore[attr-defined]
    compute_language_model_loss.__megatron_mile__ = config  # type: ignore[attr-defined]
    return compute_language_model_loss
