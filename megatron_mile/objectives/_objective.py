"""What an objective is: one `Objective`, made in a file of its own beside this one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a user may set: a field of `ObjectiveConfig`, a flag, a line of --help.

    The kind of the default is the kind of the setting: a number, a switch, or with `choices` a
    name.
    """

    name: str
    default: float | bool | str
    text: str
    """What it means, a number with its unit and range, for docstring and --help."""
    choices: tuple[str, ...] | None = None
    low: float = 0.0
    high: float = math.inf
    below: bool = False
    """A number must be below `high`, which is else legal itself."""
    shown: Callable[[Any], str] | None = None
    """How the start block says its value, "" for nothing; None for its name and value."""

    def holds(self, number: float) -> bool:
        """Return whether a number is in the range."""
        return self.low <= number and (number < self.high if self.below else number <= self.high)

    def describe(self, value: Any) -> str:
        """Return what the start block says of a value."""
        return f"{self.name} {value}" if self.shown is None else self.shown(value)


class Mix(NamedTuple):
    """The loss and how its gradient is made of those of nll and distance; all of one shape."""

    loss: torch.Tensor
    of_nll: torch.Tensor
    """Factor of the gradient of nll."""
    of_distance: torch.Tensor
    """Factor of the gradient of the distance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is optimised: loss_t = alpha * w_t * nll_t, or a mix of nll and distance.

    nll and entropy H are floating tensors of one shape, in nats and >= 0; all functions are
    element-wise, return that shape and dtype, and take the objective's own settings by name.
    """

    name: str
    label: str
    """How pictures name it."""
    equation: str
    """What it is, for --help, where its name stands before."""
    paper: str = ""
    settings: tuple[Setting, ...] = ()
    """Its own; the same object where another objective has it too."""
    inputs: tuple[str, ...] = ()
    """What its functions take by name beside settings: a number for each token, from the job."""
    weight: Callable[..., torch.Tensor] | None = None
    """(nll, H, settings) -> w; None where it is 1 for every token, so that alpha is 1 too."""
    weight_slope: Callable[..., torch.Tensor] | None = None
    """(nll, H, settings) -> dw/dH; None where the weight does not contain the entropy."""
    value: Callable[..., torch.Tensor] | None = None
    """(nll, H, settings) -> the loss of a token, whose slope in nll is w; None where it is w * nll
    with w held constant. Not beside a slope, which is that of w * nll."""
    check: Callable[..., None] | None = None
    """(settings) -> None; raises ValueError where fp32 cannot hold a weight or many of them."""
    check_slope: Callable[..., None] | None = None
    """(settings) -> None; raises ValueError where the slope has no bound."""
    needs_squares: bool = False
    """Whether the functions take `squares`, sum_k p_k^2 of the model's distribution, in (0, 1]."""
    mix: Callable[..., Mix] | None = None
    """(nll, distance, settings) -> Mix; None for an objective that is a weight alone."""

    @property
    def is_cross_entropy(self) -> bool:
        """Whether it is plain cross-entropy, as the host's own loss."""
        return self.weight is None and self.mix is None

    @property
    def needs_cost(self) -> bool:
        """Whether it needs cost rows, and with them the logits twice."""
        return self.mix is not None


GAMMA = Setting(
    "gamma",
    1.0,
    "exponent of the weight, no unit, >= 0; 0 is plain cross-entropy",
    shown="gamma {:g}".format,
)
