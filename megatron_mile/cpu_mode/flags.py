"""When a job runs in CPU mode, and which flags Megatron then needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Flags = tuple[tuple[str, ...], ...]
# What Megatron must be told where Transformer Engine or apex is missing, GPU or not.
WITHOUT_TE: Flags = (("--transformer-impl", "local"),)
WITHOUT_APEX: Flags = (
    ("--no-masked-softmax-fusion",),
    ("--no-gradient-accumulation-fusion",),
    ("--no-rope-fusion",),
    ("--no-persist-layer-norm",),
)
CPU_FLAGS: Flags = (
    ("--distributed-backend", "gloo"),
    *WITHOUT_TE,
    ("--use-cpu-initialization",),
    *WITHOUT_APEX,
    ("--no-bias-gelu-fusion",),
    ("--no-bias-swiglu-fusion",),
    ("--no-bias-dropout-fusion",),
)


def wanted(argv: Sequence[str]) -> bool:
    """Whether a job's command line asks for CPU mode.

    It does with `--mile-cpu`, or with an explicit `--distributed-backend gloo` on a machine
    without a GPU; never by itself, so that a node with a dead driver fails as Megatron fails.
    """
    if "--mile-cpu" in argv:
        return True
    return _value_of("--distributed-backend", argv) == "gloo" and not torch.cuda.is_available()


def missing_flags(argv: Sequence[str], flags: Flags = CPU_FLAGS) -> list[str]:
    """Words to append to a job's command line so that it has all of `flags`.

    A flag given with another value is overridden: argparse takes the last one.
    """
    return [
        word
        for flag in flags
        if not (flag[0] in argv if len(flag) == 1 else _value_of(flag[0], argv) == flag[1])
        for word in flag
    ]


def _value_of(option: str, argv: Sequence[str]) -> str | None:
    """Last value of `option` on a command line, in either spelling, or None."""
    value = None
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == option:
            value = following
        elif word.startswith(option + "="):
            value = word.split("=", 1)[1]
    return value
