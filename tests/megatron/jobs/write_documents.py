"""Write a Megatron dataset of short documents; its prefix is the last argument.

Documents of 3 to 40 tokens, so that --eod-mask-loss masks another number of tokens in each sample.
A first argument that is a number is that of the documents' different tokens, 1 for their end alone;
all others, a job's flags, mean nothing here.
"""

import sys

import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

END_OF_DOCUMENT = 249


def main(prefix: str, kinds: int = END_OF_DOCUMENT + 1) -> None:
    """Write PREFIX.bin and PREFIX.idx."""
    random = torch.Generator().manual_seed(0)
    builder = IndexedDatasetBuilder(prefix + ".bin")
    for length in torch.randint(3, 41, (600,), generator=random).tolist():
        tokens = torch.randint(END_OF_DOCUMENT, (length,), generator=random)
        tokens = tokens.clamp(min=END_OF_DOCUMENT + 1 - kinds)
        builder.add_document(torch.cat([tokens, torch.tensor([END_OF_DOCUMENT])]), [length + 1])
    builder.finalize(prefix + ".idx")


if __name__ == "__main__":
    first, prefix = sys.argv[1], sys.argv[-1]
    main(prefix, *([int(first)] if first.isdecimal() else []))
