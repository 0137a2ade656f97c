"""What `import megatron_mile` offers, and how little it loads."""

import subprocess
import sys
from pathlib import Path

import megatron_mile

NAMES = [
    "CostRows",
    "GammaSchedule",
    "ObjectiveConfig",
    "TokenLoss",
    "attach",
    "install",
    "linear_token_loss",
    "load_objective",
    "reduce_loss",
    "set_token_weight",
    "token_loss",
    "uninstall",
    "wrap_finalize_model_grads",
    "wrap_forward_step",
]


def test_import_offers_exactly_the_public_names() -> None:
    assert sorted(megatron_mile.__all__) == NAMES


def test_import_resolves_the_core_names() -> None:
    from megatron_mile import config, loss

    assert megatron_mile.ObjectiveConfig is config.ObjectiveConfig
    assert megatron_mile.token_loss is loss.token_loss
    assert megatron_mile.reduce_loss is loss.reduce_loss


def test_import_loads_no_megatron_and_no_triton() -> None:
    # What torch alone brings along is not ours.
    script = (
        "import sys, torch; before = set(sys.modules); import megatron_mile;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "sys.exit(str(sorted(new & {'megatron', 'triton', 'numpy', 'transformers'})) "
        "if new & {'megatron', 'triton', 'numpy', 'transformers'} else 0)"
    )
    root = Path(megatron_mile.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
