"""Write a Megatron dataset of short documents into the folder that the last argument names.

Documents of 3 to 40 tokens, so that --eod-mask-loss masks another number of tokens in each sample.
"""

import sys

import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

END_OF_DOCUMENT = 250


def main(folder: str) -> None:
    """Write documents.bin and documents.idx."""
    prefix = f"{folder}/documents"
    random = torch.Generator().manual_seed(0)
    builder = IndexedDatasetBuilder(prefix + ".bin")
    for length in torch.randint(3, 41, (600,), generator=random).tolist():
        tokens = torch.randint(END_OF_DOCUMENT, (length,), generator=random)
        builder.add_document(torch.cat([tokens, torch.tensor([END_OF_DOCUMENT])]), [length + 1])
    builder.finalize(prefix + ".idx")


if __name__ == "__main__":
    main(sys.argv[-1])
