"""tools/convert_checkpoint.py on small files: packing, names, shards, refusals, kills."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama_models import convert, with_args

from tools.checkpoint import hf_folder, llama, to_megatron
from tools.checkpoint.hf_config import from_hugging_face
from tools.checkpoint.llama_config import DTYPES, args_of, from_megatron
from tools.checkpoint.megatron_model import checkpoint_folder
from tools.checkpoint.torch_dist import COMMON, Checkpoint, write_checkpoint
from tools.checkpoint.values import LARGEST
from tools.common.cli import ToolError

MODEL = llama.Llama(2, 8, 12, heads=4, groups=2, head_dim=4, vocab=50, tied=False)
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 50,
}
SETTINGS = from_hugging_face(CONFIG)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with a model of `MODEL`'s sizes."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    sizes = {k: v for w in llama.weights(MODEL, llama.Form()) for k, v in w.parts().items()}
    save_file(
        {name: torch.randn(size) for name, size in sizes.items()}, folder / "model.safetensors"
    )
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line of a conversion that must fail."""
    with pytest.raises(SystemExit) as error:
        convert(*words)
    assert error.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


def test_packing_deals_rows_as_megatron_does() -> None:
    found = {weight.key: weight for weight in llama.weights(MODEL, llama.FORMS["hybrid"])}
    qkv = found["decoder.layers.0.self_attention.linear_qkv.weight"]
    rows = {name: torch.randn(size) for name, size in qkv.parts().items()}
    q, k, v = (rows[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    expected = []
    for group in range(2):  # two query heads of four rows, then a key head and a value head
        expected += [q[8 * group : 8 * group + 8], k[4 * group : 4 * group + 4]]
        expected += [v[4 * group : 4 * group + 4]]
    packed = qkv.join(rows.__getitem__)
    assert torch.equal(packed, torch.cat(expected))
    again = qkv.split(packed)
    assert again.keys() == rows.keys()
    assert all(torch.equal(again[name], rows[name]) for name in rows)


@pytest.mark.parametrize("model", sorted(llama.FORMS))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_there_and_back_are_the_same_bits(
    folder: Path, tmp_path: Path, model: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 1500)
    before = load_file(folder / "model.safetensors")
    before = {name: value.to(DTYPES[dtype]) for name, value in before.items()}
    there = convert("megatron", folder, tmp_path / "there", "--dtype", dtype, "--model", model)
    back = convert("hf", there, tmp_path / "back", "--vocab-size", "50")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    after = {name: value for file in files for name, value in load_file(back / file).items()}
    assert after.keys() == before.keys() == index["weight_map"].keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in before.values())


def test_padding_comes_back_from_its_file(folder: Path, tmp_path: Path) -> None:
    padding = {name: torch.randn(6, 8) for name in llama.TABLES.values()}
    save_file(padding, folder / "megatron_padding.safetensors")
    tables = load_file(folder / "model.safetensors")
    there = convert("megatron", folder, tmp_path / "there")
    checkpoint = Checkpoint(checkpoint_folder(there))
    for key, name in llama.TABLES.items():
        assert torch.equal(checkpoint.tensor(key), torch.cat([tables[name], padding[name]]))
    back = convert("hf", there, tmp_path / "back", "--vocab-size", "50")
    kept = load_file(back / "megatron_padding.safetensors")
    assert all(torch.equal(kept[name], padding[name]) for name in padding)
    (folder / "megatron_padding.safetensors").unlink()
    zeros = Checkpoint(checkpoint_folder(convert("megatron", folder, tmp_path / "zeros")))
    table = zeros.tensor("embedding.word_embeddings.weight")
    assert table.shape == (128, 8)
    assert not table[50:].any()


def test_unknown_missing_and_misshapen_tensors_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "model.safetensors"
    good = load_file(file)
    norm = "model.layers.1.input_layernorm.weight"
    for tensors, message in (
        ({**good, "model.layers.0.self_attn.q_proj.bias": torch.ones(12)}, "unknown tensors"),
        ({name: good[name] for name in good if name != norm}, f"missing tensors .*{norm}"),
        ({**good, norm: torch.ones(9)}, rf"{norm} is \[9\]; expected \[8\]"),
        ({**good, norm: good[norm].half()}, "give --dtype"),
    ):
        save_file(tensors, file)
        line = refused(capsys, "megatron", folder, tmp_path / "out")
        assert re.search(message, line), line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_interleaved": True}, "rotary_interleaved is True; expected False"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
        ({"num_experts": 4}, "num_experts"),
        ({"use_mup": torch.ones(2)}, r"use_mup is tensor\(\[1., 1.\]\); expected False"),
        ({"hybrid_layer_pattern": "M*-*-"}, "its layers are 'M\\*-\\*-'"),
        ({"hybrid_layer_pattern": "*-|*-*-"}, 'expected "\\*-\\*-...", 2 in all'),
        ({"kv_channels": 3}, "heads of 3 are odd"),
        ({"hidden_size": 9}, "a hidden size of 9 is no multiple of 4 attention heads"),
    ],
)
def test_settings_that_hugging_faces_llama_lacks_are_refused(
    change: dict[str, Any], message: str
) -> None:
    args = args_of(SETTINGS, llama.Form(), 50, torch.float32)
    assert from_megatron(args) == SETTINGS
    vars(args).update(change)
    with pytest.raises(ToolError, match=message):
        from_megatron(args)


