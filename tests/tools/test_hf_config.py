"""config.json as tools/convert_checkpoint.py reads it, beside what transformers makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.llama_models import convert
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tools import convert_checkpoint
from tools.checkpoint.hf_config import _KNOWN, HARMLESS, HONOURED, config_of, from_hugging_face
from tools.checkpoint.hf_folder import read_config
from tools.checkpoint.llama_config import Settings, args_of, from_megatron
from tools.checkpoint.megatron_model import checkpoint_folder
from tools.checkpoint.torch_dist import Checkpoint
from tools.common.cli import ToolError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
# config.json of published folders, but for the sizes; each version of transformers has its own.
LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "pad_token_id": 0,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    **SIZES,
}
TINY_LLAMA = {
    **{name: value for name, value in LLAMA_2.items() if name != "pad_token_id"},
    "attention_bias": False,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "transformers_version": "4.35.0",
}
LLAMA_3 = {
    **TINY_LLAMA,
    "attention_dropout": 0.0,
    "bos_token_id": 90,
    "eos_token_id": [91, 92],
    "mlp_bias": False,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
}
SMOL_LM_2 = {
    **LLAMA_3,
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
}
LLAMA_3_1_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
NOW = json.loads(LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).to_json_string())
PUBLISHED = {
    "llama 2": LLAMA_2,
    "tiny llama": TINY_LLAMA,
    "llama 3": LLAMA_3,
    "smol lm 2": SMOL_LM_2,
    "transformers now": NOW,
}
# A value for each key that is taken to be harmless: one that would show if it were not.
UNUSUAL: dict[str, Any] = {
    "_name_or_path": "elsewhere",
    "_commit_hash": "0" * 40,
    "transformers_version": "4.31.0",
    "transformers.js_config": {"dtype": "q4"},
    "is_llama_config": True,
    "max_sequence_length": 4,
    "unsloth_fixed": True,
    "unsloth_version": "2025.1",
    "dtype": "float16",
    "torch_dtype": "bfloat16",
    "initializer_range": 0.9,
    "bos_token_id": 5,
    "eos_token_id": [3, 4],
    "pad_token_id": 3,
    "tokenizer_class": "GPT2Tokenizer",
    "use_cache": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "torchscript": True,
    "_attn_implementation": "eager",
    "_attn_implementation_autoset": True,
    "_flash_attn_2_enabled": True,
    "pretraining_tp": 4,
    "max_length": 3,
    "max_new_tokens": 3,
    "min_length": 3,
    "do_sample": True,
    "num_beams": 3,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "repetition_penalty": 9.0,
    "length_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "num_labels": 3,
    "problem_type": "regression",
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    logging.set_verbosity(logging.CRITICAL)  # transformers has a warning for each odd key


def save(config: dict[str, Any], folder: Path) -> Path:
    """Write a folder with untrained weights of a config's sizes, and the config as it is."""
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**config)).float().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def theirs(config: dict[str, Any]) -> Settings:
    """What transformers reads from a config; it must be a model that Megatron can be."""
    read = LlamaConfig(**json.loads(json.dumps(config)))
    rope = read.rope_parameters
    assert (read.hidden_act, read.attention_bias, read.mlp_bias) == ("silu", False, False)
    assert rope["rope_type"] == "default"
    assert rope.get("partial_rotary_factor") in (None, 1.0)
    model = type(from_hugging_face(NOW).model)(
        layers=read.num_hidden_layers,
        hidden=read.hidden_size,
        ffn=read.intermediate_size,
        heads=read.num_attention_heads,
        groups=read.num_key_value_heads,
        head_dim=read.head_dim,
        vocab=read.vocab_size,
        tied=read.tie_word_embeddings,
    )
    dropout = read.attention_dropout or 0.0
    length, epsilon = read.max_position_embeddings, read.rms_norm_eps
    return Settings(model, length, rope["rope_theta"], epsilon, dropout)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folders_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    config = PUBLISHED[name]
    assert from_hugging_face(config) == theirs(config)
    folder = save(config, tmp_path / "hf")
    assert from_hugging_face(read_config(folder)) == theirs(config)
    checkpoint = convert("megatron", folder, tmp_path / "megatron")
    back = convert("hf", checkpoint, tmp_path / "back", "--vocab-size", "96")
    assert theirs(read_config(back)) == theirs(config)


def test_a_folder_that_transformers_saved_is_read(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.25)).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert from_hugging_face(config) == theirs(config)
    assert from_hugging_face(config).attention_dropout == 0.25


def test_settings_go_to_megatron_and_back() -> None:
    config = {**LLAMA_3, "head_dim": 10, "rms_norm_eps": 3e-6, "attention_dropout": 0.125}
    there = from_hugging_face(config)
    args = args_of(there, convert_checkpoint.FORMS["gpt"], 128, torch.bfloat16)
    assert (args.attention_dropout, args.layernorm_epsilon) == (0.125, 3e-6)
    assert (args.rotary_base, args.seq_length, args.kv_channels) == (500000, 128, 10)
    padded = there._replace(model=there.model._replace(vocab=128))
    assert from_megatron(args) == padded
    assert from_hugging_face(config_of(there, torch.bfloat16, {"bos_token_id": 1})) == there


