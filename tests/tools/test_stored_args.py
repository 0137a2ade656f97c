"""Training arguments that a checkpoint lacks or that are bent: each tool ends with one line."""

from __future__ import annotations

import argparse
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import samples
from support.tool_forker import ToolForker

from tools.checkpoint.run_tokenizer import build_from
from tools.checkpoint.stored_args import OPTIONAL, REQUIRED, check_common
from tools.checkpoint.torch_dist import Checkpoint
from tools.common.cli import ToolError

WEIGHTS = {
    "embedding.word_embeddings.weight": (640, 32),
    "decoder.layers.mlp.linear_fc1.weight": (2, 128, 32),
    "decoder.final_layernorm.weight": (32,),
}
NUMBERED = {
    "embedding.word_embeddings.weight": (640, 32),
    "decoder.layers.0.mlp.linear_fc1.weight": (128, 32),
    "decoder.layers.1.mlp.linear_fc1.weight": (128, 32),
}
ARGS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "padded_vocab_size": 640,
    "seq_length": 64,
    "max_position_embeddings": 128,
    "untie_embeddings_and_output_weights": False,
    "swiglu": True,
    "add_bias_linear": False,
    "group_query_attention": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "params_dtype": torch.bfloat16,
    "seed": 1234,
    "vocab_size": 600,
    "num_query_groups": 1,
    "num_experts": None,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "layernorm_epsilon": 1e-6,
    "attention_dropout": 0.0,
}
COUNTS = {"make_vocab_size_divisible_by", "tensor_model_parallel_size"}
OTHER_KINDS = (None, "2", 1.5, float("nan"), [], {}, b"2", torch.ones(2), 10**30, -1)


def check(changes: dict[str, Any], weights: dict[str, tuple[int, ...]] = WEIGHTS) -> Any:
    """Check the arguments with changes; the value `...` leaves one out."""
    values = {name: value for name, value in {**ARGS, **changes}.items() if value is not ...}
    iteration = values.pop("iteration", 3)
    common = {"args": argparse.Namespace(**values), "iteration": iteration}
    return check_common(Path("folder"), common, weights)


@pytest.mark.parametrize("weights", [WEIGHTS, NUMBERED], ids=["stacked", "numbered"])
def test_check_common_takes_what_megatron_writes(weights: dict[str, tuple[int, ...]]) -> None:
    assert check({}, weights)["iteration"] == 3
    for name in ("vocab_size", "num_query_groups"):
        check({name: None}, weights)
    for name in OPTIONAL.keys() - COUNTS:
        check({name: None}, weights)
    tokenizer = {"tiktoken_num_special_tokens": 0, "special_tokens": ["<a>"], "vocab_file": "v"}
    switches = {"tokenizer_sentencepiece_legacy": True, "tokenizer_hf_no_use_fast": False}
    check({**tokenizer, **switches, **dict.fromkeys(COUNTS, 8)}, weights)


def test_check_common_asks_for_groups_where_queries_are_grouped() -> None:
    check({"group_query_attention": True})
    with pytest.raises(ToolError, match="stored num_query_groups is None; expected a whole number"):
        check({"group_query_attention": True, "num_query_groups": None})


def test_check_common_knows_names_of_before() -> None:
    """Megatron itself would take its default for the new name, and compute something else."""
    args = check({"layernorm_epsilon": ..., "norm_epsilon": 1e-6})["args"]
    assert args.layernorm_epsilon == 1e-6
    with pytest.raises(ToolError, match="stored layernorm_epsilon is 'x'; expected"):
        check({"layernorm_epsilon": ..., "norm_epsilon": "x"})


@pytest.mark.parametrize("name", REQUIRED)
def test_check_common_names_what_is_missing(name: str) -> None:
    with pytest.raises(ToolError, match=f"folder: its stored arguments lack {name}; expected "):
        check({name: ...})


