"""Unmodified Megatron where there is no GPU: flags, devices, layers.

Call `enable` before the first import of megatron.core; `--mile-cpu` does.
"""

from megatron_mile.cpu_mode.device import enable
from megatron_mile.cpu_mode.flags import WITHOUT_APEX, WITHOUT_TE, missing_flags, wanted

__all__ = ["WITHOUT_APEX", "WITHOUT_TE", "enable", "missing_flags", "wanted"]
