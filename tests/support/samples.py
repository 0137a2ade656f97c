"""A folder with an input of every kind that the data tools read, and a command for each tool."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zstandard
from safetensors.torch import save_file

from support.tool_forker import ToolForker
from tools.checkpoint.hf_config import from_hugging_face
from tools.checkpoint.llama import Form, weights
from tools.checkpoint.torch_dist import COMMON, Checkpoint, write_checkpoint

VOCABULARY = 300
LINES = 24
HF = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tok")
PAIR, DOMAIN = "d_text_document", "pile/p_Pile-CC_text_document"
MODEL = "model/release"
RUN = "runs/ce/tensorboard/events.out.tfevents.1"


MODEL_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


class Command(NamedTuple):
    """A command that succeeds on the undamaged folder, where it runs."""

    tool: str
    flags: tuple[str, ...]
    output: tuple[str, str]
    """The flag that names what is written, and its value."""
    inputs: tuple[str, ...]
    """Files that it reads."""
    numbers: tuple[str, ...] = ()
    """Flags whose values are numbers."""
    suffixes: tuple[str, ...] = ("",)
    """What is written, behind the output's value."""


_BEGUN = ("c.partial/progress", *(f"c.partial/text_document.{end}" for end in ("bin", "lengths")))
_TOKENIZER = ("tok/tokenizer.json", "tok/tokenizer_config.json")
_CHECKPOINT = tuple(f"{MODEL}/{name}" for name in (".metadata", "metadata.json", "__0_0.distcp"))
_PAIR_SUFFIXES = tuple(f"_text_document.{end}" for end in ("bin", "idx", "info"))
COMMANDS = {
    "count": Command(
        "token_frequency",
        ("--data-prefix", PAIR, "--vocab-size", str(VOCABULARY)),
        ("--output", "new.json"),
        (f"{PAIR}.idx", f"{PAIR}.bin"),
        ("--vocab-size",),
    ),
    "count with a tokenizer": Command(
        "token_frequency",
        ("--data-prefix", PAIR, *HF),
        ("--output", "new.json"),
        (f"{PAIR}.idx", *_TOKENIZER),
    ),
    "train": Command(
        "train_tokenizer",
        ("--input", "in.jsonl", "in.jsonl.zst", "--vocab-size", "280", "--min-frequency", "2"),
        ("--output", "new"),
        ("in.jsonl", "in.jsonl.zst"),
        ("--vocab-size", "--min-frequency"),
        ("/tokenizer.json", "/tokenizer_config.json"),
    ),
    "preprocess": Command(
        "preprocess_data",
        ("--input", "in.jsonl", "--append-eod", *HF, "--workers", "1", "--shard-bytes", "900"),
        ("--output-prefix", "new"),
        ("in.jsonl", *_TOKENIZER),
        ("--workers", "--shard-bytes", "--log-interval"),
        _PAIR_SUFFIXES,
    ),
    "preprocess numbers": Command(
        "preprocess_data",
        ("--input", "numbers.txt", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100"),
        ("--output-prefix", "new"),
        ("numbers.txt",),
        ("--vocab-size", "--tiktoken-num-special-tokens"),
        _PAIR_SUFFIXES,
    ),
    "resume": Command(
        "preprocess_data",
        ("--input", "bad.jsonl", "--append-eod", *HF, "--skip-bad-lines"),
        ("--output-prefix", "c"),
        _BEGUN,
        (),
        _PAIR_SUFFIXES,
    ),
    "blend": Command(
        "pile_blend",
        ("pile", "--renormalize"),
        ("--output", "new.txt"),
        tuple(DOMAIN + end for end in (".idx", ".bin", ".info")),
    ),
    "evaluate": Command(
        "evaluate",
        (
            *("--cpu", "--load", "model", "--data-prefix", PAIR),
            *("--token-frequency", "frequency.json", "--micro-batch-size", "4"),
        ),
        ("--output", "new.json"),
        (
            *_CHECKPOINT,
            "model/latest_checkpointed_iteration.txt",
            "frequency.json",
            f"{PAIR}.idx",
        ),
        ("--micro-batch-size", "--ckpt-step", "--shots"),
    ),
    "convert to hf": Command(
        "convert_checkpoint",
        ("--to", "hf", "--load", "model", "--tokenizer-model", "tok"),
        ("--output", "new"),
        (*_CHECKPOINT, "model/latest_checkpointed_iteration.txt", *_TOKENIZER),
        ("--vocab-size", "--ckpt-step"),
        ("/config.json", "/model.safetensors", "/megatron_padding.safetensors", "/tokenizer.json"),
    ),
    "convert to megatron": Command(
        "convert_checkpoint",
        ("--to", "megatron", "--load", "llama"),
        ("--output", "new"),
        ("llama/config.json", "llama/model.safetensors", "llama/tokenizer.json"),
        (),
        ("/release/__0_0.distcp", "/release/metadata.json"),
    ),
    "compare": Command(
        "evaluate",
        ("--compare", "runs/ce/evaluation.json", "runs/mile/evaluation.json"),
        ("--picture", "new.svg"),
        ("runs/ce/evaluation.json", "runs/mile/evaluation.json"),
    ),
    "plot": Command(
        "plot_runs",
        ("runs",),
        ("--output", "new.svg"),
        ("runs/mile/evaluation.json", "runs/mile/run_record.json", RUN),
    ),
}


def run(forker: ToolForker, command: Command, folder: Path, *more: object) -> Any:
    """Run a command as it is, with more flags behind."""
    return forker.run(command.tool, [*command.flags, *command.output, *more], folder)


def make(folder: Path, texts: list[str], forker: ToolForker) -> Path:
    """Fill the folder.

    Args:
        folder: made by this.
        texts: of the documents.
        forker: runs the tools.
    """
    folder.mkdir()
    _write_texts(folder, [text[:400] for text in texts if text.isascii()][:LINES])
    tokenizer = ("--input", "in.jsonl", "--vocab-size", VOCABULARY, "--output", "tok")
    assert forker.run("train_tokenizer", tokenizer, folder).code == 0
    shutil.copytree(folder / "tok", folder / "llama")
    _write_model(folder / "llama")
    convert = ("--to", "megatron", "--load", "llama", "--output", "model")
    assert forker.run("convert_checkpoint", convert, folder).code == 0
    flags = ("--input", "in.jsonl", "--output-prefix", "d", "--append-eod", *HF)
    assert forker.run("preprocess_data", flags, folder).code == 0
    pile = ("--input", "pile.jsonl", "--output-prefix", "pile/p", "--split-domains", *HF)
    assert forker.run("preprocess_data", pile, folder).code == 0
    count = ("--data-prefix", PAIR, "--vocab-size", VOCABULARY, "--output", "frequency.json")
    assert forker.run("token_frequency", count, folder).code == 0
    begun = ("--input", "bad.jsonl", "--output-prefix", "c", "--append-eod", *HF)
    assert "malformed" in forker.run("preprocess_data", (*begun, "--shard-bytes", 1), folder).err
    assert (folder / "c.partial" / "progress").exists()
    _write_runs(folder / "runs")
    return folder


def _write_texts(folder: Path, texts: list[str]) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    # More than one batch of the encoder, so that a shard is finished before the bad line.
    many = lines * (96 // len(lines))
    (folder / "in.jsonl").write_text("".join(lines))
    (folder / "bad.jsonl").write_text("".join([*many, "{\n", *lines]))
    (folder / "numbers.txt").write_text("1 2 3 99 " * 20 + "0")
    (folder / "in.jsonl.zst").write_bytes(zstandard.compress("".join(lines).encode()))
    domains = ("Pile-CC", "ArXiv")
    (folder / "pile.jsonl").write_text(
        "".join(
            json.dumps({"text": text, "meta": {"pile_set_name": domains[index % 2]}}) + "\n"
            for index, text in enumerate(texts)
        )
    )


def _write_model(folder: Path) -> None:
    """Write an untrained LLaMA model, far from uniform, as a Hugging Face folder."""
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
    model = from_hugging_face(MODEL_CONFIG).model
    torch.manual_seed(1)
    tensors = {
        name: torch.randn(size) / 3
        for weight in weights(model, Form())
        for name, size in weight.parts().items()
    }
    save_file(tensors, folder / "model.safetensors")


def _write_runs(folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for index, name in enumerate(("ce", "mile")):
        run = folder / name
        with SummaryWriter(str(run / "tensorboard")) as writer:
            for step in range(20):
                writer.add_scalar("lm loss", 9.0 - step / 3 - index / 5, step)
        (events,) = (run / "tensorboard").iterdir()
        events.rename(events.with_name("events.out.tfevents.1"))
        ppl = {"ppl": 90.0 + index, "ppl_high": 40.5, "ppl_medium": 400.0, "ppl_low": 4000.0}
        scores = {"0": {"piqa": {"acc": 0.6 + index / 10, "acc_stderr": 0.01}}}
        (run / "evaluation.json").write_text(json.dumps({**ppl, "harness": {"scores": scores}}))
        start = {
            "command": f"train.py --lr {index}",
            "versions": {"torch": "2.13.0"},
            "device": "cpu",
            "processes": 2,
            "checkouts": {"script": {"commit": "0123456789abcdef", "dirty": True}},
            "data": {
                "split": None,
                "blends": [[{"prefix": "data/x", "bin": "9:0123"}]],
                "tokenizer": {"type": "T", "names": [], "files": {"a/tokenizer.json": "5:00"}},
            },
        }
        (run / "run_record.json").write_text(json.dumps({"starts": [start]}))


def copy(sample: Path, folder: Path) -> Path:
    """Copy the folder with its times, by which a resumed run knows its input."""
    return Path(shutil.copytree(sample, folder, symlinks=True))


def state_of(folder: Path) -> dict[str, object]:
    """What lies below the folder: contents of files, targets of links, None for others."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def checkpoint_content(folder: Path) -> dict[str, object]:
    """Tensors and training arguments of a checkpoint, but for the tokenizer's place."""
    source = Checkpoint(folder)
    (common,) = source.reader.object(COMMON)
    args = {name: str(value) for name, value in vars(common["args"]).items()}
    del args["tokenizer_model"]
    return args | {key: source.tensor(key).numpy().tobytes() for key in source.tensors}


def bend(model: Path, changes: Mapping[str, Any], missing: str | None = None) -> None:
    """Write a checkpoint's folder again with other training arguments.

    Args:
        model: the folder of an iteration.
        changes: arguments by name; with "common." before the name, what is stored beside them.
        missing: name of an argument, or so of another entry, to leave out.
    """
    source = Checkpoint(model)
    (common,) = source.reader.object(COMMON)
    for name, value in changes.items():
        holder = common if name.startswith("common.") else vars(common["args"])
        holder[name.removeprefix("common.")] = value
    if missing:
        holder = common if missing.startswith("common.") else vars(common["args"])
        del holder[missing.removeprefix("common.")]
    tensors = {key: source.tensor(key) for key in source.tensors}
    objects = {**dict.fromkeys(source.reader.objects), COMMON: common}
    shutil.rmtree(model)
    sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    write_checkpoint(model, sizes, torch.float32, tensors.__getitem__, objects)
