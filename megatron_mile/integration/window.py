"""The window of one forward step: what the hook leaves in it for the loss function to take out.

The hook runs deep in the model's forward; Megatron takes the loss from the function that
`forward_step` returns. `forward.wrap_forward_step` opens a window around each forward step, and its
loss function takes out of it what the hook has left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration.host import METHOD
from megatron_mile.integration.models import installed_config, unwrap
from megatron_mile.integration.telemetry import Report
from megatron_mile.loss import TokenLoss
from megatron_mile.nodes import check_token_weight


class TrainedLoss(NamedTuple):
    """What the hook leaves of a training step's main loss."""

    output: torch.Tensor
    """What the model returned, [b, s]: nll, with the gradient of the objective."""
    stats: TokenLoss
    config: ObjectiveConfig


class _NllOfLoss(torch.autograd.Function):
    """nll as a tensor of its own, with the gradient of the objective's loss; one copy."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
        """Return nll."""
        return nll.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient as it comes."""
        return grad, None


class Normalised:
    """Whether a loss function has normalised a step's loss.

    Apart from the window: what is hooked to a tensor must not hold the tensor, or both and the
    graph behind them stay in memory for good.
    """

    def __init__(self) -> None:
        self.done = False

    def refuse_unless_done(self, gradient: torch.Tensor) -> None:
        """Stop the first backward of a loss that nobody has normalised."""
        if not self.done:
            raise MileError(
                "the objective is installed, but nobody normalised its loss: pass your "
                "forward_step through megatron_mile.wrap_forward_step and call the loss function "
                "that it returns, or start the script with `-m megatron_mile.launch`"
            )


class Window:
    """One forward step: what the hook has left for its loss function."""

    def __init__(self, report: Report = Report()) -> None:  # noqa: B008 - it cannot change
        self.report = report
        self.calls = 0
        """Losses computed so far, those of multi-token-prediction heads included."""
        self.heads_ran: bool | None = None
        """Whether the model's prediction heads have run; None where it has none to be watched."""
        self.trained: TrainedLoss | None = None
        self.gamma: torch.Tensor | None = None
        """What the main loss was given in place of the setting, if anything."""
        self.normalised = Normalised()
        self.buckets: torch.Tensor | None = None
        """Index into `BUCKETS` of each label, [b, s], where their losses are to be reported."""
        self.evaluated: TokenLoss | None = None
        """Statistics [b, s] of logits that are not trained, where they are to be reported."""
        self.token_weight: torch.Tensor | None = None
        """Weights [b, s] that the step has for its tokens, until the hook takes them."""

    def take_token_weight(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Take the weights of this step's tokens, once, if they fit the labels [b, s]."""
        weight, self.token_weight = self.token_weight, None
        try:
            check_token_weight(weight, labels)
        except ValueError as error:
            raise MileError(f"set_token_weight: {error}") from error
        return weight

    def refuse_unused_weight(self) -> None:
        """Stop where weights were set for a step that is run by another one inside it."""
        if self.token_weight is not None:
            raise MileError(
                "set_token_weight was called in a forward step whose model ran in another one "
                "inside it, so that its weights are unused; call it in the inner one"
            )

    def put(self, stats: TokenLoss, config: ObjectiveConfig) -> torch.Tensor:
        """Leave the statistics of this step's one main loss; returns the model's loss [b, s]."""
        if self.trained is not None:
            raise MileError(
                "one forward step computed the language-model loss twice; megatron_mile weights "
                "one loss a step: run one model in each forward_step"
            )
        output = _NllOfLoss.apply(stats.loss, stats.nll)
        self.trained = TrainedLoss(output, stats, config)
        if output.requires_grad:
            output.register_hook(self.normalised.refuse_unless_done)
        return output

    def take(self, model: Any, config: ObjectiveConfig, output: Any) -> TokenLoss:
        """Take them out, once, if they are of these settings and this output."""
        if self.normalised.done:
            raise MileError(
                "the loss function of one forward step was called twice while training; call it "
                "once, and keep what it returns"
            )
        if self.trained is None:
            raise MileError(_why_nothing_was_left(unwrap(model)))
        trained, self.trained = self.trained, None
        self.normalised.done = True
        if trained.config != config:
            raise MileError(
                f"install or attach was given {trained.config}, but wrap_forward_step {config}; "
                "give both the same"
            )
        # Fresh when the hook left it, so any version but 0 is a change in place.
        if not _is_same(output, trained.output) or trained.output._version:
            raise MileError(
                "forward_step changed the losses per token that the model returned; return them "
                "as they are, and do the rest in the loss function"
            )
        return trained.stats


def _why_nothing_was_left(model: Any) -> str:
    name = type(model).__name__
    if installed_config(getattr(model, METHOD, None)) is None:
        return (
            f"the forward step is wrapped, but no objective is installed on {name}: call install "
            "or attach before the step, and uninstall after the last one"
        )
    return (
        f"objective not applied: {name} computed its loss without calling "
        "compute_language_model_loss as patched; use a GPTModel or HybridModel, or "
        "--mile-objective none"
    )


def _is_same(output: Any, returned: torch.Tensor) -> bool:
    """Whether wrappers around the model have at most renamed what it returned."""
    if output is returned:
        return True
    if not isinstance(output, torch.Tensor) or output.shape != returned.shape:
        return False
    return output.data_ptr() == returned.data_ptr() and output.stride() == returned.stride()


_current: Window | None = None


def current_window() -> Window | None:
    """The window of the forward step that is running, if it was wrapped."""
    return _current


def set_token_weight(weights: torch.Tensor) -> None:
    """Give the tokens of the running forward step weights of their own, before it calls the model.

    They multiply the weight of each token, and so its loss, in training; see `token_loss`. In a
    step all data- and context-parallel ranks must set some, or none. Evaluation ignores them.

    Args:
        weights: >= 0, [b, s] as the labels, with context parallelism this rank's part; real or
            bool, on the labels' device. Pipeline stages without a loss do nothing with them.

    Raises:
        MileError: No forward step that `wrap_forward_step` has wrapped is running, it has weights
            already, or its model has computed its loss.
    """
    if _current is None:
        raise MileError(
            "set_token_weight was called outside a forward step that megatron_mile has wrapped; "
            "call it in forward_step, before the model"
        )
    if _current.trained is not None:
        raise MileError(
            "set_token_weight was called after the model had computed its loss; call it before"
        )
    if _current.token_weight is not None:
        raise MileError("set_token_weight was called twice in one forward step; call it once")
    _current.token_weight = weights


@contextlib.contextmanager
def open_window(model: Any, report: Report) -> Iterator[Window]:
    """Open the window of one forward step of a model, which may run inside another."""
    global _current
    outer, window = _current, Window(report)
    _current = window
    try:
        with _watched_heads(unwrap(model), window):
            yield window
    finally:
        _current = outer


@contextlib.contextmanager
def _watched_heads(model: Any, window: Window) -> Iterator[None]:
    """Note whether the multi-token-prediction layers of an unwrapped model run meanwhile."""
    heads = getattr(model, "mtp", None)
    if not isinstance(heads, torch.nn.Module):
        yield
        return

    def note(*_: Any) -> None:
        window.heads_ran = True

    window.heads_ran = False
    watch = heads.register_forward_pre_hook(note)
    try:
        yield
    finally:
        watch.remove()


def differentiated(*tensors: Any) -> bool:
    """Whether what is made of these will be differentiated; all else keeps the host's own loss."""
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)
