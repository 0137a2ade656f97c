"""Functions that torch cannot look into, as operators where something traces them."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import library

F = TypeVar("F", bound=Callable[..., object])


def operator(
    name: str, fake: Callable[..., object], mutates: tuple[str, ...] = ()
) -> Callable[[F], F]:
    """Return a decorator that makes a function an operator wherever torch traces its calls.

    torch.compile, fake tensors and dispatch modes see `megatron_mile::NAME` and work with what
    `fake` returns. Everywhere else the function itself is called: an operator takes 40 us more,
    which is longer than most kernels run.

    Args:
        name: Of the operator.
        fake: Takes the same arguments; returns tensors of the right shapes, dtypes and devices.
        mutates: Names of the arguments that the function writes.
    """

    def register(function: F) -> F:
        traced = library.custom_op(f"megatron_mile::{name}", function, mutates_args=mutates)
        traced.register_fake(fake)

        @functools.wraps(function)
        def call(*args: object) -> object:
            tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
            return (traced if tracing else function)(*args)

        return call  # type: ignore[return-value]

    return register
