"""Write a Megatron dataset of short documents; its prefix is the last argument.

Documents of 3 to 40 tokens, so that --eod-mask-loss masks another number of tokens in each sample.
"""

import sys

import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

END_OF_DOCUMENT = 249


def main(prefix: str) -> None:
    """Write PREFIX.bin and PREFIX.idx."""
    random = torch.Generator().manual_seed(0)
    builder = IndexedDatasetBuilder(prefix + ".bin")
    for length in torch.randint(3, 41, (600,), generator=random).tolist():
        tokens = torch.randint(END_OF_DOCUMENT, (length,), generator=random)
        builder.add_document(torch.cat([tokens, torch.tensor([END_OF_DOCUMENT])]), [length + 1])
    builder.finalize(prefix + ".idx")


if __name__ == "__main__":
    main(sys.argv[-1])
