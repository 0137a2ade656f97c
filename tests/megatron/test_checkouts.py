"""Unmodified scripts of a Megatron-LM checkout, named by MEGATRON_LM_DIR, through the launcher.

Megatron compiles its dataset helpers in the checkout: that needs make, g++ and pybind11.
"""

import os
from pathlib import Path

import pytest
from support.training_runs import HOST, MILE, TP2, command_line, read_scalars, torchrun

CHECKOUT = Path(os.environ.get("MEGATRON_LM_DIR", "/no/checkout"))
HYBRID = (
    "--hybrid-layer-pattern=*-*- --position-embedding-type none "
    "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"
)
SCRIPTS = {"pretrain_gpt.py": "", "pretrain_hybrid.py": HYBRID, "pretrain_mamba.py": HYBRID}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT.is_dir(), reason="MEGATRON_LM_DIR names no checkout"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_launcher_trains_an_unmodified_script(script: str, tmp_path: Path) -> None:
    path = CHECKOUT / script
    has_hybrid = (CHECKOUT / "megatron/core/models/hybrid").is_dir()
    if not path.exists() or (SCRIPTS[script] and not has_hybrid):
        pytest.skip("the checkout has no such script, or no HybridModel")
    runs = {}
    for name, flags in (("mile", MILE), ("ce", f"{HOST} --mile-objective ce"), ("host", HOST)):
        folder = tmp_path / name
        arguments = command_line(folder, TP2, SCRIPTS[script], flags)
        run = torchrun(2, "-m", "megatron_mile.launch", path, *arguments)
        assert run.returncode == 0, run.stderr[-3000:]
        runs[name] = read_scalars(folder)
    losses = {name: run["lm loss"] for name, run in runs.items()}
    assert losses["mile"][12] < losses["mile"][1] - 1
    assert runs["mile"]["mile loss"][12] != losses["mile"][12]
    for step, loss in losses["host"].items():
        assert losses["ce"][step] == pytest.approx(loss, rel=2e-6)
