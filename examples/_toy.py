"""The quickstart's model, and how this machine runs it."""

from __future__ import annotations

import os

import torch
from _corpus import QuickstartError

VOCABULARY = 4096
HEADS = 4
SEQUENCE, BATCH = 256, 16
LAYERS = 6
MODEL = f"""
--hidden-size 192 --ffn-hidden-size 512 --num-attention-heads {HEADS}
--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE}
""".split()
GPT = ["--num-layers", str(LAYERS)]
# The same layers as Megatron's HybridModel has them: attention and MLP are one layer each.
HYBRID = ["--hybrid-layer-pattern", "*-" * LAYERS]
# Standard deviations of the first weights. With Megatron's 0.02 for all, so narrow a model drowns
# its embeddings and stays at the loss of single token frequencies for these first steps.
INITIAL = ["--init-method-std", "0.04", "--embedding-init-method-std", "0.2"]
SCHEDULE = f"""
--micro-batch-size {BATCH} --global-batch-size {BATCH} --seed 1234
--lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
--log-interval 1 --eval-iters 0 --eval-interval 1000000000 --num-workers 0
""".split()
# So small a model does not get faster with more.
_MOST_THREADS = 8


class Layout:
    """Where the run computes: the devices, and the tensor parallel size `tp`."""

    def __init__(self, tp: int | None) -> None:
        """Choose the layout.

        Args:
            tp: tensor parallel size; None for 2, or the number of GPUs if that is smaller.

        Raises:
            QuickstartError: the model or the machine cannot be split like that.
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        limit = min(gpus or HEADS, HEADS)
        self.on_cpu = not gpus
        self.tp = min(2, limit) if tp is None else tp
        if not 1 <= self.tp <= limit or HEADS % self.tp:
            possible = [str(n) for n in range(1, limit + 1) if HEADS % n == 0]
            where = f"{gpus} GPUs" if gpus else "the CPU"
            raise QuickstartError(
                f"--tp {tp}: expected {' or '.join(possible)} on {where}: the model has {HEADS} "
                "attention heads to share out"
            )

    def flags(self) -> list[str]:
        """Return the flags that a training needs on this machine."""
        flags = ["--tensor-model-parallel-size", str(self.tp)]
        if self.on_cpu:
            return [*flags, "--mile-cpu"]
        return flags  # examples/pretrain_gpt.py adds what a missing Transformer Engine needs

    def env(self, processes: int) -> dict[str, str]:
        """Return the environment of a step of so many processes; nothing leaves the machine."""
        threads = max(1, cores() // processes)
        return {
            "OMP_NUM_THREADS": str(min(threads, _MOST_THREADS)),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads double the time on a busy machine
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron requires it for TP > 1
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
