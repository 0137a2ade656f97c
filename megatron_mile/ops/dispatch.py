"""Which implementation of the token statistics, EMO's too, runs, and why."""

import functools
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from megatron_mile.ops.emo import EmoStats
from megatron_mile.ops.emo import chunked as emo_chunked
from megatron_mile.ops.emo import reference as emo_reference
from megatron_mile.ops.token_stats import TokenStats, chunked, reference


def select(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[TokenStats, str]:
    """Pick the implementation of the token statistics.

    "auto" is the Triton kernel on a GPU and the cache-sized blocks on a CPU; where these cannot
    run, and for "torch", it is the plain torch reference.

    Args:
        backend: "auto", "torch" or "triton".
        device: Where the logits are.
        dtype: The logits' dtype; the default stands for every one but fp64.

    Returns:
        The implementation, and the reason in one phrase for the start block.

    Raises:
        ValueError: The backend does not exist or cannot run.
    """
    if backend == "torch":
        return reference, f"plain torch on {device.type}: asked for"
    if backend == "auto" and device.type == "cpu":
        if torch.compiler.is_compiling():
            return reference, "plain torch on cpu: torch.compile fuses it"
        return chunked, "torch in cache-sized blocks on cpu: the fastest there"
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend is {backend!r}; expected auto, torch or triton")
    obstacle = _triton_obstacle(device, dtype)
    if obstacle is None:
        from megatron_mile.ops.token_stats import kernel

        asked = "asked for" if backend == "triton" else "the fastest there"
        return kernel, f"Triton kernel on {device.type}: {asked}"
    if backend == "auto":
        return reference, f"plain torch on {device.type}: {obstacle}"
    raise ValueError(f"backend is 'triton', but {obstacle}; use auto or torch")


def emo_beside(stats: TokenStats) -> EmoStats:
    """Return the implementation of EMO's statistics that belongs to one that `select` returned."""
    if stats is reference:
        return emo_reference
    if stats is chunked:
        return emo_chunked
    from megatron_mile.ops.emo import kernel

    return kernel


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the Triton kernel cannot run on such logits, or None if it can."""
    if dtype == torch.float64:
        return "the kernel has no fp64"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the logits are on {device.type} and Triton needs a GPU (or TRITON_INTERPRET=1)"
    try:
        from megatron_mile.ops.token_stats import kernel
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device.type != "cuda" and not kernel.INTERPRETED:
        return "TRITON_INTERPRET=1 was set after Triton had been imported"
    # torch.compile cannot look for files, and needs a compiler of its own.
    return None if kernel.INTERPRETED or torch.compiler.is_compiling() else _compiler_obstacle()


@functools.cache
def _compiler_obstacle() -> str | None:
    """Return why Triton cannot build what launches its kernels: a C extension of Python.

    Without its result in Triton's cache the first forward would raise. The compilers are those that
    Triton looks for.
    """
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(name) for name in names):
        return f"Triton finds no C compiler ({', '.join(names)}): install gcc, or set CC to one"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "Triton finds no Python.h: install the headers of this Python (python3-dev)"
    return None