def test_frequencies_in_the_folders_of_llama_2_are_made_anew(tmp_path: Path) -> None:
    folder = save(LLAMA_2, tmp_path / "hf")
    plain = convert("megatron", folder, tmp_path / "plain", "--dtype", "fp16")
    halves = {name: w.half() for name, w in load_file(folder / "model.safetensors").items()}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        halves[name] = torch.ones(4)  # fp32 beside fp16, and what transformers does not read
    save_file(halves, folder / "model.safetensors")
    found = [
        Checkpoint(checkpoint_folder(path))
        for path in (plain, convert("megatron", folder, tmp_path / "with"))
    ]
    assert found[0].tensors.keys() == found[1].tensors.keys()
    for key in found[0].tensors:
        assert torch.equal(found[0].tensor(key), found[1].tensor(key))


# Each is another model to some version of transformers, or to none.
OTHER_MODELS = {
    "partial_rotary_factor is 0.5; expected 1.0": {"partial_rotary_factor": 0.5},
    "rope_parameters.partial_rotary_factor is 0.5": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}
    },
    "rope_parameters.type is 'linear'; expected 'default'": {
        "rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}
    },
    "rope_scaling.type is 'dynamic'": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope_scaling.type is 'linear'": {"rope_scaling": {"type": "linear", "rope_type": "default"}},
    "rope_scaling.rope_type is 'llama3'": {"rope_scaling": LLAMA_3_1_ROPE},
    "rope_parameters.rope_type is 'llama3'": {
        "rope_parameters": {**LLAMA_3_1_ROPE, "rope_theta": 5e5}
    },
    "rope_scaling has 'factor', which is for another RoPE": {"rope_scaling": {"factor": 8.0}},
    "rope_parameters has 'full_attention', which is for": {
        "rope_parameters": {"full_attention": {}}
    },
    "rope_theta 500000 and rope_parameters.rope_theta 10000 contradict": {"rope_theta": 500000.0},
    "rope_parameters and rope_scaling differ": {"rope_scaling": {"rope_type": "default"}},
    "quantization_config is {'quant_method': 'fp8'}; expected null: load it with transformers": {
        "quantization_config": {"quant_method": "fp8"}
    },
    "model_type is 'mistral'; expected 'llama'": {"model_type": "mistral"},
    "architectures is ['MistralForCausalLM']": {"architectures": ["MistralForCausalLM"]},
    "architectures is ['LlamaModel']": {"architectures": ["LlamaModel"]},
    "auto_map is": {"auto_map": {"AutoModelForCausalLM": "model.Model"}},
    "num_key_value_heads is 0; expected a whole number": {"num_key_value_heads": 0},
    "head_dim is 0; expected a whole number": {"head_dim": 0},
    "4 attention heads are no multiple of 3 key-value heads": {"num_key_value_heads": 3},
    "a hidden size of 34 is no multiple of 4": {"hidden_size": 34, "head_dim": 8},
    "heads of 7 are odd": {"head_dim": 7},
    "attention_dropout is 1.5; expected a number from 0": {"attention_dropout": 1.5},
    "attention_bias is True; expected False": {"attention_bias": True},
    "attention_bias is 0; expected False": {"attention_bias": 0},
    "mlp_bias is True": {"mlp_bias": True},
    "hidden_act is 'gelu'; expected 'silu'": {"hidden_act": "gelu"},
    "sliding_window is 16; expected null": {"sliding_window": 16},
    "layer_types is ['sliding_attention', 'sliding_attention']": {
        "layer_types": ["sliding_attention"] * 2
    },
    "per_layer_config is": {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
    "rope_interleaved is True; expected False": {"rope_interleaved": True},
    "'logit_scale' is unknown; take it out if": {"logit_scale": 0.5},
    "num_hidden_layers is None; expected a whole number": {"num_hidden_layers": None},
    "num_hidden_layers is '2'": {"num_hidden_layers": "2"},
    "num_hidden_layers is 2.0": {"num_hidden_layers": 2.0},
    "num_hidden_layers is True": {"num_hidden_layers": True},
    "at most 2 have weights": {"num_hidden_layers": 2**31 - 1},
    "num_hidden_layers is 1000000000000; expected a whole number from 1 to 2147483647": {
        "num_hidden_layers": 10**12
    },
    "num_attention_heads is 0": {"num_attention_heads": 0},
    "hidden_size is 1000": {"hidden_size": 10**4000},
    "max_position_embeddings is '128'": {"max_position_embeddings": "128"},
    "rms_norm_eps is nan; expected a number from 1e-30 to 0.1": {"rms_norm_eps": float("nan")},
    "rms_norm_eps is None": {"rms_norm_eps": None},
    "rope_parameters is [1]; expected an object": {"rope_parameters": [1]},
    "rope_theta is None; expected a number from 1": {"rope_theta": None},
    "rope_parameters.rope_theta is inf": {"rope_parameters": {"rope_theta": float("inf")}},
    "tie_word_embeddings is 'no'; expected False": {"tie_word_embeddings": "no"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(NOW, tmp_path_factory.mktemp("saved") / "hf")


@pytest.mark.parametrize("message", OTHER_MODELS)
def test_what_megatron_would_not_compute_is_refused(
    message: str, saved: Path, tmp_path: Path, failure: Callable[..., str]
) -> None:
    folder = shutil.copytree(saved, tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps({**NOW, **OTHER_MODELS[message]}))
    words = ("--to", "megatron", "--load", folder, "--output", tmp_path / "out")
    line = failure(convert_checkpoint.main, *words)
    assert message in line
    assert len(line) < 300
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*SIZES, "model_type"])
def test_what_is_missing_is_named(name: str) -> None:
    config = {key: value for key, value in LLAMA_2.items() if key != name}
    if name in ("num_key_value_heads", "max_position_embeddings"):  # there are defaults
        assert from_hugging_face(config) == theirs(config)
        return
    with pytest.raises(ToolError, match=rf"^config\.json: {name} is missing"):
        from_hugging_face(config)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[" * 100_000, "not JSON (nested too deeply"),
        ("config.json", "[]", "expected an object"),
        ("config.json", '{"vocab_size": ' + "9" * 5000 + "}", "not JSON"),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}', "expected weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": null}}', "expected weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../a"}}', "expected weight_map"),
        ("model.safetensors.index.json", "{}", "expected weight_map"),
        ("megatron_padding.safetensors", None, "unknown tensors"),
    ],
)
def test_odd_files_end_in_a_line(
    file: str,
    content: str | None,
    message: str,
    saved: Path,
    tmp_path: Path,
    failure: Callable[..., str],
) -> None:
    folder = shutil.copytree(saved, tmp_path / "hf")
    if file.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    if content is None:
        save_file({"scalar": torch.ones(())}, folder / file)
    else:
        (folder / file).write_text(content)
    words = ("--to", "megatron", "--load", folder, "--output", tmp_path / "out")
    assert message in failure(convert_checkpoint.main, *words)


