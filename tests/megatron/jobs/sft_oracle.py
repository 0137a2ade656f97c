"""Run examples/pretrain_gpt.py --sft, and say what its first step's figures are in float64.

Each conversation goes through the model on its own, which must be what it goes through in a packed
sequence, and the tokens that count are found in the text: those that the assistant says. Leaves
{"lm loss", "mile loss", "tokens", "all"} in expected.json of the run's folder, its last argument.
"""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support import conversations, helpers

from megatron_mile import ObjectiveConfig
from megatron_mile.launch import prepare_script

ROOT = Path(__file__).resolve().parents[3]
PADDING = conversations.VOCABULARY["<SPECIAL_233>"]
ASSISTANT = conversations.VOCABULARY["Assistant"]
MICRO_BATCHES = 2


class Oracle:
    """Sums over the micro-batches of the first step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums = dict.fromkeys(("lm loss", "mile loss", "tokens", "all"), 0.0)
        self.left = MICRO_BATCHES

    def add(self, model: Any, batch: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch; the last one writes the means."""
        truths = [self._alone(model, words) for words in conversations.split(batch, PADDING)]
        nll, weight = (torch.cat(parts) for parts in zip(*truths, strict=True))
        alpha = len(weight) / weight.sum()
        self.sums["lm loss"] += nll.sum().item()
        self.sums["mile loss"] += (alpha * weight * nll).sum().item()
        self.sums["tokens"] += len(nll)
        self.sums["all"] += batch["tokens"].numel()
        self.left -= 1
        if not self.left:
            means = {
                name: self.sums[name] / self.sums["tokens"] for name in ("lm loss", "mile loss")
            }
            self.path.write_text(json.dumps(self.sums | means))

    @staticmethod
    def _alone(model: Any, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and weight of each token that the assistant says, of one conversation."""
        from megatron.training import get_args

        args = get_args()
        with torch.no_grad():
            logits = model(words[None], torch.arange(len(words))[None], None)[0]
        config = ObjectiveConfig("mile", args.mile_gamma, args.mile_sigma)
        truth = helpers.oracle(logits[:-1], words[1:], config)
        said = slice(words.tolist().index(ASSISTANT), None)
        return truth.nll[said], truth.weight[said]


def watched(host: Callable[..., Any], oracle: Oracle) -> Callable[..., Any]:
    """Megatron's `pretrain`, with a forward step whose batches the oracle sees first."""

    def pretrain(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(host).bind(*args, **kwargs)
        step = bound.arguments["forward_step_func"]

        def forward_step(iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> Any:
            batch = next(iterator)
            if oracle.left:
                oracle.add(model, batch)
            return step(iter([batch]), model)

        bound.arguments["forward_step_func"] = forward_step
        return host(*bound.args, **bound.kwargs)

    return pretrain


if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    prepare_script()
    import megatron.training

    megatron.training.pretrain = watched(
        megatron.training.pretrain, Oracle(folder / "expected.json")
    )
    runpy.run_path(str(ROOT / "examples" / "pretrain_gpt.py"), run_name="__main__")
