"""One view of both kinds of data folder: ours (with ``manifest.json``) and a published FineWeb export.

Published layout: ``<root>/datasets/fineweb10B_sp1024/fineweb_{train,val}_NNNNNN.bin`` and the tokenizer in
``<root>/tokenizers/fineweb_1024_bpe.model``; the challenge's own ``manifest.json`` may lie in ``<root>``,
between, or nowhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from trainer.data.errors import DataError
from trainer.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    canonical_sha256,
    file_sha256,
    is_ours,
    load_manifest,
)
from trainer.data.shards import SPLITS, open_shard, parse_shard_name, read_header


class LayoutError(DataError):
    """A folder without usable shards, a split or a tokenizer that it does not have."""


@dataclass(frozen=True)
class DataFolder:
    """A data folder: where its shards and its tokenizer are. ``manifest`` is None for a published export."""

    path: Path
    kind: Literal["ours", "published"]
    shards: Mapping[str, Sequence[Path]]  # split -> files in reading order
    manifest: Manifest | None
    given_tokenizer: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The SentencePiece model. Raises LayoutError when it cannot be told which one it is."""
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        if self.manifest is not None:
            return self.path / self.manifest.tokenizer.path
        return _published_tokenizer(self.path)

    def split(self, name: str) -> Sequence[Path]:
        """Files of one split. Raises LayoutError naming the splits that exist."""
        if name not in self.shards:
            hint = ("; a published export has no dev or holdout: build from docs_selected.jsonl with "
                    "`autoresearch data build` to get them" if self.kind == "published" else "")
            raise LayoutError(f"{self.path}: no {name!r} split: it has {', '.join(self.shards)}{hint}")
        return self.shards[name]

    def stream(self, name: str) -> TokenStream:
        """The split's shards as one stream of tokens; checks headers and sizes, not the ids."""
        return TokenStream(self.split(name))

    @cached_property
    def fingerprint(self) -> str:
        """What must be equal before two numbers may be compared.

        Ours: the manifest's. Published: over the tokenizer, every byte of the val shards, and the number of
        tokens in each train shard (hashing tens of gigabytes at every start would cost minutes).
        """
        if self.manifest is not None:
            return self.manifest.fingerprint
        return canonical_sha256({
            "kind": "published",
            "tokenizer": file_sha256(self.tokenizer),
            "val": [file_sha256(p) for p in self.shards.get("val", ())],
            "train": [read_header(p).tokens for p in self.shards.get("train", ())],
        })


def open_folder(path: Path, tokenizer: Path | None = None) -> DataFolder:
    """Find out what ``path`` holds. Opens nothing but ``manifest.json``; a missing shard is seen when read.

    Raises LayoutError when there is no such folder, no shards, or shards of two data sets mixed; and
    ManifestError for a damaged manifest of ours.
    """
    if not path.is_dir():
        raise LayoutError(f"{path}: no such folder; `autoresearch data build` makes one")
    if _has_our_manifest(path):
        manifest = load_manifest(path)
        shards = {n: [path / s.path for s in i.shards] for n, i in manifest.splits.items()}
        return DataFolder(path, "ours", shards, manifest, tokenizer)
    found: dict[str, list[tuple[int, Path]]] = {}
    names: set[str] = set()
    for p in sorted(path.iterdir()):
        if parsed := parse_shard_name(p.name):
            names.add(parsed[0])
            found.setdefault(parsed[1], []).append((parsed[2], p))
    if not found:
        raise LayoutError(f"{path}: no shards: expected files named <name>_train_000000.bin and "
                          "<name>_val_000000.bin")
    if len(names) > 1:
        raise LayoutError(f"{path}: shards of several data sets: {', '.join(sorted(names))}; "
                          "keep one to a folder")
    shards = {s: [p for _, p in sorted(found[s])] for s in SPLITS if s in found}
    return DataFolder(path, "published", shards, None, tokenizer)


def _has_our_manifest(path: Path) -> bool:
    """True also when manifest.json cannot be parsed: load_manifest then says what is wrong with it."""
    try:
        return is_ours(json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def _published_tokenizer(path: Path) -> Path:
    root = path.absolute().parent.parent / "tokenizers"
    if m := re.search(r"_sp(\d+)$", path.absolute().name):
        expected = root / f"fineweb_{m[1]}_bpe.model"
        if expected.is_file():
            return expected
    models = sorted(path.glob("*.model")) or sorted(root.glob("*.model"))
    if len(models) != 1:
        seen = ", ".join(m.name for m in models) or "none"
        raise LayoutError(
            f"{path}: which tokenizer? Looked for {root}/fineweb_<vocab>_bpe.model and for a single *.model "
            f"in the folder or there; found: {seen}. Name it (--tokenizer PATH)")
    return models[0]


class TokenStream:
    """Shards joined end to end: random access to a 1-D uint16 stream, without loading it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Map every file of ``paths`` in order. Raises ShardError."""
        self._parts = [open_shard(p) for p in paths]
        self._ends = np.cumsum([len(p) for p in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> npt.NDArray[np.uint16]:
        """A copy of tokens ``start .. start + count``; shorter only where the stream ends first."""
        stop = min(start + count, len(self))
        pieces: list[npt.NDArray[np.uint16]] = []
        part = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[part]) - len(self._parts[part])
            piece = self._parts[part][start - begin : stop - begin]
            pieces.append(piece)
            start += len(piece)
            part += 1
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)

    def read_wrapped(self, start: int, count: int) -> npt.NDArray[np.uint16]:
        """``count`` tokens from ``start``, going round to the beginning as often as needed."""
        pieces: list[npt.NDArray[np.uint16]] = []
        while count > 0:
            piece = self.read(start, count)
            pieces.append(piece)
            count -= len(piece)
            start = (start + len(piece)) % len(self)
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)
