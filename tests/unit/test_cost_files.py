"""EMO's cost matrix from files: every format gives the same numbers, and nothing is executed."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from megatron_mile.errors import MileError
from megatron_mile.integration.arguments import parse
from megatron_mile.integration.checkpoints import changed_settings
from megatron_mile.integration.cost_files import digest, read_matrix

MATRIX = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
OTHER = torch.zeros(50, 4)


def _checkpoint(folder: Path) -> Path:
    state = {
        "optimizer.state.exp_avg.output_layer.weight": OTHER,
        "output_layer.weight": MATRIX,
        "embedding.word_embeddings.weight": OTHER,
    }
    iteration = folder / "iter_0000007"
    dcp.save(state, checkpoint_id=iteration, no_dist=True)
    (iteration / "metadata.json").write_text("{}")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same matrix in every format."""
    folder = tmp_path_factory.mktemp("sources")
    np.save(folder / "rows.npy", MATRIX.numpy())
    save_file({"any name": MATRIX}, folder / "rows.safetensors")
    one, several = folder / "one", folder / "several"
    one.mkdir()
    several.mkdir()
    save_file(
        {"model.embed_tokens.weight": OTHER, "lm_head.weight": MATRIX}, one / "model.safetensors"
    )
    save_file({"wpe.weight": OTHER}, several / "a.safetensors")
    save_file({"wte.weight": MATRIX, "ln.weight": OTHER}, several / "b.safetensors")  # tied
    weights = {"wpe.weight": "a.safetensors", "wte.weight": "b.safetensors"}
    (several / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    run = _checkpoint(folder / "run")
    return {
        "npy": folder / "rows.npy",
        "safetensors": folder / "rows.safetensors",
        "hugging face": one,
        "hugging face with an index": several,
        "megatron": run,
        "megatron iteration": run / "iter_0000007",
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_format_gives_the_same_matrix(sources: dict[str, Path]) -> None:
    for name, path in sources.items():
        matrix = read_matrix(str(path))
        assert torch.equal(matrix, MATRIX), name
        assert digest(matrix) == digest(MATRIX), name


def test_digest_tells_matrices_apart() -> None:
    changed = MATRIX.clone()
    changed[49, 5] += 1e-3
    others = (changed, MATRIX.bfloat16(), MATRIX.view(25, 12), MATRIX[:49])
    assert len({digest(x) for x in (MATRIX, *others)}) == 5
    assert digest(MATRIX.t().contiguous().t()) == digest(MATRIX)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_read_matrix_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("bomb.npy", np.array([_Bomb()]), allow_pickle=True)
    (_checkpoint(tmp_path / "run") / "iter_0000007" / ".metadata").write_bytes(
        pickle.dumps(_Bomb())
    )
    for path, text in (
        ("bomb.npy", "Python objects in dtype"),
        ("run", "posix.mkdir, which is"),
    ):
        with pytest.raises(MileError, match=f"--mile-emo-cost {path} cannot be read: .*{text}"):
            read_matrix(path)
    assert not Path("exploded").exists()


def test_read_matrix_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.npy").write_text("no matrix")
    np.save("vector.npy", np.zeros(3))
    np.save("ids.npy", np.zeros((3, 2), dtype=np.int64))
    save_file({"a": OTHER, "b": MATRIX}, "two.safetensors")
    for path, text in (
        ("nowhere", "expected output-layer, a .npy or .safetensors file"),
        ("nowhere.npy", "No such file"),
        ("empty", "save the model with safe_serialization=True"),
        ("text.npy", "cannot be read"),
        ("vector.npy", r"holds torch.float64 \(3,\); expected a floating matrix"),
        ("ids.npy", r"holds torch.int64 \(3, 2\)"),
        ("two.safetensors", "holds no lm_head.weight, "),
    ):
        with pytest.raises(MileError, match=text) as caught:
            read_matrix(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            "--mile-objective emo --mile-fused-linear",
            "cannot be combined with",
        ),
        (
            "--mile-objective mile --mile-emo-cost x.npy",
            "cost with --mile-objective mile, but only emo has it",
        ),
        ("--mile-emo-cost x.npy", "--mile-emo-cost without an objective"),
        ("--mile-objective emo --mile-emo-mode 3", "invalid choice: '3'"),
    ],
)
def test_parse_refuses(flags: str, text: str) -> None:
    with pytest.raises(MileError, match=text):
        parse(flags.split())


def test_changed_settings_compare_the_matrix_and_not_its_path() -> None:
    emo = {"mile_objective": "emo", "mile_emo_mode": "1"}
    before = {**emo, "mile_emo_cost": "/a", "mile_emo_cost_digest": "1f"}
    assert changed_settings(before, {**before, "mile_emo_cost": "/b", "mile_gamma": 3}) == []
    assert changed_settings(before, {**before, "mile_emo_cost_digest": "2e"}) == [
        "emo_cost 1f -> 2e"
    ]
    assert changed_settings(before, emo) == ["emo_cost 1f -> output-layer"]
    assert changed_settings(emo, {**emo, "mile_emo_mode": "alone"}) == ["emo_mode 1 -> alone"]
    assert changed_settings(before, {"mile_objective": "mile"}) == ["objective emo -> mile"]
