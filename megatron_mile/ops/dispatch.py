"""Which implementation of the token statistics runs, and why."""

import torch

from megatron_mile.ops.token_stats import TokenStats, reference


def select(backend: str, device: torch.device) -> tuple[TokenStats, str]:
    """Pick the implementation of the token statistics.

    Args:
        backend: "auto", "torch" or "triton".
        device: Where the logits are.

    Returns:
        The implementation, and the reason in one phrase for the start block.

    Raises:
        ValueError: The backend does not exist or cannot run.
    """
    if backend == "auto":
        return reference, f"plain torch on {device.type}: the only implementation in this release"
    if backend == "torch":
        return reference, f"plain torch on {device.type}: asked for"
    if backend == "triton":
        raise ValueError(
            "backend is 'triton', but this release has no Triton kernel; use auto or torch"
        )
    raise ValueError(f"backend is {backend!r}; expected auto, torch or triton")
