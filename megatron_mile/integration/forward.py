"""From the hook's token statistics to Megatron's loss: mask, normaliser and report.

The hook runs deep in the model's forward; Megatron takes the loss from the function that
`forward_step` returns. `wrap_forward_step` opens a window around each forward step in which the
hook may leave its statistics, and wraps the returned function, which takes them out again.

In training the model's loss per token keeps the value of plain cross-entropy; only its gradient is
the objective's. So the job's own loss function runs once, on plain cross-entropy, and what it
reports is what it always reports. Which tokens count, and how much, is read off it by
differentiation: its loss is linear in the losses per token, so its gradient is its mask.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration.host import METHOD
from megatron_mile.integration.models import data_group, installed_config, unwrap
from megatron_mile.integration.refusals import refuse_unequal_microbatches
from megatron_mile.integration.telemetry import report_with_objective
from megatron_mile.loss import TokenLoss
from megatron_mile.ops import dispatch
from megatron_mile.ops.per_token import beside
from megatron_mile.parallel import ProcessGroup
from megatron_mile.parallel.tokens import start_normaliser

LossFunc = Callable[..., tuple[Any, ...]]


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


class _Objective(torch.autograd.Function):
    """The host's sum, 0-d, with the objective's value and alpha times its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        share: torch.Tensor,
        alpha: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """Return the value in the output's dtype, a tensor of its own: the host scales it."""
        ctx.save_for_backward(share, alpha)
        return value.to(output.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the share of each token in the loss, times alpha."""
        share, alpha = ctx.saved_tensors
        return grad * share * alpha, None, None, None


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

    def __init__(self) -> None:
        self.calls = 0
        """Losses computed so far, those of multi-token-prediction heads included."""
        self.heads_ran: bool | None = None
        """Whether the model's prediction heads have run; None where it has none to be watched."""
        self.trained: TrainedLoss | None = None
        self.normalised = Normalised()

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


@contextlib.contextmanager
def _open_window(model: Any) -> Iterator[Window]:
    """Open the window of one forward step of a model, which may run inside another."""
    global _current
    outer, window = _current, Window()
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
        A forward step of the same signature. Steps that are differentiated get alpha and the
        report keys; evaluation passes through untouched. The loss function's loss must be linear
        in the losses per token, as masks, sums and means are.
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
        model = _model_among(signature.bind(*args, **kwargs))
        with _open_window(model) as window:
            output, loss_func = forward_step(*args, **kwargs)
        if loss_func is None or _is_wrapped(loss_func, config):
            return output, loss_func
        return output, functools.partial(reduction, loss_func, window, model)

    wrapped.__megatron_mile__ = config  # type: ignore[attr-defined]
    return wrapped


def _is_wrapped(loss_func: Any, config: ObjectiveConfig) -> bool:
    """Whether a wrapped step inside this one has done the work.

    Raises:
        MileError: It did so for another objective.
    """
    reduction = getattr(loss_func, "func", None)
    if not isinstance(reduction, _Reduction):
        return False
    if reduction.config != config:
        raise MileError(
            f"a forward step wrapped for {reduction.config} runs inside one wrapped for {config}; "
            "give both the same"
        )
    return True


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
    """Lets the host reduce and report plain cross-entropy, and trains alpha * loss in its place."""

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
        if not _is_training(window, output_tensor) or kwargs.get("non_loss_data"):
            return loss_func(output_tensor, *args, **kwargs)
        stats = window.take(model, self.config, output_tensor)
        probe = _without_unowned(output_tensor.detach(), stats.entropy).requires_grad_()
        # A copy, because the host may work in place.
        loss, *count, report = _results(loss_func(probe.clone(), *args, **kwargs))
        share = _share(loss, probe)
        # A mean has divided the mask by its sum.
        largest_share = None if count else share.max().clamp(min=torch.finfo(share.dtype).tiny)
        mask = share if largest_share is None else share / largest_share
        sums = _sums(self.config, stats, mask)
        mask_sum, weights, losses, entropies, *distances, broken, negative = sums
        group = _alpha_group(model, self.config.alpha_mode)
        waiting = start_normaliser(sums[:2], self.config.alpha_mode, group)
        if not self.checked:
            _refuse_broken(broken, negative)
            self.checked = True
        has_other_leaves = _has_other_leaves(loss, probe)
        # Only now, because the ranks meet here. A later step in which something is broken ends in
        # NaN, because a look at it would wait for the device.
        alpha = waiting().masked_fill_(sums[-2:].any(), torch.nan)
        trained = alpha * losses
        value = trained if largest_share is None else trained * largest_share
        total = _Objective.apply(output_tensor, share, alpha, value)
        if has_other_leaves:
            total = total + (loss - (share * probe.detach()).sum())
        figures = [trained, entropies, weights, *distances]
        return (total, *count, report_with_objective(report, mask_sum, figures, model))


def differentiated(*tensors: Any) -> bool:
    """Whether what is made of these will be differentiated; all else keeps the host's own loss."""
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)


