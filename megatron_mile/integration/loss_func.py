"""From the hook's token statistics to Megatron's loss: normaliser and report.

The hook runs deep in the model's forward; Megatron takes the loss from the function that
`forward_step` returns. `wrap_forward_step` opens a window around each forward step in which the
hook may leave its statistics, and wraps the returned function, which takes them out again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.integration.errors import MileError
from megatron_mile.integration.telemetry import report_with_objective
from megatron_mile.loss import TokenLoss
from megatron_mile.parallel import ProcessGroup
from megatron_mile.parallel.tokens import normaliser

LossFunc = Callable[..., tuple[Any, ...]]


class Window:
    """One forward step: what the hook has left for its loss function."""

    def __init__(self) -> None:
        self.calls = 0
        """Losses computed so far, those of multi-token-prediction heads included."""
        self.stats: TokenLoss | None = None

    def put(self, stats: TokenLoss) -> None:
        """Leave the statistics of this step's one main loss."""
        if self.stats is not None:
            raise MileError(
                "one forward step computed the language-model loss twice; megatron_mile weights "
                "one loss a step: run one model in each forward_step"
            )
        self.stats = stats
        if stats.loss.requires_grad:
            stats.loss.register_hook(self._refuse_unconsumed)

    def take(self, model: Any) -> TokenLoss:
        """Take them out, once."""
        stats, self.stats = self.stats, None
        if stats is None:
            raise MileError(
                f"objective not applied: {type(unwrap(model)).__name__} computed its loss without "
                "calling compute_language_model_loss as patched; use a GPTModel or HybridModel, "
                "or --mile-objective none"
            )
        return stats

    def _refuse_unconsumed(self, gradient: torch.Tensor) -> None:
        """Stop the first backward of a loss that nobody has normalised."""
        if self.stats is not None:
            raise MileError(
                "the objective is installed, but nobody normalised its loss: pass your "
                "forward_step through megatron_mile.wrap_forward_step and call the loss function "
                "that it returns, or start the script with `-m megatron_mile.launch`"
            )


_current: Window | None = None


def current_window() -> Window | None:
    """The window of the forward step that is running, if it was wrapped."""
    return _current


@contextlib.contextmanager
def _open_window() -> Iterator[Window]:
    """Open the window of one forward step."""
    global _current
    _current = window = Window()
    try:
        yield window
    finally:
        _current = None


def wrap_forward_step(
    forward_step: Callable[..., Any], config: ObjectiveConfig
) -> Callable[..., Any]:
    """Give a Megatron forward step the objective's normaliser and report; idempotent.

    Args:
        forward_step: As handed to Megatron's `pretrain` or schedules: takes (data_iterator, model)
            and returns (output_tensor, loss_func), where output_tensor is the loss per token
            [b, s] on the last pipeline stage and loss_func turns it into
            (loss_sum, num_tokens, report) or (loss, report).
        config: The objective that `install` or `attach` was given.

    Returns:
        A forward step of the same signature. Training steps get alpha and the report keys;
        evaluation passes through untouched.
    """
    if getattr(forward_step, "__megatron_mile__", None) is not None:
        return forward_step

    @functools.wraps(forward_step)
    def wrapped(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        with _open_window() as window:
            output, loss_func = forward_step(data_iterator, model, *args, **kwargs)
        if loss_func is None:
            return output, loss_func
        return output, functools.partial(_objective_loss, loss_func, window, model, config)

    wrapped.__megatron_mile__ = config  # type: ignore[attr-defined]
    return wrapped


def _objective_loss(
    loss_func: LossFunc,
    window: Window,
    model: Any,
    config: ObjectiveConfig,
    output_tensor: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Let the host reduce, check and report alpha * loss, then add the objective's figures."""
    if not is_training(model) or kwargs.get("non_loss_data"):
        return loss_func(output_tensor, *args, **kwargs)
    stats = window.take(model)
    mask = _loss_mask(loss_func, stats)
    alpha = normaliser(stats.weight, mask * stats.valid, config.normalize, data_group())
    # A masked token may hold a label that nobody owns: its NaN must not reach the sum.
    objective = torch.where(mask != 0, alpha * output_tensor, 0)
    *results, report = loss_func(objective, *args, **kwargs)
    return (*results, report_with_objective(report, stats, objective.detach(), mask))


def is_training(model: Any) -> bool:
    """Whether a loss will be differentiated; evaluation keeps the host's own cross-entropy."""
    return bool(model.training) and torch.is_grad_enabled()


def unwrap(model: Any) -> Any:
    """The model inside DDP and precision wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def data_group() -> ProcessGroup | None:
    """The DP x CP group over which Megatron averages its losses, if it has been set up."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return None
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _loss_mask(loss_func: Any, stats: TokenLoss) -> torch.Tensor:
    """The mask that the host's loss function was bound to, [b, s]; else all valid targets.

    Megatron-LM and Megatron-Bridge bind it as the first argument, others by the name loss_mask.
    """
    bound = [*getattr(loss_func, "args", ())[:1]]
    bound.append((getattr(loss_func, "keywords", None) or {}).get("loss_mask"))
    for mask in bound:
        if isinstance(mask, torch.Tensor) and mask.numel() == stats.loss.numel():
            return mask.view_as(stats.loss)
    return stats.valid