def test_layers_without_weights_are_no_reason_to_list_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = convert("megatron", folder, tmp_path / "there")
    many = with_args(there, tmp_path / "many", num_layers=LARGEST)
    message = f"stored num_layers is {LARGEST}; expected no more than the layers of its tensors, 2"
    assert message in refused(capsys, "hf", many, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": LARGEST}))
    message = f"of {LARGEST} layers, at most 2 have weights"
    assert message in refused(capsys, "megatron", folder, tmp_path / "out")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


# An object of the model, and one in the place of a weight.
@pytest.mark.parametrize("key", ["_extra_state/shard_0_1", "weight"])
def test_no_other_class_is_unpickled(key: str, folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    good = checkpoint_folder(convert("megatron", folder, tmp_path / "good"))
    (good / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ToolError, match=r"\.mkdir"):
        Checkpoint(good)
    objects = {COMMON: Evil(mark), f"decoder.final_layernorm.{key}": Evil(mark)}
    write_checkpoint(tmp_path / "bad", {}, torch.float32, torch.ones, objects)
    bad = Checkpoint(tmp_path / "bad")
    for read in (bad.common, bad.check_objects):
        with pytest.raises(ToolError, match=r"cannot be read \(it asks for \S+mkdir\)$"):
            read()
    assert not mark.exists()


def test_a_checkpoint_that_is_cut_off_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = convert("megatron", folder, tmp_path / "there")
    data = there / "release" / "__0_0.distcp"
    os.truncate(data, data.stat().st_size // 2)
    assert "cannot be read" in refused(capsys, "hf", there, tmp_path / "out")
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert str(file) in refused(capsys, "megatron", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def convert_and_die(to: str, load: Path, output: Path) -> None:
    """Die when all weights are written, in a process of its own."""
    hf_folder.write_json = die
    to_megatron.TRACKER = type("Tracker", (), {"__rtruediv__": die})()
    convert(to, load, output)


def test_a_killed_conversion_leaves_nothing_to_accept(folder: Path, tmp_path: Path) -> None:
    there = convert("megatron", folder, tmp_path / "there")
    for to, load in (("hf", there), ("megatron", folder)):
        out = tmp_path / f"out-{to}"
        # Forked, because the import of Megatron takes seconds.
        process = get_context("fork").Process(target=convert_and_die, args=(to, load, out))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not out.exists()
        (partial,) = tmp_path.glob(f"out-{to}.partial.*")
        assert any(partial.iterdir())
        assert not {"config.json", "latest_checkpointed_iteration.txt"} & set(os.listdir(partial))
        convert(to, load, out)