def _is_training(window: Window, output: Any) -> bool:
    return differentiated(output) or (torch.is_grad_enabled() and window.trained is not None)


def _without_unowned(nll: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """The losses with 0 in place of the NaN of targets that no shard held.

    Where the logits are NaN the entropy is too, so that those stay NaN.
    """
    finite = nll.nan_to_num(nan=0, posinf=torch.inf, neginf=-torch.inf)
    return finite.add_(entropy, alpha=0)


def _results(results: Any) -> tuple[Any, ...]:
    """What a loss function returned, if it has one of the forms that Megatron takes.

    Raises:
        MileError: It has another.
    """
    is_form = isinstance(results, (tuple, list)) and len(results) in (2, 3)
    if is_form and isinstance(results[0], torch.Tensor) and isinstance(results[-1], dict):
        return tuple(results)
    kinds = results if isinstance(results, (tuple, list)) else [results]
    raise MileError(
        f"the loss function returned ({', '.join(type(kind).__name__ for kind in kinds)}); "
        "expected (loss, num_tokens, report) or (loss, report), the loss a tensor and the report "
        "a dict"
    )


def _share(loss: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
    """How much each token's loss counts in the host's, [b, s]: the mask, divided by what it is.

    Raises:
        MileError: The host's loss is no number, or not linear in the losses per token.
    """
    if loss.numel() != 1 or not loss.requires_grad:
        what = f"of shape {tuple(loss.shape)}" if loss.requires_grad else "without a gradient"
        raise MileError(
            f"the loss function returned a loss {what}; expected one number made of the losses "
            "per token"
        )
    (share,) = torch.autograd.grad(loss, probe, create_graph=True, allow_unused=True)
    if share is None:
        raise MileError(
            "the loss function returned a loss that is not made of the losses per token that it "
            "was given; an objective cannot take their place"
        )
    if share.requires_grad:
        raise MileError(
            "the loss function is not linear in the losses per token (masks, sums and means are), "
            "so an objective cannot take their place; make it linear, or use --mile-objective none"
        )
    return share


def _has_other_leaves(loss: torch.Tensor, probe: torch.Tensor) -> bool:
    """Whether the host's loss also trains what is not its losses per token, as a loss it adds."""
    nodes: list[Any] = [loss.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", probe) is not probe:
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def _sums(config: ObjectiveConfig, stats: TokenLoss, mask: torch.Tensor) -> torch.Tensor:
    """What alpha and report need, in one pass over the tokens, fp64.

    Returns:
        Sums of the mask, and of weight, loss, entropy and, if there is one, distance times the
        mask; how many tokens that count have no target; how many count negatively.
    """
    statistics, _ = dispatch.select(config.backend, mask.device, mask.dtype)
    figures = [stats.weight, stats.loss.detach(), stats.entropy]
    figures += [] if stats.emo is None else [stats.emo]
    return beside(statistics).sum_up(mask, stats.valid, stats.nll, stats.entropy, figures)


def _refuse_broken(broken: torch.Tensor, negative: torch.Tensor) -> None:
    """Say once, in the first step, what later ends in NaN."""
    if negative:
        raise MileError(
            "the loss function weights a token negatively (an advantage, a penalty), and alpha is "
            "a mean over weights that are not; use weights >= 0, or --mile-objective none"
        )
    if broken:
        raise MileError(
            "a token that the loss function counts has no target: its label is -100 or outside "
            "the vocabulary; give such tokens loss mask 0"
        )


def _alpha_group(model: Any, normalize: str) -> ProcessGroup | None:
    """The ranks over which alpha is formed; None for this rank alone.

    Raises:
        MileError: There is no such group, or its ranks run other micro-batches.
    """
    if normalize not in ("global", "official"):
        return None
    refuse_unequal_microbatches(unwrap(model).config, normalize)
    return data_group(model)
