"""What a run trains on, as its checkpoints remember it: data and tokenizer, known by their content.

Not by their paths: size and SHA-256 of each .bin and .idx, or else of the file that --data-path
names, and of each file of the tokenizer; of the whole file up to 64 MiB, and of 64 blocks of 1 MiB
at equal distances, first and last included, in a larger one. Of what is no readable local file,
such as a folder or data in object storage, only the name is known. A script may read its data in a
way of its own, so nothing that cannot be read here stops the job.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_mile.integration.arguments import Namespace
from megatron_mile.run_record.data_files import check_pairs

BLOCK, BLOCKS = 1 << 20, 64
# Files that are hashed at a time: hashing and reading leave Python's lock to the others.
_READERS = 8
_TOKENIZER_FLAGS = ("tokenizer_model", "vocab_file", "merge_file")
# In a folder that may hold a model's weights too.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt"),
)

Blend = tuple[Sequence[str], Sequence[float] | None]


def data_of(args: Namespace) -> dict[str, Any]:
    """Describe the data of a run.

    Returns:
        "split"; "blends": for each of one or three blends, a list of "prefix", "weight" and the
        `fingerprint` of "bin" and "idx" or of "file", as far as they can be read, none for mock
        data; and "tokenizer".

    Raises:
        MileError: `check_pairs` refuses it.
    """
    blends = _blends(args)
    names = list(dict.fromkeys(name for prefixes, _ in blends for name in prefixes))
    check_pairs(names)
    with ThreadPoolExecutor(_READERS) as pool:
        contents = dict(zip(names, pool.map(_content, names), strict=True))
    return {
        "split": getattr(args, "split", None),
        "blends": [_entries(blend, contents) for blend in blends],
        "tokenizer": tokenizer_of(args),
    }


def _blends(args: Namespace) -> list[Blend]:
    """What --data-path and its like name: one blend, or one each to train, validate and test."""
    from megatron.training.utils import get_blend_and_blend_per_split

    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except Exception:  # flags that are not Megatron's, or of another meaning: the script knows
        return []
    return [part for part in (per_split or [blend]) if part]


def _content(prefix: str) -> dict[str, str]:
    """Fingerprints of the pair of a prefix, or else of the file of that name, if it can be read."""
    pair = {end: f"{prefix}.{end}" for end in ("bin", "idx")}
    is_pair = all(map(os.path.isfile, pair.values()))
    return _fingerprints(pair if is_pair else {"file": prefix})


def _fingerprints(paths: Mapping[str, str]) -> dict[str, str]:
    """The `fingerprint` of each file by its name, of those that can be read."""
    found = {}
    for name, path in paths.items():
        if os.path.isfile(path):  # to open a pipe would wait for its other end
            with contextlib.suppress(OSError):
                found[name] = fingerprint(path)
    return found


def _entries(blend: Blend, contents: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    prefixes, weights = blend
    return [
        {"prefix": prefix, "weight": weights[index] if weights else None, **contents[prefix]}
        for index, prefix in enumerate(prefixes)
    ]


def tokenizer_of(args: Namespace) -> dict[str, Any]:
    """Describe the tokenizer of a run.

    Returns:
        "type"; "names" as the flags give them; "files": the `fingerprint` of each by its path.
    """
    given: list[Any] = [getattr(args, flag, None) for flag in _TOKENIZER_FLAGS]
    names = [name for name in given if name]
    files = _fingerprints({path: path for name in names for path in _files(name)})
    return {"type": getattr(args, "tokenizer_type", None), "names": names, "files": files}


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
    if not _same_blends(before, now):
        changes.append(_change(_names(before), _names(now), "content, weights or --split"))
    one, other = before.get("tokenizer"), now.get("tokenizer")
    if one and other and not _same_tokenizer(one, other):
        called = [" ".join([str(each["type"]), *each["names"]]) for each in (one, other)]
        changes.append("tokenizer " + _change(called[0], called[1], "content"))
    return changes


def _change(before: str, now: str, what: str) -> str:
    return f"{before}: {what} changed" if before == now else f"{before} -> {now}"


def _same_blends(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare what counts of the data; --split only where it splits."""
    blends = one["blends"], other["blends"]
    if [len(blend) for blend in blends[0]] != [len(blend) for blend in blends[1]]:
        return False
    if len(blends[0]) == 1 and one["split"] != other["split"]:
        return False
    entries = ([entry for blend in each for entry in blend] for each in blends)
    return all(map(_same_entry, *entries))


def _same_entry(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare weight and content, or where that is not known of both, the name."""
    known = [entry.keys() - {"prefix", "weight"} for entry in (one, other)]
    names = known[0] | known[1] if all(known) else {"prefix"}
    return all(one.get(name) == other.get(name) for name in {"weight", *names})


def _same_tokenizer(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare type and content, or where that is not known of both, the name."""
    if one["files"] and other["files"]:
        same = sorted(one["files"].values()) == sorted(other["files"].values())
    else:
        same = one["names"] == other["names"]
    return bool(same and one["type"] == other["type"])


def _names(data: Mapping[str, Any]) -> str:
    names = [entry["prefix"] for blend in data["blends"] for entry in blend]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "mock data"
