"""The objective's settings: one frozen dataclass, checked when it is made.

The text of a setting stands once, in its field's metadata; the class docstring below and the
command-line flags are built from it. A new setting is one more field here.
"""

import dataclasses
import math
import numbers
import textwrap
from typing import Any

from megatron_mile.objectives import OBJECTIVES, UNWEIGHTED
from megatron_mile.objectives.emo import MODES


def _setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """Return a dataclass field whose metadata holds its text ("help") and its legal names."""
    metadata: dict[str, Any] = {"help": text}
    if choices is not None:
        metadata["choices"] = choices
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised: loss_t = alpha * w(nll_t, H_t) * nll_t or EMO, and with which backend.

    Raises:
        ValueError: A number is not finite or is negative, a name is unknown, or entropy_grad is
            asked for where the weight's slope has no bound.
    """

    objective: str = _setting(
        "mile",
        "weight w of a token's cross-entropy: ce w = 1; mile w = (sigma + H)^gamma with H the "
        "entropy of the model's distribution in nats; focal w = (1 - p_y)^gamma with p_y the "
        "target's probability; emo w = 1, and cross-entropy is mixed with the distance of the "
        "model's distribution from the target in an embedding",
        choices=tuple(OBJECTIVES),
    )
    gamma: float = _setting(
        1.0, "exponent of the weight, no unit, >= 0; 0 is plain cross-entropy, unused by ce and emo"
    )
    sigma: float = _setting(
        1.0, "added to the entropy in the mile weight, nats, >= 0; used by mile alone"
    )
    normalize: str = _setting(
        "global",
        "alpha, which keeps the weighted loss comparable with cross-entropy: global one mean "
        "weight over the micro-batch on all data- and context-parallel ranks, local over this "
        "rank's micro-batch, none alpha = 1, official the mean over ranks of each rank's 1 / mean "
        "weight as in the MiLe authors' code",
        choices=("global", "local", "none", "official"),
    )
    entropy_grad: bool = _setting(
        False,
        "let the gradient flow through the entropy in the mile weight instead of holding the "
        "weight constant; no effect with the others, whose weights do not contain the entropy",
    )
    backend: str = _setting(
        "auto",
        "implementation of the token statistics: auto the fastest that runs here, torch plain "
        "PyTorch, triton the Triton kernel",
        choices=("auto", "torch", "triton"),
    )
    emo_mode: str = _setting(
        "1",
        "how emo mixes nll and distance D, ratios held constant: 1 (nll + (nll / D) D) / 2, of the "
        "value of nll; 2 (D / nll) nll + D; alone D",
        choices=MODES,
    )
    emo_gt_q: bool = _setting(
        False,
        "take D + p_y for D in modes 1 and 2 of emo, with the gradient of D alone, as the authors' "
        "emo_patch.py since 2023-11-21",
    )
    emo_cap: float = _setting(
        0.0,
        "largest ratio nll / D in mode 1 of emo, no unit, >= 0; 0 is no cap, 3 that of the "
        "authors' package EMOLoss 0.0.3",
    )

    def __post_init__(self) -> None:
        """Check every field by the kind of its default, then the fields together."""
        if type(self.emo_mode) is int:
            object.__setattr__(self, "emo_mode", str(self.emo_mode))
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if "choices" in setting.metadata:
                _check_name(setting.name, value, setting.metadata["choices"])
            elif isinstance(setting.default, bool):
                _check_switch(setting.name, value)
            else:
                # A plain float, so that stored settings compare and print alike.
                object.__setattr__(self, setting.name, _number(setting.name, value))
        if (
            self.objective == "mile"
            and self.entropy_grad
            and self.sigma == 0
            and 0 < self.gamma < 1
        ):
            raise ValueError(
                f"entropy_grad=True with sigma=0 and gamma={self.gamma}: the weight's slope has no "
                "bound at zero entropy; use sigma > 0, gamma >= 1, or entropy_grad=False"
            )

    @property
    def alpha_mode(self) -> str:
        """How alpha is formed: `normalize`, or none where it is 1 anyway."""
        return "none" if self.objective in UNWEIGHTED else self.normalize


def _check_name(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected True or False")


def _number(name: str, value: Any) -> float:
    """Return `value` as a float, or raise ValueError if it is no finite number >= 0."""
    # bool is a subclass of int, and gamma=True is a mistake rather than 1.
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}; expected a finite number >= 0, such as 1.0")
    return float(value)


def _attribute(setting: "dataclasses.Field[Any]") -> str:
    """Return the setting's entry of the class docstring, folded to 100 columns."""
    text = f"{setting.name} (default {setting.default!r}): {setting.metadata['help']}."
    return textwrap.fill(
        text, 100, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False
    )


ObjectiveConfig.__doc__ = f"{ObjectiveConfig.__doc__}\n    Attributes:\n" + "\n".join(
    _attribute(setting) for setting in dataclasses.fields(ObjectiveConfig)
)
