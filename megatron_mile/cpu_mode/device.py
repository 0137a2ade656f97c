"""Let unmodified `megatron.training` run where there is no GPU, over gloo.

Megatron names CUDA in four ways, and each gets its own small answer:

* `device="cuda"` in factory calls and moves -> rewritten to "cpu" by a torch function mode;
* `torch.cuda.current_device()`, streams, events, memory figures -> stand-ins that do nothing;
* the CUDA random generator -> a generator of its own, so that what a GPU would draw (dropout,
  warm-up tensors) never disturbs the CPU generator that initialises the weights;
* `torch.cuda.is_available()` is False, also where there is a GPU: only `initialize_megatron` is
  told to go on without.

Devices are rewritten in the thread that called `enable`, which is where Megatron computes. Nothing
here is an emulation of speed or memory: it is for tests, demonstrations and debugging.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_mile.errors import MileError
from megatron_mile.integration import versions
from megatron_mile.integration.host import replace

CPU = torch.device("cpu")
_DROPOUTS = (torch.nn.functional.dropout, torch.dropout, torch.native_dropout)
_DRAWS = (torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal)
_enabled = False


def enable() -> None:
    """Switch this process to CPU mode; idempotent, for the life of the process.

    Raises:
        MileError: megatron.core is imported already (it binds CUDA functions by name).
    """
    global _enabled
    if _enabled:
        return
    if "megatron.core" in sys.modules:
        raise MileError(
            "CPU mode must be enabled before megatron.core is imported: "
            "start the script with `-m megatron_mile.launch`, or call enable() first"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron requires it for TP > 1
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # fused helpers run as the plain functions they wrap
    os.environ.setdefault(*versions.IMPORT_WITHOUT_GPU)
    _replace_cuda_functions(torch.Generator())
    if importlib.util.find_spec("megatron.training"):  # not in wheels before 0.17
        replace(versions.INITIALIZE, _without_cuda)
    _DeviceToCpu().__enter__()
    _enabled = True


class _DeviceToCpu(TorchFunctionMode):
    """Sends every tensor that is meant for CUDA to the CPU, random draws included."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Rewrite devices, keep GPU draws on their own generator, name types as on a GPU."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers select parameters by this name.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.type and isinstance(args[1:2] and args[1], str):
            args = (args[0], args[1].replace("torch.cuda.", "torch."), *args[2:])
        meant_for_gpu = _names_cuda(kwargs.get("device"))
        if meant_for_gpu:
            kwargs["device"] = CPU
        if func is torch.Tensor.to:
            args = tuple(CPU if _names_cuda(value) else value for value in args)
        if func in _DROPOUTS or (meant_for_gpu and func in _DRAWS):
            with _gpu_generator():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    """Whether a device argument means a GPU; a bare number does."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, int):
        return not isinstance(device, bool)
    return isinstance(device, str) and device.startswith("cuda")


@contextlib.contextmanager
def _gpu_generator() -> Iterator[None]:
    """Let CPU operations draw from the generator that stands for the GPU's."""
    generator = torch.cuda.default_generators[CPU]  # type: ignore[call-overload]
    cpu_state = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(cpu_state)


class _Finished:
    """A stream or event that has always finished: CPU operations are in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0

    def __enter__(self) -> _Finished:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def _replace_cuda_functions(generator: torch.Generator) -> None:
    """Put stand-ins for what Megatron calls unconditionally into `torch.cuda`."""

    def nothing() -> Callable[..., None]:
        # One object a name: Dynamo's rules refuse the same function under two.
        return lambda *args, **kwargs: None

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        generator.set_state(state)

    def get_state(device: Any = None) -> torch.Tensor:
        return generator.get_state()

    stand_ins: dict[str, Any] = {
        "is_available": lambda: False,
        "current_device": lambda: CPU,
        "set_device": nothing(),
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "Stream": type("Stream", (_Finished,), {}),
        "Event": type("Event", (_Finished,), {}),
        "stream": lambda *args: _Finished(),
        "current_stream": lambda *args: _Finished(),
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "memory_reserved": lambda *args: 0,
        "max_memory_reserved": lambda *args: 0,
        "get_device_capability": lambda *args: (0, 0),
        "get_device_properties": lambda *args: SimpleNamespace(name="cpu", major=0, minor=0),
        "default_generators": {CPU: generator},
        "manual_seed": generator.manual_seed,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "_lazy_init": nothing(),
        "_lazy_call": lambda function, **kwargs: function(),
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = get_state
    torch.cuda.random.set_rng_state = set_state  # type: ignore[assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]


def _without_cuda(host: Callable[..., Any]) -> Callable[..., Any]:
    """Pass over Megatron's own assertion that CUDA is there."""

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        # Megatron builds its process groups only where it counts a device.
        device_count = torch.cuda.device_count
        torch.cuda.device_count = lambda: 1
        try:
            return host(*args, **{**kwargs, "allow_no_cuda": True})
        finally:
            torch.cuda.device_count = device_count

    return initialize_megatron
