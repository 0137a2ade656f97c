"""Where the Triton kernels are tested: on the GPU if there is one, else in Triton's interpreter.

Triton asks the environment when it is imported and again when a kernel runs. So the kernels are
imported here, before any test module, and the variable is set for them and for the tests of this
folder alone: no other test, and no process that one starts, sees it.
"""

import importlib.metadata
import importlib.util
import sys

import pytest
import torch

KERNELS = [f"megatron_mile.ops.{name}.kernel" for name in ("token_stats", "emo", "per_token")]
INTERPRETED = not torch.cuda.is_available()

if importlib.util.find_spec("triton") is None or (
    INTERPRETED and importlib.metadata.version("triton").startswith("3.0.")  # writes no results
):
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETED:
    if "triton" in sys.modules and not set(KERNELS) <= set(sys.modules):
        raise RuntimeError("triton was imported before its interpreter could be switched on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for kernel in KERNELS:
            importlib.import_module(kernel)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the interpreter on during the tests of this folder where there is no GPU."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