def logits(config: dict[str, Any], like: torch.nn.Module | None = None) -> Any:
    """Transformers' own model in float64, with wide weights or another's; and its logits."""
    model = LlamaForCausalLM(LlamaConfig(**config)).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    if like:
        model.load_state_dict(like.state_dict())
    with torch.no_grad():
        return model, model(torch.arange(24).reshape(2, 12))[0]


def test_harmless_keys_change_no_logit() -> None:
    """The oracle of the table: the same weights with and without each key."""
    plain, expected = logits(NOW)
    assert UNUSUAL.keys() == {name for names in HARMLESS.values() for name in names}
    for name, value in UNUSUAL.items():
        config = {**NOW, name: value}
        assert from_hugging_face(config) == from_hugging_face(NOW)
        _, found = logits(config, plain)
        # Eager attention has its softmax in fp32: measured 3.5e-7; all else is the same bits.
        tolerance = 2e-6 if name == "_attn_implementation" else 0
        assert torch.allclose(found, expected, rtol=0, atol=tolerance), name
    _, other = logits(
        {**NOW, "rope_parameters": {"rope_type": "default", "rope_theta": 9e3}}, plain
    )
    assert (other - expected).abs().max() > 1e-3


VALUES = st.one_of(
    st.sampled_from([None, True, False, "", "llama", "default", "linear", [], [1], {}, 10**400]),
    st.sampled_from([0, 1, -1, 2, 3, 4, 7, 8, 32, 2**31, 10**12, 1e4, 10000, 5e5, -0.0, 1e-5]),
    st.floats(),
    st.text(max_size=5),
)
BASES = st.sampled_from([1e4, 10000, 5e5])
ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "default", "default", "llama3", None]),
        "type": st.sampled_from(["default", "default", "default", "linear"]),
        "rope_theta": st.one_of(BASES, BASES, VALUES),
        "partial_rotary_factor": st.sampled_from([1.0, 1, None, 0.5]),
        "factor": VALUES,
    },
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A good configuration with up to four keys gone, changed or added."""
    config = dict(draw(st.sampled_from([*PUBLISHED.values()])))
    for _ in range(draw(st.integers(0, 4))):
        ropes = ("rope_parameters", "rope_scaling", "rope_theta")
        name = draw(st.sampled_from([*HONOURED, *ropes * 4, *_KNOWN, "unknown", ""]))
        if draw(st.booleans()) and name in config:
            del config[name]
        elif name in UNUSUAL:
            config[name] = UNUSUAL[name]  # other values transformers need not read either
        else:
            values = {"rope_theta": BASES | VALUES, ropes[0]: ROPES | VALUES, ropes[1]: ROPES}
            config[name] = draw(values.get(name, VALUES))
    return config


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_any_configuration_is_refused_or_read_as_transformers_reads_it(
    config: dict[str, Any],
) -> None:
    with suppress(ToolError):
        ours = from_hugging_face(config)
        assert config.keys() <= _KNOWN
        assert ours == theirs(config)
