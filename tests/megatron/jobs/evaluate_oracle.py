"""Prints cross-entropies of a checkpoint, summed by bucket with plain loops in float64.

usage: evaluate_oracle.py CHECKPOINT PREFIX FREQUENCIES LENGTH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def main() -> None:
    """Read the model as evaluate.py does, but take the logits and do the rest by hand."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    from tools.checkpoint.megatron_model import checkpoint_folder, choose_device, load_model

    checkpoint, prefix, frequencies, length = *sys.argv[1:4], int(sys.argv[4])
    tokens = np.fromfile(prefix + ".bin", dtype=np.int32).tolist()
    buckets = json.loads(Path(frequencies).read_text())["bucket"]
    device = choose_device(cpu=True)
    model = load_model(checkpoint_folder(checkpoint), device).model
    sums, counts = [0.0] * 3, [0] * 3
    for start in range(0, len(tokens) - 1, length):
        inputs = torch.tensor([tokens[start : min(start + length, len(tokens) - 1)]])
        positions = torch.arange(inputs.size(1))[None]
        with torch.no_grad():
            logits = model(inputs, positions, None)[0].double()
        for offset, row in enumerate(logits):
            target = tokens[start + offset + 1]
            sums[buckets[target]] += float(row.logsumexp(0) - row[target])
            counts[buckets[target]] += 1
    print(json.dumps({"sums": sums, "counts": counts}))


if __name__ == "__main__":
    main()
