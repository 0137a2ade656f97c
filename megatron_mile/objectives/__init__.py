"""What is optimised, as pure functions of a token's statistics: a file for each objective.

A file NAME.py here with `OBJECTIVE = Objective(...)` is an objective: settings, flags, --help, the
checkpoint's comparison, start block and pictures follow from it. No kernel, no collective, no
configuration and nothing of Megatron may live here.
"""

import pkgutil
from importlib import import_module

from megatron_mile.objectives._objective import Mix, Objective, Setting

__all__ = ["NEED_COST", "NEED_INPUTS", "OBJECTIVES", "Mix", "Objective", "Setting"]


def _find() -> dict[str, Objective]:
    """Return what this folder's files define, by name, plain cross-entropy first."""
    files = (file.name for file in pkgutil.iter_modules(__path__))
    modules = [import_module(f"{__name__}.{name}") for name in files if not name.startswith("_")]
    found: list[Objective] = [module.OBJECTIVE for module in modules]
    found.sort(key=lambda objective: (not objective.is_cross_entropy, objective.name))
    return {objective.name: objective for objective in found}


OBJECTIVES = _find()
NEED_COST = tuple(name for name, objective in OBJECTIVES.items() if objective.needs_cost)
NEED_INPUTS = tuple(name for name, objective in OBJECTIVES.items() if objective.inputs)
