"""Patch and unpatch the one method that Megatron's language models call for their loss.

`LanguageModule.compute_language_model_loss`, checked to be still what was tested.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows
from megatron_mile.errors import MileError
from megatron_mile.integration import models, versions
from megatron_mile.integration.arguments import check_objective
from megatron_mile.integration.emo_rows import RowsAhead, output_rows
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
from megatron_mile.integration.window import Window, current_window, differentiated
from megatron_mile.loss import TokenLoss, token_loss
from megatron_mile.ops import dispatch

InputsOf = Callable[[torch.Tensor], dict[str, torch.Tensor]]
BucketsOf = Callable[[torch.Tensor], torch.Tensor]

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
    buckets: BucketsOf | None = None,
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
        buckets: What gives the index into `BUCKETS` of labels [b, s], as `FrequencyTables.buckets`;
            their plain losses are then reported, in training and evaluation.

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
        hook = _make_hook(_host(type(module)), config, vocab_size, rows, inputs, buckets)
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


def _turned_arguments(
    inputs: Mapping[str, torch.Tensor], token_weight: torch.Tensor | None
) -> dict[str, Any]:
    """Return what `token_loss` takes per token, [b, s], as [s, b]."""
    return {
        "inputs": {name: x.t() if x.dim() else x for name, x in inputs.items()},
        "token_weight": token_weight if token_weight is None else token_weight.t(),
    }


class _MainLoss(NamedTuple):
    """How a step's main loss is computed: the settings of the hook."""

    config: ObjectiveConfig
    vocab_size: int | None
    rows: Callable[..., Any] | None
    inputs: InputsOf | None

    def stats(
        self,
        model: Any,
        labels: torch.Tensor,
        logits: torch.Tensor | DeferredLogits,
        window: Window,
    ) -> TokenLoss:
        """Return the loss per token, fields [b, s], of labels [b, s] and logits [s, b, V/tp]."""
        group = tp_group(model)
        shape = logits.shape(group) if isinstance(logits, DeferredLogits) else tuple(logits.shape)
        check_shard(model, labels, shape, group)
        given: dict[str, Any] = {
            "inputs": self.inputs(labels) if self.inputs else {},
            "token_weight": window.take_token_weight(labels),
            "accuracy": window.report.accuracy,
        }
        window.gamma = given["inputs"].get("gamma")
        turned = {**given, **_turned_arguments(given["inputs"], given["token_weight"])}
        if isinstance(logits, DeferredLogits):
            return _turned(logits.loss(labels.t(), self.config, group, self.vocab_size, **turned))
        loss = functools.partial(
            token_loss, config=self.config, tp_group=group, vocab_size=self.vocab_size
        )
        if self.config.definition.needs_cost:
            cost = self.rows(model, labels) if self.rows else output_rows(model)
            # Not in place: products are kept where the gradient will lie, or would be made twice.
            return _turned(loss(logits, labels.t(), cost=cost, **turned))
        loss = functools.partial(loss, inplace=not logits_are_read(model))
        if logits.device.type == "cpu":  # which is faster on rows in the order they lie in
            return _turned(loss(logits, labels.t(), **turned))
        # Nothing per token needs to be turned, which would be a launch for each field.
        return loss(logits.transpose(0, 1), labels, **given)


def _note_evaluated(
    window: Window | None,
    model: Any,
    labels: torch.Tensor,
    logits: torch.Tensor | DeferredLogits,
    backend: str,
) -> None:
    """Leave the statistics of logits that are not trained, before the host overwrites them."""
    if window is None or not window.report.evaluated or isinstance(logits, DeferredLogits):
        return
    group = tp_group(model)
    check_shard(model, labels, tuple(logits.shape), group)
    plain = ObjectiveConfig("ce", backend=backend)
    stats = token_loss(logits.detach(), labels.t(), plain, group, accuracy=True)
    window.evaluated = _turned(stats)


def _window_outside(model: Any) -> Window:
    """Make a window outside of a forward step, which is fine until a backward comes."""
    if models.mtp_heads(model, None):
        raise MileError(
            "a model with multi-token prediction needs its forward_step wrapped, so that its "
            "main loss can be told from the others: use megatron_mile.wrap_forward_step"
        )
    return Window()


def _make_hook(
    host: Callable[..., torch.Tensor],
    config: ObjectiveConfig,
    vocab_size: int | None = None,
    rows: Callable[..., Any] | None = None,
    inputs: InputsOf | None = None,
    buckets: BucketsOf | None = None,
) -> Callable[..., Any]:
    """Build the method that replaces `host`; `rows` gives EMO's cost for (model, labels)."""
    main_loss = _MainLoss(config, vocab_size, rows, inputs)

    def compute_language_model_loss(
        self: Any, labels: torch.Tensor, logits: torch.Tensor | DeferredLogits
    ) -> torch.Tensor:
        """Plain cross-entropy per token, [b, s], of labels [b, s] and logits [s, b, V/tp].

        In training with the gradient of the weighted loss.
        """
        window = current_window()
        if window is not None and buckets is not None:
            window.buckets = buckets(labels)  # of the last call, the main loss, to stay
        if not differentiated(logits):
            _note_evaluated(window, self, labels, logits, config.backend)
            return host(self, labels, logits)
        window = window or _window_outside(self)
        window.calls += 1
        if window.calls <= models.mtp_heads(self, window.heads_ran):
            return host(self, labels, logits)
        return window.put(main_loss.stats(self, labels, logits, window), config)

    compute_language_model_loss.__wrapped__ = host  # type: ignore[attr-defined]
    compute_language_model_loss.__megatron_mile__ = config  # type: ignore[attr-defined]
    return compute_language_model_loss
