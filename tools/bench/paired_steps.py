"""One rank of tools/bench/train_step.py: examples/pretrain_gpt.py, hooked in half of its steps.

    torchrun ... tools/bench/paired_steps.py RESULT KINDS [flags of examples/pretrain_gpt.py]

KINDS are the steps in their order, "host" or "hook", with commas between. RESULT is a JSON file
that rank 0 writes once all have been made: `steps` (`kind`, `seconds` of the slowest rank, and the
figures that Megatron reports), `model` (what Megatron took from the flags) and `threads`.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist

from megatron_mile import install, uninstall
from megatron_mile.launch import one_line_errors, prepare

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pretrain_gpt.py"


class PairedSteps:
    """Megatron's `train_step`, timed, each with the loss of its kind."""

    def __init__(self, host: Callable[..., Any], kinds: Sequence[str], result: Path) -> None:
        self.host, self.kinds, self.result = host, kinds, result
        self.steps: list[dict[str, Any]] = []

    def __call__(self, forward_step: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the next step; `forward_step` is the one that `prepare` has wrapped."""
        kind = self.kinds[len(self.steps)]
        if kind == "hook":
            install(forward_step.__megatron_mile__)
        else:
            uninstall()
            forward_step = forward_step.__wrapped__
        torch.cuda.synchronize()  # nothing where Megatron runs on CPUs
        dist.barrier()
        start = time.perf_counter()
        outcome = self.host(forward_step, *args, **kwargs)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        report = {key: value.item() for key, value in outcome[0].items()}
        if ("mile loss" in report) != (kind == "hook"):
            raise RuntimeError(f"a step meant for the {kind}'s loss reported {', '.join(report)}")
        self.steps.append({"kind": kind, "seconds": seconds, **report})
        if len(self.steps) == len(self.kinds):
            self._write()
        return outcome

    def _write(self) -> None:
        """Take the slowest rank's times, and let rank 0 write the result."""
        from megatron.training import get_args

        seconds = torch.tensor([step["seconds"] for step in self.steps], device="cuda")
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        for step, slowest in zip(self.steps, seconds.tolist(), strict=True):
            step["seconds"] = slowest
        args = get_args()
        model = {"layers": args.num_layers, "hidden": args.hidden_size}
        model |= {"tokens": args.seq_length * args.global_batch_size}
        model |= {"vocab": args.padded_vocab_size, "tp": args.tensor_model_parallel_size}
        model |= {"precision": "bf16" if args.bf16 else "fp32"}
        content = {"steps": self.steps, "model": model, "threads": torch.get_num_threads()}
        if dist.get_rank() == 0:
            self.result.write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    """Do what the launcher does, with `train_step` replaced before the script begins."""
    _, result, kinds, *arguments = sys.argv
    with one_line_errors():
        prepare(arguments)  # before the first import of megatron
        from megatron.training import training

        training.train_step = PairedSteps(training.train_step, kinds.split(","), Path(result))
        sys.argv = [str(SCRIPT), *arguments]
        sys.path[0] = str(SCRIPT.parent)
        runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()
