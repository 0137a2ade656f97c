"""Prints how far a Megatron checkpoint and a Hugging Face folder differ, both in fp32.

usage: convert_oracle.py CHECKPOINT FOLDER [PREFIX]

On the first tokens of a data pair, or on random ones: the largest difference of a logit and of a
token's cross-entropy, and the largest logit, for scale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LENGTH, ROWS = 64, 8


def main() -> None:
    """Compare the two models."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from tools.checkpoint.megatron_model import checkpoint_folder, choose_device, load_model

    megatron = load_model(checkpoint_folder(sys.argv[1]), choose_device(cpu=True)).model.float()
    huggingface = AutoModelForCausalLM.from_pretrained(sys.argv[2]).eval().float()
    vocabulary = huggingface.config.vocab_size
    tokens = torch.randint(
        vocabulary, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0)
    )
    if len(sys.argv) > 3:
        kind = np.uint16 if vocabulary < 65500 else np.int32
        data = np.fromfile(sys.argv[3] + ".bin", dtype=kind)[: tokens.numel()]
        tokens = torch.from_numpy(data.astype(np.int64)).view_as(tokens)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(LENGTH).expand_as(inputs)
    with torch.no_grad():
        ours = megatron(inputs, positions, None)[..., :vocabulary]
        losses = megatron(inputs, positions, None, labels=labels)
        theirs = huggingface(inputs).logits
    expected = torch.nn.functional.cross_entropy(theirs.transpose(1, 2), labels, reduction="none")
    figures = {"logits": ours - theirs, "losses": losses - expected, "scale": theirs}
    print(json.dumps({name: float(values.abs().max()) for name, values in figures.items()}))


if __name__ == "__main__":
    main()
