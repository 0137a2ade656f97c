"""PREFIX.partial/: what preprocessing has finished so far, from which the same command goes on."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.common.cli import ToolError
from tools.common.files import json_text, read_json, write_whole
from tools.common.outputs import keep_inputs, output_file, output_place
from tools.data.documents import START, Position
from tools.data.encoder import Batch, Stream
from tools.data.growing_pair import GrowingPair, Sizes, publish, sync_folder

# Names in the folder; LOCK is made first and removed last.
LOCK = "lock"
_NAMES = re.compile(rf"{LOCK}|progress(\.partial\.\d+)?|.+\.(bin|lengths|sequences|idx|info)")


class WorkFolder:
    """Context manager around the unfinished pairs of one run, which `kill -9` may end anywhere.

    The folder holds the pairs as `GrowingPair` and the file `progress`: the settings, the place in
    the input, and how much of each pair belongs to it. `save` brings the pairs to disk and then
    replaces `progress`, so the two always agree; the next run cuts off what came later. Until
    `publish` nothing outside the folder is touched. Left without any `save`, it is removed, but for
    files that are not ours.
    """

    def __init__(
        self, prefix: str, level: str, dtype: type[np.number], settings: dict[str, Any]
    ) -> None:
        """Name the folder.

        Args:
            prefix: --output-prefix.
            level: what a sequence is, `document` or `sentence`; the end of the pairs' names.
            dtype: of the tokens.
            settings: all that the tokens depend on, as JSON can hold it; a folder begun with
                others is refused.
        """
        self.position, self.documents, self.bad_lines, self.unsaved = START, 0, 0, 0
        self.complete = False
        self._prefix, self._level, self._dtype = prefix, level, dtype
        self._settings = settings
        self._folder = Path(prefix + ".partial")
        self._progress = self._folder / "progress"
        self._names: dict[str, Stream] = {}
        self._pairs: dict[str, GrowingPair] = {}
        self._sizes: dict[str, Sizes] = {}

    def __enter__(self) -> WorkFolder:
        """Lock the folder and go on from what it holds."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / LOCK).open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ToolError(f"{self._folder}: another run is writing there") from error
        if self._progress.exists():
            self._resume()
        return self

    def _resume(self) -> None:
        """Read the progress of an earlier run."""
        saved = self._read_progress()
        for name, value in self._settings.items():
            if saved["settings"].get(name) != value:
                raise ToolError(
                    f"{self._folder}: begun with another {name}; finish it with the same command, "
                    "or remove the folder to start anew"
                )
        self.position, self.complete = Position(*saved["position"]), saved["complete"]
        self.documents, self.bad_lines = saved["documents"], saved["bad_lines"]
        for name, (domain, key, *sizes) in saved["pairs"].items():
            self._names[name], self._sizes[name] = (domain, key), Sizes(*sizes)
            if not self.complete:
                self._open(name, self._sizes[name])

    def _read_progress(self) -> dict[str, Any]:
        try:
            saved: dict[str, Any] = read_json(self._progress)
            if saved.pop("checksum") == _checksum(saved):
                return saved
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise ToolError(f"{self._progress}: damaged; remove {self._folder} to start anew")

    def _open(self, name: str, sizes: Sizes) -> None:
        self._pairs[name] = GrowingPair(self._folder / name, self._dtype, sizes)

    def add(self, batch: Batch) -> None:
        """Append what the encoder made of some records.

        Raises:
            ToolError: the names of two domains give the same file name.
        """
        for stream, part in batch.parts.items():
            name = self._name(stream)
            if self._names.setdefault(name, stream) != stream:
                raise ToolError(
                    f"the domains {stream[0]!r} and {self._names[name][0]!r} would share the files "
                    f"{self._prefix}_{name}.*; rename one"
                )
            if name not in self._pairs:
                self._open(name, Sizes())
            self._pairs[name].add(part)
        self.position = batch.end
        self.documents += batch.documents
        self.bad_lines += len(batch.bad_lines)
        self.unsaved += batch.size

    def _name(self, stream: Stream) -> str:
        """Return what stands behind the prefix in the names of a pair."""
        domain, key = stream
        parts = [key, self._level] if domain is None else [file_name(domain), key, self._level]
        return "_".join(parts)

    def save(self, complete: bool = False) -> None:
        """Make what was added so far survive; `complete` when the input has been read to its end.

        Raises:
            ToolError: `complete`, and there is a pair without a token, or none.
        """
        self._sizes = {name: pair.sizes for name, pair in self._pairs.items()}
        if complete:
            self._check_tokens()
        for pair in self._pairs.values():
            pair.flush()
        sync_folder(self._folder)
        content = {
            "settings": self._settings,
            "position": self.position,
            "documents": self.documents,
            "bad_lines": self.bad_lines,
            "complete": complete,
            "pairs": {name: [*self._names[name], *sizes] for name, sizes in self._sizes.items()},
        }
        text = json.dumps({**content, "checksum": _checksum(content)})
        write_whole(self._progress, text + "\n")
        sync_folder(self._folder)
        self.complete, self.unsaved = complete, 0

    def _check_tokens(self) -> None:
        empty = [self._names[name] for name, sizes in self._sizes.items() if not sizes.tokens]
        if empty or not self._sizes:
            domain, key = empty[0] if empty else (None, None)
            where = f" under {key!r}" if key else ""
            raise ToolError(
                f"empty corpus: no token{where} in {domain or 'the input'}; nothing to train on"
            )

    def publish(self) -> dict[str, Sizes]:
        """Turn the complete pairs into the final ones; return their sizes by prefix."""
        self._close()
        for name, sizes in self._sizes.items():
            info = {**sizes._asdict(), "skipped_lines": self.bad_lines, **self._settings}
            prefix = f"{self._prefix}_{name}"
            publish(self._folder / name, prefix, self._dtype, sizes, json_text(info))
        self._progress.unlink()
        return {f"{self._prefix}_{name}": sizes for name, sizes in self._sizes.items()}

    def _close(self) -> None:
        for pair in self._pairs.values():
            pair.close()

    def __exit__(self, *error: object) -> None:
        """Close the files, and remove a folder that nothing can go on from."""
        self._close()
        if not self._progress.exists():
            self._remove()
        self._lock.close()

    def _remove(self) -> None:
        held = sorted(os.listdir(self._folder), key=lambda name: name == LOCK)
        for name in filter(_NAMES.fullmatch, held):
            (self._folder / name).unlink()
        if not os.listdir(self._folder):
            self._folder.rmdir()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_prefix(prefix: str, endings: Sequence[str], inputs: Sequence[str | Path]) -> None:
    """Check, before any work, that pairs can be written and nothing is lost by it.

    Args:
        prefix: --output-prefix.
        endings: what will stand behind PREFIX_ in the names of the pairs; glob patterns.
        inputs: files and folders that are read.

    Raises:
        ToolError: there is no place, or an input or a file of somebody else is in the way.
    """
    flag = f"--output-prefix {prefix}"
    output_place("--output-prefix", prefix + ".partial")
    for ending in endings:
        for suffix in (".bin", ".idx", ".info"):
            for path in glob.glob(f"{glob.escape(prefix)}_{ending}{suffix}"):
                output_file(flag, path, inputs)
    folder = Path(prefix + ".partial")
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise ToolError(f"{flag}: {folder} is in the way; choose another prefix")
    held = sorted(os.listdir(folder)) if folder.exists() else []
    others = [name for name in held if not _NAMES.fullmatch(name) or LOCK not in held]
    if others:
        raise ToolError(f"{flag}: {folder} holds other files ({others[0]}); choose another prefix")
    keep_inputs(flag, [folder / name for name in held], inputs)


def file_name(domain: str) -> str:
    """Return a domain's name as it stands in file names: `Gutenberg (PG-19)`, `Gutenberg_PG-19`."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", domain).strip("_")
