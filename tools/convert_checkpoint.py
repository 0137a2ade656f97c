r"""Converts a LLaMA model between a Megatron checkpoint and a Hugging Face folder.

    python tools/convert_checkpoint.py --to hf --load runs/mile/checkpoints --output models/mile
    python tools/convert_checkpoint.py --to megatron --load models/mile --output runs/mile-again

To hf: from a torch_dist checkpoint of GPTModel, or of HybridModel with the layers "*-*-...", which
any parallel layout has trained with --swiglu --normalization RMSNorm --disable-bias-linear
--position-embedding-type rope. The folder has config.json, generation_config.json, safetensors
files and the tokenizer's; transformers loads it as LlamaForCausalLM. The optimizer stays behind.

To megatron: a checkpoint of weights alone, which --load takes at any parallel layout; give
--finetune with it. --use-checkpoint-args takes the model's flags from it, but for --norm-epsilon.
--model gpt is for GPTModel with layers of Transformer Engine or local ones, and for HybridModel
with those of Transformer Engine (in megatron-core 0.19); hybrid and hybrid-local are HybridModel's
own, with those of Transformer Engine or local ones.

A tensor that is not the model's, is missing or has another size is an error that names it, and so
is a setting that LLaMA does not have. Each key of config.json is honoured, known to change nothing
that the model computes, or refused by name, as is the scaled RoPE of Llama 3.1 and later, which a
Megatron checkpoint does not keep. Weights are moved and never computed with: without --dtype they
are the same bits, there and back.

A SentencePiece model (--tokenizer-type Llama2Tokenizer and its like) becomes tokenizer.json, from
which AutoTokenizer gives the ids of the training, compared on random texts: no BOS by itself, and
</s> within a text is text. That is for models like LLaMA's, BPE without normalizer; others are
refused, as transformers would read them by rules of its own.

The vocabulary in Hugging Face's folder has the tokenizer's size. The rows by which Megatron pads it
go to megatron_padding.safetensors beside the model, and from there come back bit for bit; without
that file, padding is of zeros, to a multiple of 128. Megatron's cross-entropy counts the padding:
where there is some, it is a little higher than the converted model's. Where neither a tokenizer nor
--vocab-size says how many tokens there are, the padding stays part of the vocabulary. A tokenizer
of fewer tokens than the training's is refused unless --vocab-size is given.

One process without a GPU, and memory for Megatron's largest tensor and 5 GB. --output is whole or
not there. (Megatron-Bridge, NVIDIA's library for this, needs Transformer Engine and ModelOpt.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.checkpoint.llama import FORMS
from tools.checkpoint.llama_config import DTYPES
from tools.checkpoint.to_hf import to_hf
from tools.checkpoint.to_megatron import to_megatron
from tools.common.cli import new_parser, run_tool

PROG = "tools/convert_checkpoint.py"


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--to", required=True, choices=("hf", "megatron"), help="what to write")
    add("--load", required=True, help="Megatron checkpoint folder, or Hugging Face folder")
    add("--output", required=True, help="folder to write; it must not exist")
    add("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    group = parser.add_argument_group("to hf")
    add = group.add_argument
    add("--ckpt-step", type=int, help="iteration (default: the latest)")
    add(
        "--tokenizer-model",
        help="folder of the tokenizer, or SentencePiece's .model (default: that of the training)",
    )
    add("--vocab-size", type=int, help="tokens without padding (default: the tokenizer's)")
    group = parser.add_argument_group("to megatron")
    group.add_argument("--model", choices=FORMS, default="gpt", help="default: %(default)s")
    return parser


def convert_checkpoint(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags.

    Raises:
        ToolError: what is read is no model of LLaMA's kind, or the output cannot be written.
    """
    note = (to_hf if args.to == "hf" else to_megatron)(args)
    print(f"{args.output}: {note}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), convert_checkpoint, argv)


if __name__ == "__main__":
    main()
