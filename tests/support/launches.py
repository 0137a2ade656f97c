"""Counts what a GPU would have to launch, on tensors without values, so without a GPU.

Tensors on the device "meta" have shapes and no values: reading one raises. Autograd runs for them
in the calling thread, as it does not for fake tensors on "cuda" where no driver is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as _leaves

# Memory without a kernel.
_ALLOCATIONS = ("empty", "new_empty")


class Launches(TorchDispatchMode):
    """Watches the operations on meta tensors; the kernels of this library are one each.

    Copies that PyTorch or an operator makes inside one operation are not seen, so a GPU launches
    at least as many kernels as are counted here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        """Operations that launch a kernel."""
        self.collectives: list[str] = []
        self.largest = 0
        """Elements of the largest tensor that an operation has made."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [x for x in _leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # One number is an argument of a launch, but more are a copy for which the host waits.
        strangers = [x for x in given if not x.is_meta and x.dim()]
        assert not strangers, f"{func}: {strangers} beside tensors of the device"
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")):
            self.collectives.append(name.split("::")[1])
        elif not _is_view(func):
            made = [x for x in _leaves(out) if isinstance(x, torch.Tensor)]
            self._note(func, name, made)
        return out

    def _note(self, func: Any, name: str, made: list[torch.Tensor]) -> None:
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if not writes:
            self.largest = max([self.largest, *(x.numel() for x in made)])
        if name.split("::")[1].startswith(_ALLOCATIONS):
            return
        # A number in a CPU's tensor is an argument of a launch.
        if (writes and not made) or any(x.is_meta and x.numel() for x in made):
            self.names.append(name)


def _is_view(func: Any) -> bool:
    """Whether an operation returns another look at its argument, and writes nothing."""
    infos = [result.alias_info for result in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)
