"""The objective's settings: one frozen dataclass, checked when it is made.

The text of a setting stands once, in its `Setting`: those of one objective in its file in
`objectives`, the others here. Fields, docstring and command-line flags are built from them.
"""

import dataclasses
import math
import numbers
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from megatron_mile.objectives import OBJECTIVES, Objective, Setting
from megatron_mile.ops.blocks import Extras
from megatron_mile.ops.token_stats import Wanted

T = TypeVar("T")


def _used_by(setting: Setting) -> str:
    """Name the objectives that a setting makes a difference to."""
    return ", ".join(name for name in OBJECTIVES if setting.name in defining_settings(name))


def defining_settings(objective: str) -> list[str]:
    """Name the settings that an objective is made of; others may change between two runs of it."""
    definition = OBJECTIVES[objective]
    names = [setting.name for setting in definition.settings]
    names += [] if definition.weight is None else ["normalize"]
    names += [] if definition.weight_slope is None else ["entropy_grad"]
    return [*names, *taken_by(definition)]


def taken_by(objective: Objective) -> tuple[str, ...]:
    """Name what of `ADDED` an objective takes: smoothing is of nll, so not of another value."""
    if objective.needs_cost:
        return ()
    return tuple(ADDED) if objective.value is None else ("z_loss",)


def _equation(objective: Objective) -> str:
    paper = f" ({objective.paper})" if objective.paper else ""
    return f"{objective.name} {objective.equation}{paper}"


_DEFAULT = "mile"
_FIRST = Setting(
    "objective",
    _DEFAULT,
    "weight w of a token's cross-entropy: " + "; ".join(map(_equation, OBJECTIVES.values())),
    choices=tuple(OBJECTIVES),
)
_COMMON = (
    Setting(
        "normalize",
        "global",
        "alpha, which keeps the weighted loss comparable with cross-entropy: global one mean "
        "weight over the micro-batch on all data- and context-parallel ranks, local over this "
        "rank's micro-batch, none alpha = 1, official the mean over ranks of each rank's 1 / mean "
        "weight as in the MiLe authors' code, batch one mean weight over the whole global batch, "
        "with --calculate-per-token-loss; the others are formed anew in each micro-batch, so that "
        "but with batch and none the objective depends on micro-batch and data-parallel size",
        choices=("global", "local", "none", "official", "batch"),
    ),
    Setting(
        "entropy_grad",
        False,
        "let the gradient flow through the entropy in the weight instead of holding the "
        "weight constant",
    ),
    Setting(
        "backend",
        "auto",
        "implementation of the token statistics: auto the fastest that runs here, torch plain "
        "PyTorch, triton the Triton kernel",
        choices=("auto", "torch", "triton"),
    ),
)
_ADDED = (
    Setting(
        "label_smoothing",
        0.0,
        "part eps of the target's probability that is spread evenly over the vocabulary, no unit, "
        ">= 0 and < 1: (1 - eps) nll + (eps / V) sum_k (ln sum_j e^z_j - z_k) takes the place of "
        "nll, as in torch's cross_entropy; weight, alpha and entropy stay as they are; 0 is none",
        high=1.0,
        below=True,
        shown=lambda eps: f"label smoothing {eps:g}" if eps else "",
    ),
    Setting(
        "z_loss",
        0.0,
        "factor c of the term c (ln sum_k e^z_k)^2 that is added to the loss of each token, beside "
        "weight and alpha; no unit, >= 0, such as 1e-4; 0 is none",
        shown=lambda c: f"z-loss {c:g}" if c else "",
    ),
)
ADDED = {setting.name: setting for setting in _ADDED}
"""Settings of what is added to the loss, where the objective takes it."""
# The default objective's own come before the common ones, those of the others behind them.
_OWN = [setting for objective in OBJECTIVES.values() for setting in objective.settings]
SETTINGS = [*dict.fromkeys([_FIRST, *OBJECTIVES[_DEFAULT].settings, *_COMMON, *_OWN, *_ADDED])]


def _field(setting: Setting) -> tuple[str, type, Any]:
    """Return a dataclass field whose metadata holds the text ("help") and the legal names."""
    metadata: dict[str, Any] = {"help": setting.text}
    if users := _used_by(setting):
        metadata["help"] += f"; used by {users}"
    if setting.choices is not None:
        metadata["choices"] = setting.choices
    field = dataclasses.field(default=setting.default, metadata=metadata)
    return setting.name, type(setting.default), field


