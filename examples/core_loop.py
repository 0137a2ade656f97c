"""A training loop on megatron.core alone, with the objective: three lines of it are ours.

    torchrun --nproc-per-node 2 examples/core_loop.py --tensor-model-parallel-size 2 --cpu

For users of Megatron-Core who have a loop of their own, without megatron.training. The text is the
bytes of Python's standard library, and each byte is a token.
"""

from __future__ import annotations

import argparse
import functools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for a clone that is not installed
from megatron_mile import ObjectiveConfig, attach, wrap_forward_step

BATCH, LENGTH, VOCABULARY = 8, 64, 256


def batches(rank: int) -> Iterator[torch.Tensor]:
    """Draw [BATCH, LENGTH + 1] bytes from the library's sources, another stream on each DP rank."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(rank)
    while True:
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(LENGTH + 1)].long()


def forward_step(data_iterator: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    """One micro-batch: the loss per token [b, s], and what reduces it, as in pretrain_gpt.py."""
    text = next(data_iterator).to(torch.cuda.current_device())
    positions = torch.arange(LENGTH, device=text.device).expand(BATCH, LENGTH)
    later = torch.ones(LENGTH, LENGTH, device=text.device).triu(1).bool()[None, None]
    output = model(text[:, :-1], positions, later, labels=text[:, 1:].contiguous())
    return output, functools.partial(reduce, torch.ones_like(output))


def reduce(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum the loss over the tokens that count; the schedule divides it by their number."""
    total, count = (output * mask).sum(), mask.sum()
    return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}


def build(tensor_parallel: int) -> tuple[Any, Any]:
    """Build a small GPTModel in DDP and its optimizer, on this rank."""
    from megatron.core import distributed, optimizer, parallel_state
    from megatron.core import tensor_parallel as tp
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(tensor_parallel)
    tp.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        tensor_model_parallel_size=tensor_parallel,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    config.finalize_model_grads_func = distributed.finalize_model_grads
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH)
    model.to(torch.cuda.current_device())
    ddp = distributed.DistributedDataParallel(
        config, distributed.DistributedDataParallelConfig(), model
    )
    settings = optimizer.OptimizerConfig(optimizer="adam", lr=1e-3)
    return ddp, optimizer.get_megatron_optimizer(settings, [ddp])


def train(model: Any, optimizer: Any, step: Callable[..., Any], steps: int) -> None:
    """Run the steps of two micro-batches; rank 0 prints the means of its own tokens."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    data = batches(parallel_state.get_data_parallel_rank())
    for number in range(1, steps + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=data,
            model=model,
            num_microbatches=2,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
        )
        optimizer.step()
        if dist.get_rank() == 0:
            sums = {key: sum(report[key] for report in reports) for key in reports[0]}
            figures = (f"{key}: {total / count:.4f}" for key, (total, count) in sums.items())
            print(f"step {number} | {' | '.join(figures)}", flush=True)


def main() -> None:
    """Train with the objective of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="TP")
    parser.add_argument("--objective", default="mile", help="default: mile")
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--cpu", action="store_true", help="run on CPUs over gloo")
    args = parser.parse_args()
    if args.cpu:
        from megatron_mile import cpu_mode

        cpu_mode.enable()  # before the first import of megatron.core
    dist.init_process_group("gloo" if args.cpu else "nccl")
    if not args.cpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    model, optimizer = build(args.tensor_model_parallel_size)

    config = ObjectiveConfig(args.objective)
    attach(model, config)
    step = wrap_forward_step(forward_step, config)

    train(model, optimizer, step, args.steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
