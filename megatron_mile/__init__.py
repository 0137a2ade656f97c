"""megatron_mile: training objectives for Megatron, exact at every layout.

`token_loss`, `linear_token_loss`, `reduce_loss`, `load_objective` and `GammaSchedule` need torch
alone; `install`, `uninstall`, `attach`, `wrap_forward_step`, `set_token_weight` and
`wrap_finalize_model_grads` put them into a Megatron job and import it when first used.
"""

from importlib import import_module
from typing import Any

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows
from megatron_mile.linear import linear_token_loss
from megatron_mile.loss import TokenLoss, reduce_loss, token_loss
from megatron_mile.objective_file import load_objective
from megatron_mile.schedule import GammaSchedule

__version__ = "0.1.0"
__all__ = [
    "CostRows",
    "GammaSchedule",
    "ObjectiveConfig",
    "TokenLoss",
    "attach",
    "install",
    "linear_token_loss",
    "load_objective",
    "reduce_loss",
    "set_token_weight",
    "token_loss",
    "uninstall",
    "wrap_finalize_model_grads",
    "wrap_forward_step",
]


def __getattr__(name: str) -> Any:
    """Import the Megatron side only when one of its names is asked for."""
    homes = {"install": "hook", "uninstall": "hook", "attach": "hook"}
    homes |= {"wrap_forward_step": "forward", "set_token_weight": "window"}
    homes |= {"wrap_finalize_model_grads": "batch_alpha"}
    home = homes.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"megatron_mile.integration.{home}"), name)