def _with_settings(base: type[T]) -> type[T]:
    """Return a frozen dataclass of the settings, with the methods of `base` and its docstring."""
    made = dataclasses.make_dataclass(
        base.__name__, map(_field, SETTINGS), bases=(base,), frozen=True
    )
    made.__module__ = base.__module__
    texts = map(_attribute, dataclasses.fields(made))
    made.__doc__ = f"{base.__doc__}\n    Attributes:\n" + "\n".join(texts)
    return made


def _attribute(field: "dataclasses.Field[Any]") -> str:
    """Return the field's entry of the class docstring, folded to 100 columns."""
    text = f"{field.name} (default {field.default!r}): {field.metadata['help']}."
    return textwrap.fill(
        text, 100, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False
    )


@_with_settings
class ObjectiveConfig:
    """What is optimised: loss_t = alpha * w(nll_t, H_t) * nll_t or EMO, and with which backend.

    Raises:
        ValueError: A number is out of its range, a name is unknown, entropy_grad is asked for where
            the weight's slope has no bound, or label smoothing or z-loss is given to an objective
            that takes none.
    """

    objective: str
    normalize: str
    entropy_grad: bool
    backend: str

    if TYPE_CHECKING:  # the objectives' own settings, whatever files there are
        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, objective: str = _DEFAULT, *values: Any, **settings: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        """Check every setting, then the objective's own together."""
        for setting in SETTINGS:
            value = _checked(setting, getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
        self._refuse_added()
        if self.definition.check is not None:
            self.definition.check(**self.own)
        if self.entropy_slope is not None and self.definition.check_slope is not None:
            self.definition.check_slope(**self.own)

    def _refuse_added(self) -> None:
        """Raise ValueError where something is added to an objective that takes nothing."""
        if self.z_loss and self.alpha_mode == "batch":
            raise ValueError(
                f"z_loss={self.z_loss:g} with normalize=batch, which would divide it by the sum of "
                "weights; use another normalize, or leave it out"
            )
        given = [name for name in ADDED if getattr(self, name)]
        refused = [name for name in given if name not in taken_by(self.definition)]
        if refused:
            said = " and ".join(f"{name}={getattr(self, name):g}" for name in refused)
            others = (x.name for x in OBJECTIVES.values() if set(given) <= set(taken_by(x)))
            raise ValueError(
                f"{said} with objective {self.objective}, which takes no such term; leave it out, "
                f"or use {', '.join(others)}"
            )

    @property
    def definition(self) -> Objective:
        """What the objective is."""
        return OBJECTIVES[self.objective]

    @property
    def own(self) -> dict[str, Any]:
        """The objective's own settings, as its functions take them."""
        return {setting.name: getattr(self, setting.name) for setting in self.definition.settings}

    @property
    def alpha_mode(self) -> str:
        """How alpha is formed: `normalize`, or none where it is 1 anyway."""
        return "none" if self.definition.weight is None else self.normalize

    @property
    def wanted(self) -> Wanted:
        """The token statistics beyond the four that the loss is made of."""
        return Wanted(bool(self.label_smoothing), self.definition.needs_squares)

    @property
    def extras(self) -> Extras:
        """What is added to w * nll."""
        return Extras(self.label_smoothing, self.z_loss)

    @property
    def entropy_slope(self) -> Callable[..., torch.Tensor] | None:
        """The weight's slope in the entropy if the gradient flows through it, else None."""
        return self.definition.weight_slope if self.entropy_grad else None


def _checked(setting: Setting, value: Any) -> Any:
    """Return a setting's value as it is kept.

    Raises:
        ValueError: It is of another kind, or out of range.
    """
    if setting is _FIRST:  # which `load_objective` may have added to
        return _name(setting.name, value, tuple(OBJECTIVES))
    if setting.choices is not None:
        return _name(setting.name, value, setting.choices)
    if isinstance(setting.default, bool):
        return _switch(setting.name, value)
    return _number(setting, value)


def _name(name: str, value: Any, choices: tuple[str, ...]) -> str:
    text = str(value) if type(value) is int else value  # some modes are called 1 and 2
    if not isinstance(text, str) or text not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    return text


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected True or False")
    return value


def _number(setting: Setting, value: Any) -> float:
    """Return `value` as a plain float, so that stored settings compare and print alike."""
    # bool is a subclass of int, and gamma=True is a mistake rather than 1.
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not setting.holds(value):
        sign = "<" if setting.below else "<="
        end = "" if setting.high == math.inf else f" and {sign} {setting.high:g}"
        raise ValueError(
            f"{setting.name} is {value!r}; expected a finite number >= {setting.low:g}{end}, "
            f"such as {setting.default}"
        )
    return float(value)
