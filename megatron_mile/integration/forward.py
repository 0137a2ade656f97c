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

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration.batch_alpha import BATCH, keep_weights
from megatron_mile.integration.models import data_group, unwrap
from megatron_mile.integration.refusals import refuse_unequal_microbatches
from megatron_mile.integration.telemetry import Report, report_with_objective
from megatron_mile.integration.token_frequencies import BUCKETS
from megatron_mile.integration.window import Window, differentiated, open_window
from megatron_mile.loss import TokenLoss
from megatron_mile.ops import dispatch
from megatron_mile.ops.per_token import beside
from megatron_mile.parallel import ProcessGroup
from megatron_mile.parallel.tokens import masked, start_normaliser, sum_by_group

LossFunc = Callable[..., tuple[Any, ...]]


class _Objective(torch.autograd.Function):
    """The host's sum, 0-d, with the objective's value and alpha times its gradient.

    The z-loss, if there is one, gets a gradient without alpha.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        share: torch.Tensor,
        alpha: torch.Tensor,
        value: torch.Tensor,
        z_loss: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the value in the output's dtype, a tensor of its own: the host scales it."""
        ctx.save_for_backward(share, alpha)
        return value.to(output.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the share of each token in the loss, times alpha."""
        share, alpha = ctx.saved_tensors
        each = grad * share
        return each * alpha, None, None, None, each if ctx.needs_input_grad[4] else None


def wrap_forward_step(
    forward_step: Callable[..., Any], config: ObjectiveConfig, report: str | None = None
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
        report: Which figures of ours are reported, with commas between, of loss, entropy, weight,
            accuracy, emo, z loss and gamma; None for all but accuracy. Entropy and accuracy that
            are named are reported in evaluation too, which then reads the logits once more.

    Returns:
        A forward step of the same signature. Steps that are differentiated get alpha and the
        report keys; evaluation passes through untouched, but for what was asked to be reported.
        The loss function's loss must be linear in the losses per token, as masks, sums and means
        are.
    """
    figures = Report.of(report, config)
    earlier = getattr(forward_step, "__megatron_mile__", None)
    if earlier == config and forward_step.__megatron_mile_report__ == figures:  # type: ignore[attr-defined]
        return forward_step
    if earlier is not None:
        forward_step = forward_step.__wrapped__  # type: ignore[attr-defined]
    reduction = _Reduction(config)
    signature = inspect.signature(forward_step)

    @functools.wraps(forward_step)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        model = _model_among(signature.bind(*args, **kwargs))
        with open_window(model, figures) as window:
            output, loss_func = forward_step(*args, **kwargs)
        if loss_func is None:
            return output, loss_func
        if _is_wrapped(loss_func, config):
            window.refuse_unused_weight()
            return output, loss_func
        return output, functools.partial(reduction, loss_func, window, model)

    wrapped.__megatron_mile__ = config  # type: ignore[attr-defined]
    wrapped.__megatron_mile_report__ = figures  # type: ignore[attr-defined]
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
        if kwargs.get("non_loss_data"):
            return loss_func(output_tensor, *args, **kwargs)
        if not _is_training(window, output_tensor):
            return _evaluate(loss_func, window, model, output_tensor, *args, **kwargs)
        stats = window.take(model, self.config, output_tensor)
        probe = _without_unowned(output_tensor.detach(), stats.entropy).requires_grad_()
        # A copy, because the host may work in place.
        loss, *count, report = _results(loss_func(probe.clone(), *args, **kwargs))
        share = _share(loss, probe)
        largest_share = _largest_share(share, bool(count))
        mask = share if largest_share is None else share / largest_share
        sums = _sums(self.config, stats, mask)
        mask_sum, *reported, broken, negative = sums
        named = dict(zip(_figures(stats), reported, strict=True))
        mode = stats.alpha_mode(self.config)
        group = _alpha_group(model, mode)
        waiting = start_normaliser(sums[:2], "none" if mode == BATCH else mode, group)
        if not self.checked:
            _refuse_broken(broken, negative)
            _refuse_negative(stats.token_weight)
            self.checked = True
        has_other_leaves = _has_other_leaves(loss, probe)
        if mode == BATCH:
            _refuse_outside_batch(self.config, count, has_other_leaves)
            keep_weights(model, self.config, named["weight"])
        # Only now, because the ranks meet here. A later step in which something is broken ends in
        # NaN, because a look at it would wait for the device.
        alpha = waiting().masked_fill_(sums[-2:].any(), torch.nan)
        trained = alpha * named["loss"]
        if stats.z_loss is not None:
            trained = trained + named["z loss"]
        named["loss"] = trained
        value = trained if largest_share is None else trained * largest_share
        total = _Objective.apply(output_tensor, share, alpha, value, stats.z_loss)
        if has_other_leaves:
            total = total + (loss - (share * probe.detach()).sum())
        counts = {"loss": named["weight"]} if mode == BATCH else {}
        given = {name: (figure, counts.get(name, mask_sum)) for name, figure in named.items()}
        if window.gamma is not None:
            given["gamma"] = window.gamma.double(), torch.ones_like(mask_sum)
        figures = {name: given[name] for name in window.report.trained if name in given}
        buckets = _bucket_sums(window, probe.detach(), mask)
        return (total, *count, report_with_objective(report, figures, model, buckets))


def _evaluate(
    loss_func: LossFunc, window: Window, model: Any, output: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Do what `loss_func(output)` does where nothing is trained, and report the buckets' losses.

    The loss function runs once, on the host's own losses per token; its mask is read as in a
    training step.
    """
    stats = window.evaluated
    if window.buckets is None and stats is None:
        return loss_func(output, *args, **kwargs)
    probe = output.detach().requires_grad_()
    with torch.enable_grad():
        loss, *count, report = _results(loss_func(probe.clone(), *args, **kwargs))
        share = _share(loss, probe)
    largest = _largest_share(share, bool(count))
    mask = share if largest is None else share / largest
    report = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in report.items()}
    buckets = _bucket_sums(window, output.detach(), mask)
    given = {} if stats is None else _figures(stats)
    count_of_all = mask.double().sum()
    figures = {
        name: (masked(given[name], mask).sum(), count_of_all)
        for name in window.report.evaluated
        if name in given
    }
    report = report_with_objective(report, figures, model, buckets)
    return (loss.detach(), *count, report)


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


def _largest_share(share: torch.Tensor, is_sum: bool) -> torch.Tensor | None:
    """What makes shares a mask again where the loss is a mean, which has divided it; else None."""
    return None if is_sum else share.max().clamp(min=torch.finfo(share.dtype).tiny)


def _bucket_sums(window: Window, nll: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    """Return (sum of nll, count) of each bucket, fp64 [3, 2]; None where nobody asked."""
    if window.buckets is None:
        return None
    return sum_by_group(nll, mask, window.buckets, len(BUCKETS))


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
        Sums of the mask, and of what `_figures` gives times the mask; how many tokens that count
        have no target; how many count negatively.
    """
    statistics, _ = dispatch.select(config.backend, mask.device, mask.dtype)
    figures = [*_figures(stats).values()]
    return beside(statistics).sum_up(mask, stats.valid, stats.nll, stats.entropy, figures)


def _figures(stats: TokenLoss) -> dict[str, torch.Tensor]:
    """What there is to be reported, per token; weight and loss, which alpha needs, first."""
    figures = {"weight": stats.weight, "loss": stats.loss.detach(), "entropy": stats.entropy}
    further = {"emo": stats.emo, "z loss": stats.z_loss, "accuracy": stats.accuracy}
    return figures | {name: x.detach() for name, x in further.items() if x is not None}


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


def _refuse_negative(token_weight: torch.Tensor | None) -> None:
    """Say once, in the first step, what later makes the loss NaN."""
    if token_weight is not None and not (token_weight >= 0).all():
        raise MileError("set_token_weight: a weight is negative or NaN; expected weights >= 0")


def _refuse_outside_batch(
    config: ObjectiveConfig, count: Sequence[Any], has_other_leaves: bool
) -> None:
    """Stop a loss function whose sum, or a part of it, is not to be divided by the weights."""
    if config.alpha_mode != BATCH:
        same = "mile with gamma 0, which is the same, or " * config.definition.is_cross_entropy
        raise MileError(
            f"normalize batch with weights of tokens and the objective {config.objective}, whose "
            f"own weight is 1; use {same}another normalize"
        )
    if not count:
        raise MileError(
            "normalize batch, but the loss function returned (loss, report), a mean; return "
            "(loss_sum, num_tokens, report), or use another normalize"
        )
    if has_other_leaves:
        raise MileError(
            "normalize batch, but the loss function adds a loss that is not made of the losses per "
            "token, and the sum of weights would divide it too; use another normalize"
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
