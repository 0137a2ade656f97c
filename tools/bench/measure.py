"""One call of a loss, measured: its time, its memory, its collectives."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.bench.case import Inputs
from tools.bench.provider import Loss

PHASES = ("forward", "backward", "both", "replayed")
"""What is timed of a call; the last is both once more, from a CUDA graph."""
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Call:
    """A loss with its data, and buffers of the leaves that all calls share and may overwrite."""

    def __init__(
        self, loss: Loss, inputs: Inputs, buffers: Sequence[torch.Tensor], group: Any
    ) -> None:
        self.loss, self.inputs, self.buffers, self.group = loss, inputs, buffers, group
        self.graph: torch.cuda.CUDAGraph | None = None
        """Forward and backward, if `capture` has recorded them."""

    def restore(self) -> None:
        """Give the buffers the leaves' values."""
        for buffer, leaf in zip(self.buffers, self.inputs.leaves.values(), strict=True):
            buffer.detach().copy_(leaf)

    def forward(self) -> torch.Tensor:
        """Return the loss [T] with its graph."""
        return self.loss(*self.buffers, *self.inputs.given, self.inputs.targets, self.group)

    def backward(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients of the leaves, in their shapes."""
        return torch.autograd.grad(loss, self.buffers, self.inputs.upstream.to(loss.dtype))

    def capture(self) -> None:
        """Record forward and backward in a CUDA graph, so that no launch waits for Python.

        Raises:
            RuntimeError: they wait for the device, or do something else that cannot be recorded.
        """
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # what is made at the first call must not be recorded
            self.restore()
            self.backward(self.forward())
        torch.cuda.synchronize()
        self.restore()
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer one, because torch leaves the capture's stream current if that fails.
            outer = torch.cuda.stream(torch.cuda.current_stream())
            with outer, torch.cuda.graph(graph, pool=_pool()):
                self.backward(self.forward())
        except RuntimeError:
            _pool.cache_clear()  # it may still count as being recorded to
            raise
        self.graph = graph


@functools.cache
def _pool() -> Any:
    """The memory that all graphs share: no two run at a time, and nothing reads what they leave."""
    return torch.cuda.graph_pool_handle()


def make_buffers(inputs: Inputs) -> list[torch.Tensor]:
    """Return what the calls of one case share."""
    return [leaf.clone().requires_grad_() for leaf in inputs.leaves.values()]


class _CountCollectives(TorchDispatchMode):
    """Counts the operations that torch.distributed hands to its backends."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def count_collectives(call: Call) -> dict[str, int]:
    """Return the collectives of each phase."""
    call.restore()
    # Compiled code that may not fall back to Python refuses to run under such a mode.
    with torch.compiler.set_stance("force_eager"), _CountCollectives() as mode:
        loss = call.forward()
        forward = mode.count
        call.backward(loss)
    return dict(zip(PHASES, (forward, mode.count - forward, mode.count, mode.count), strict=True))


def time_call(call: Call, barrier: Callable[[], Any]) -> tuple[float, float, float, float]:
    """Return the ms of each phase, of calls that all ranks start together; NaN without a graph."""
    call.restore()
    read = _cuda_clock if call.inputs.targets.is_cuda else time.perf_counter
    barrier()
    start = read()
    loss = call.forward()
    middle = read()
    gradients = call.backward(loss)
    end = read()
    del gradients
    forward, backward = _ms(start, middle), _ms(middle, end)
    return forward, backward, forward + backward, _time_replay(call, barrier)


def _time_replay(call: Call, barrier: Callable[[], Any]) -> float:
    if call.graph is None:
        return float("nan")
    call.restore()
    barrier()
    start = _cuda_clock()
    call.graph.replay()
    return _ms(start, _cuda_clock())


def time_copy(source: torch.Tensor, out: torch.Tensor, barrier: Callable[[], Any]) -> float:
    """Return the ms of out.copy_(source): what the memory gives at best."""
    read = _cuda_clock if source.is_cuda else time.perf_counter
    barrier()
    start = read()
    out.copy_(source)
    return _ms(start, read())


def _cuda_clock() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def extra_mib(call: Call) -> float:
    """Return the peak memory of forward and backward beyond the inputs, MiB; NaN if unknown.

    On a GPU the allocator says it. On a CPU it is the peak of resident memory, which Linux lets a
    process reset, so that memory of other threads and of compiled code counts too. Call it after
    a first call, when caches and compiled code exist. Blocks below 32 MiB may count twice there:
    the C library keeps some that are freed.
    """
    call.restore()
    gc.collect()
    if call.inputs.targets.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.backward(call.forward())
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return float("nan")
    # Freed blocks that the C library kept would count as memory in use before the call.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")
    before = _resident_kib("VmRSS")
    call.backward(call.forward())
    return (_resident_kib("VmHWM") - before) / 2**10


def _resident_kib(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), flags=re.M)
    assert found, f"no {key} in {_STATUS}"
    return int(found[1])
