"""Plain cross-entropy: loss_t = nll_t, so that runs compare with the same code."""

from megatron_mile.objectives._objective import Objective

OBJECTIVE = Objective(name="ce", label="cross-entropy", equation="w = 1")
