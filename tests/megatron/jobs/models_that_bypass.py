"""Pretrain with a model that the objective cannot reach: `... --bypass KIND [the job's flags]`.

The kinds: own-method overrides the patched method, own-forward never calls it, gathered collects
the logits of all tensor-parallel ranks.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.training.models import gpt


class OwnMethod(GPTModel):
    """Computes its loss in a method of its own under the patched name."""

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        return super().compute_language_model_loss(labels, logits)


class OwnForward(GPTModel):
    """Computes its loss in forward, from its logits."""

    def forward(self, *inputs: Any, labels: torch.Tensor, **others: Any) -> torch.Tensor:
        logits = super().forward(*inputs, **others)
        return torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")


class Gathered(GPTModel):
    """Has all of the vocabulary on each rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "parallel_output": False})


MODELS = {"own-method": OwnMethod, "own-forward": OwnForward, "gathered": Gathered}

if __name__ == "__main__":
    at = sys.argv.index("--bypass")
    gpt.GPTModel = MODELS[sys.argv[at + 1]]
    del sys.argv[at : at + 2]
    script = Path(__file__).resolve().parents[3] / "examples" / "pretrain_gpt.py"
    runpy.run_path(str(script), run_name="__main__")
