"""What a run trains on, as its checkpoints remember it: data and tokenizer, known by their content.

Not by their paths: size and SHA-256 of each .bin and .idx and of each file of the tokenizer, of the
whole file up to 64 MiB, and of 64 blocks of 1 MiB at equal distances, first and last included, in a
larger one. Of what is no local file, such as data in object storage, only the name is known.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_mile.integration.arguments import Namespace
from megatron_mile.run_record.data_files import check_pairs

BLOCK, BLOCKS = 1 << 20, 64
_TOKENIZER_FLAGS = ("tokenizer_model", "vocab_file", "merge_file")
# In a folder that may hold a model's weights too.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt"),
)


def data_of(args: Namespace) -> dict[str, Any]:
    """Describe the data of a run.

    Returns:
        "split"; "blends": for each of one or three blends, a list of "prefix", "weight" and the
        `fingerprint` of the .bin and .idx, none for mock data; and "tokenizer".

    Raises:
        OSError: A file cannot be read.
        MileError: `check_pairs` refuses it.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [part for part in (per_split or [blend]) if part]
    check_pairs([prefix for prefixes, _ in blends for prefix in prefixes if "://" not in prefix])
    return {
        "split": args.split,
        "blends": [list(_pairs(*part)) for part in blends],
        "tokenizer": tokenizer_of(args),
    }


def _pairs(prefixes: list[str], weights: list[float] | None) -> Iterator[dict[str, Any]]:
    for index, prefix in enumerate(prefixes):
        ends = () if "://" in prefix else ("bin", "idx")
        files = {end: fingerprint(f"{prefix}.{end}") for end in ends}
        yield {"prefix": prefix, "weight": weights[index] if weights else None, **files}


def tokenizer_of(args: Namespace) -> dict[str, Any]:
    """Describe the tokenizer of a run.

    Returns:
        "type"; "names" as the flags give them; "files": the `fingerprint` of each by its path.

    Raises:
        OSError: A file cannot be read.
    """
    given: list[Any] = [getattr(args, flag, None) for flag in _TOKENIZER_FLAGS]
    names = [name for name in given if name]
    files = {path: fingerprint(path) for name in names for path in _files(name)}
    return {"type": args.tokenizer_type, "names": names, "files": files}


def _files(name: str) -> list[str]:
    """The files of a tokenizer's file or folder; none of a name that the Hub knows."""
    if os.path.isfile(name):
        return [name]
    known = (os.path.join(name, file) for file in _TOKENIZER_FILES)
    return [path for path in known if os.path.isfile(path)]


def fingerprint(path: str) -> str:
    """Size in bytes and hash of a file, as the top of this module says.

    Raises:
        OSError: It cannot be read.
    """
    size = os.path.getsize(path)
    last, digest = size - BLOCK, hashlib.sha256()
    with open(path, "rb") as file:
        for index in range(BLOCKS):
            # Blocks follow each other without a gap in a file that is not larger than all of them.
            file.seek(index * BLOCK if size <= BLOCK * BLOCKS else last * index // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return f"{size}:{digest.hexdigest()}"


def changed_data(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Name what differs between the data of a checkpoint and this job's, and between tokenizers.

    Args:
        stored: Megatron's args in the checkpoint.
        current: those of this job.
    """
    before, now = stored.get("mile_data"), current.get("mile_data")
    if not before or not now:
        return []
    changes = []
    if _content(before) != _content(now):
        changes.append(_change(_names(before), _names(now), "content, weights or --split"))
    one, other = before.get("tokenizer"), now.get("tokenizer")
    if one and other and _tokenizer_content(one) != _tokenizer_content(other):
        called = [" ".join([str(each["type"]), *each["names"]]) for each in (one, other)]
        changes.append("tokenizer " + _change(called[0], called[1], "content"))
    return changes


def _change(before: str, now: str, what: str) -> str:
    return f"{before}: {what} changed" if before == now else f"{before} -> {now}"


def _content(data: Mapping[str, Any]) -> list[Any]:
    """What counts of the data: not where it lies, if its content is known; --split if it splits."""
    blends = [
        [{**pair, "prefix": None if "bin" in pair else pair["prefix"]} for pair in blend]
        for blend in data["blends"]
    ]
    return [blends, data["split"] if len(blends) == 1 else None]


def _tokenizer_content(tokenizer: Mapping[str, Any]) -> list[Any]:
    """What counts of a tokenizer: likewise."""
    files = tokenizer["files"]
    return [tokenizer["type"], sorted(files.values()) if files else tokenizer["names"]]


def _names(data: Mapping[str, Any]) -> str:
    names = [pair["prefix"] for blend in data["blends"] for pair in blend]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "mock data"