# Of `OTHER_KINDS`, what these may be all the same.
TEXTS = ("hybrid_layer_pattern", "tokenizer_type", "tokenizer_model")
ALLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(OPTIONAL.keys() - COUNTS, (None,)),
    **dict.fromkeys(("vocab_size", "num_query_groups", "num_experts"), (None,)),
    **dict.fromkeys(("normalization", "position_embedding_type"), ("2",)),
    **dict.fromkeys((*TEXTS, "tiktoken_pattern", "vocab_file", "merge_file"), (None, "2")),
    "rotary_base": (1.5,),
    "special_tokens": (None, []),
}


@pytest.mark.parametrize("name", [*REQUIRED, *OPTIONAL, "iteration"])
def test_check_common_names_another_kind(name: str) -> None:
    for value in OTHER_KINDS:
        if any(type(value) is type(a) and value == a for a in ALLOWED.get(name, ())):
            check({name: value})
            continue
        with pytest.raises(ToolError, match=f"folder: stored {name} is .*; expected "):
            check({name: value})


@pytest.mark.parametrize("weights", [WEIGHTS, NUMBERED], ids=["stacked", "numbered"])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seq_length", 129, "no more than max_position_embeddings, 128"),
        ("vocab_size", 641, "no more than padded_vocab_size, 640"),
        ("padded_vocab_size", 512, "640 as in embedding.word_embeddings.weight"),
        ("hidden_size", 64, "32 as in embedding.word_embeddings.weight"),
        ("num_layers", 3, "no more than the layers of its tensors, 2"),
        ("num_experts", 641, "no more than the largest side of its tensors, 640"),
        ("ffn_hidden_size", 640 * 32 + 1, "no more than the elements of its largest tensor, 20480"),
    ],
)
def test_check_common_compares_sizes(
    name: str, value: int, expected: str, weights: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(ToolError) as error:
        check({name: value}, weights)
    assert str(error.value).startswith(f"folder: stored {name} is {value}; expected {expected};")


@pytest.mark.parametrize("common", [None, [], {}, {"args": {}}, {"args": None, "iteration": 1}])
def test_check_common_refuses_what_holds_no_arguments(common: Any) -> None:
    with pytest.raises(ToolError, match="folder: holds no training arguments"):
        check_common(Path("folder"), common, WEIGHTS)


def test_check_common_refuses_other_models() -> None:
    with pytest.raises(ToolError, match=r"holds no embedding\.word_embeddings"):
        check({}, {"tools.data.encoder.layers.weight": (2, 2)})


# The last: the model of these would leave a weight out, or cannot be built.
BENT = {
    "seq_length": (0, None, -4, "x", 2.5, 10**9),
    "num_layers": ("2", 10**12, 0, 3),
    "params_dtype": (None,),
    "iteration": (None,),
    "untie_embeddings_and_output_weights": (False, 1),
    "normalization": ("Norm",),
}
WRONG_MODEL = {
    ("untie_embeddings_and_output_weights", False): "output_layer.weight, which the model of its",
    ("normalization", "Norm"): "Megatron builds no model from its stored arguments (Exception: ",
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, vs in BENT.items() for v in vs])
def test_evaluate_names_a_bent_argument(
    name: str, value: object, sample: Path, tmp_path: Path, forker: ToolForker
) -> None:
    folder = samples.copy(sample, tmp_path / "folder")
    common = "common." * (name == "iteration")
    samples.bend(folder / samples.MODEL, {common + name: value})
    before = samples.state_of(folder)
    done = samples.run(forker, samples.COMMANDS["evaluate"], folder)
    expected = WRONG_MODEL.get((name, value), f"model/release: stored {name} is {value!r}; ")
    _is_one_line(done.err, "evaluate", expected)
    assert (done.code, samples.state_of(folder)) == (1, before)


