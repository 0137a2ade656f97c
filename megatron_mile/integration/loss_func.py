"""From the hook's token statistics to Megatron's loss: normaliser and report.

The hook runs deep in the model's forward; Megatron takes the loss from the function that
`forward_step` returns. `wrap_forward_step` opens a window around each forward step in which the
hook may leave its statistics, and wraps the returned function, which takes them out again.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.integration import versions
from megatron_mile.integration.errors import MileError
from megatron_mile.integration.models import data_group, unwrap
from megatron_mile.integration.telemetry import LM_LOSS, report_with_objective, token_count
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
        self.config: ObjectiveConfig | None = None

    def put(self, stats: TokenLoss, config: ObjectiveConfig) -> None:
        """Leave the statistics of this step's one main loss."""
        if self.stats is not None:
            raise MileError(
                "one forward step computed the language-model loss twice; megatron_mile weights "
                "one loss a step: run one model in each forward_step"
            )
        self.stats, self.config = stats, config
        if stats.loss.requires_grad:
            stats.loss.register_hook(self._refuse_unconsumed)

    def take(self, model: Any, config: ObjectiveConfig) -> TokenLoss:
        """Take them out, once, if they were made with the settings of the forward step."""
        stats, self.stats = self.stats, None
        if stats is None:
            raise MileError(
                f"objective not applied: {type(unwrap(model)).__name__} computed its loss without "
                "calling compute_language_model_loss as patched; use a GPTModel or HybridModel, "
                "or --mile-objective none"
            )
        if self.config != config:
            raise MileError(
                f"install or attach was given {self.config}, but wrap_forward_step {config}; give "
                "both the same"
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
    """Give a Megatron forward step the objective's normaliser and report; the last call holds.

    Args:
        forward_step: As handed to Megatron's `pretrain` or schedules: takes (data_iterator, model)
            and returns (output_tensor, loss_func), where output_tensor is the loss per token
            [b, s] on the last pipeline stage and loss_func turns it into
            (loss_sum, num_tokens, report) or (loss, report). It may take more, as Megatron-Bridge's
            (state, data_iterator, model): the model is the argument of that name, else the first
            that is a torch module.
        config: The objective that `install` or `attach` was given.

    Returns:
        A forward step of the same signature. Training steps get alpha and the report keys;
        evaluation passes through untouched.
    """
    earlier = getattr(forward_step, "__megatron_mile__", None)
    if earlier == config:
        return forward_step
    if earlier is not None:
        forward_step = forward_step.__wrapped__  # type: ignore[attr-defined]
    reduction = _Reduction(config)
    signature = inspect.signature(forward_step)

    @functools.wraps(forward_step)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _open_window() as window:
            output, loss_func = forward_step(*args, **kwargs)
        if loss_func is None:
            return output, loss_func
        model = _model_among(signature.bind(*args, **kwargs))
        return output, functools.partial(reduction, loss_func, window, model)

    wrapped.__megatron_mile__ = config  # type: ignore[attr-defined]
    return wrapped


def _model_among(given: inspect.BoundArguments) -> Any:
    """The model that a forward step was called with.

    Raises:
        MileError: There is none.
    """
    given.apply_defaults()  # also those that functools.partial has set
    named = {**given.arguments, **given.kwargs}
    if "model" in named:
        return named["model"]
    values = (*given.args, *given.kwargs.values())
    model = next((value for value in values if isinstance(value, torch.nn.Module)), None)
    if model is None:
        raise MileError(
            f"forward_step{given.signature} was called without a model; name that parameter model"
        )
    return model


class _Reduction:
    """Lets the host reduce, check and report alpha * loss, then adds the objective's figures."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.checked = False

    def __call__(
        self,
        loss_func: LossFunc,
        window: Window,
        model: Any,
        output_tensor: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Do what `loss_func(output_tensor)` does, with the objective where it is a training."""
        if not is_training(model) or kwargs.get("non_loss_data"):
            return loss_func(output_tensor, *args, **kwargs)
        stats = window.take(model, self.config)
        mask = _loss_mask(loss_func, stats)
        group = _alpha_group(model, self.config.alpha_mode)
        alpha = normaliser(stats.weight, mask * stats.valid, self.config.alpha_mode, group)
        # A masked token may hold a label that nobody owns: its NaN must not reach the sum.
        objective = torch.where(mask != 0, alpha * output_tensor, 0)
        *results, report = loss_func(objective, *args, **kwargs)
        full_report = report_with_objective(report, stats, objective.detach(), mask, model)
        if not self.checked:
            _check_count(token_count(full_report[LM_LOSS]), token_count(report.get(LM_LOSS)))
            self.checked = True
        return (*results, full_report)


def _check_count(ours: float | None, theirs: float | None) -> None:
    """Compare our mask with the number of tokens that the host counted, once, in the first step."""
    if ours is None or theirs is None:
        return
    if abs(ours - theirs) > 1:  # the host rounds a fractional mask
        raise MileError(
            f"the loss mask of {ours:g} tokens that was found is not the one of {theirs:g} tokens "
            "that the job's loss function uses: return functools.partial(loss_func, loss_mask) "
            "from forward_step"
        )


def is_training(model: Any) -> bool:
    """Whether a loss will be differentiated; evaluation keeps the host's own cross-entropy."""
    return bool(model.training) and torch.is_grad_enabled()


def _alpha_group(model: Any, normalize: str) -> ProcessGroup | None:
    """The ranks over which alpha is formed; None for this rank alone.

    Raises:
        MileError: There is no such group, or its ranks run other micro-batches.
    """
    if normalize not in ("global", "official"):
        return None
    settings = unwrap(model).config
    if any(getattr(settings, name, False) for name in versions.UNEQUAL_MICROBATCHES):
        raise MileError(
            f"normalize {normalize} cannot be combined with hybrid context parallel: ranks may run "
            "different numbers of micro-batches; use local or none"
        )
    if (getattr(settings, "gtp_weight_remat_size", 1) or 1) > 1:
        raise MileError(
            f"normalize {normalize} cannot be combined with GTP weight rematerialisation: Megatron "
            "counts tokens over another group; use local or none"
        )
    return data_group(model)


def _loss_mask(loss_func: Any, stats: TokenLoss) -> torch.Tensor:
    """The mask that the host's loss function was bound to, [b, s]; else all valid targets.

    Megatron-LM and Megatron-Bridge bind it as the first argument, others by the name loss_mask.
    """
    bound = [(getattr(loss_func, "keywords", None) or {}).get("loss_mask")]
    bound += getattr(loss_func, "args", ())[:1]
    for mask in bound:
        if isinstance(mask, torch.Tensor) and mask.numel() == stats.loss.numel():
            return mask.view_as(stats.loss)
    return stats.valid
