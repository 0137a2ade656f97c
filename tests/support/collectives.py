"""torch's counter of collectives, where this torch has it."""

try:
    from torch.distributed.tensor.debug import CommDebugMode
except ModuleNotFoundError:  # torch 2.4
    from torch.distributed._tensor.debug import CommDebugMode

__all__ = ["CommDebugMode"]