@pytest.mark.parametrize("name", ["seed", "num_layers", "seq_length"])
def test_evaluate_and_convert_name_a_missing_argument(
    name: str, sample: Path, tmp_path: Path, forker: ToolForker
) -> None:
    folder = samples.copy(sample, tmp_path / "folder")
    samples.bend(folder / samples.MODEL, {}, missing=name)
    done = samples.run(forker, samples.COMMANDS["evaluate"], folder)
    _is_one_line(done.err, "evaluate", f"model/release: its stored arguments lack {name}; expected")
    convert = ("--to", "hf", "--load", "model", "--output", "hf")
    done = forker.run("convert_checkpoint", convert, folder)
    _is_one_line(done.err, "convert_checkpoint", f"its stored arguments lack {name}; expected")
    assert not (folder / "hf").exists()


BENT_TOKENIZER = {
    "tokenizer_type": (7, ["HuggingFaceTokenizer"]),
    "tokenizer_model": (7, {"tok": 1}),
    "vocab_size": ("300", 300.0, True),
    "special_tokens": ("<a>", [7]),
    "tiktoken_num_special_tokens": ("1000",),
    "tokenizer_sentencepiece_legacy": ("no",),
    "tokenizer_hf_no_use_fast": (1,),
    "vocab_file": (7,),
    "make_vocab_size_divisible_by": (0, "8"),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name, vs in BENT_TOKENIZER.items() for v in vs]
)
def test_every_tool_names_a_bent_argument_of_the_tokenizer(
    name: str, value: object, sample: Path, tmp_path: Path, forker: ToolForker
) -> None:
    folder = samples.copy(sample, tmp_path / "folder")
    samples.bend(folder / samples.MODEL, {name: value})
    before = samples.state_of(folder)
    for command in (samples.COMMANDS["evaluate"], samples.COMMANDS["convert to hf"]):
        done = samples.run(forker, command, folder)
        _is_one_line(done.err, command.tool, f"model/release: stored {name} is {value!r}; expected")
        assert (done.code, samples.state_of(folder)) == (1, before)


def test_a_checkpoint_does_not_decide_that_a_tokenizers_code_is_run(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Nobody gave --trust-remote-code to the tool."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    with suppress(ToolError):
        build_from(folder, argparse.Namespace(trust_remote_code=True))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["argument", "weight"])
def test_a_checksum_that_is_wrong_is_refused(
    kind: str, sample: Path, tmp_path: Path, forker: ToolForker
) -> None:
    """What is read is possible, but not what was written."""
    folder = samples.copy(sample, tmp_path / "folder")
    path = folder / samples.MODEL / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    if kind == "argument":  # seq_length, of which pickle makes a number of one byte
        place = content.index(64, content.index(b"seq_length"))
    else:
        checkpoint = Checkpoint(folder / samples.MODEL)
        weight = checkpoint.tensor("decoder.final_layernorm.weight").numpy().tobytes()
        place = content.index(weight)
    content[place] ^= 1
    path.write_bytes(content)
    done = samples.run(forker, samples.COMMANDS["evaluate"], folder)
    _is_one_line(done.err, "evaluate", "model/release: cannot be read (the checksum of ")
    convert = ("--to", "hf", "--load", "model", "--output", "hf")
    done = forker.run("convert_checkpoint", convert, folder)
    _is_one_line(done.err, "convert_checkpoint", "cannot be read (the checksum of ")
    assert not (folder / "new.json").exists()
    assert not (folder / "hf").exists()


def test_evaluate_of_the_bent_and_mended_is_the_same(
    sample: Path, tmp_path: Path, forker: ToolForker
) -> None:
    """Writing a checkpoint again changes nothing: what is refused above is the argument."""
    folder = samples.copy(sample, tmp_path / "folder")
    results = []
    for changes in (None, {"seed": 7}):
        if changes:
            samples.bend(folder / samples.MODEL, changes)
        assert samples.run(forker, samples.COMMANDS["evaluate"], folder).code == 0
        results.append(json.loads((folder / "new.json").read_text()))
        del results[-1]["seconds"]
    assert results[0] == results[1]


def _is_one_line(err: str, tool: str, expected: str) -> None:
    (line,) = err.splitlines()
    assert line.startswith(f"tools/{tool}.py: error: ")
    assert expected in line
