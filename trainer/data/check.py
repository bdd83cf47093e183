"""Look through a data folder of either kind and say what it holds and what is wrong with it.

Published exports carry no checksums (challenge_spec, section 1), so for them headers, sizes, ids and the
counts of the challenge's own manifest are all there is to check; ours are hashed as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.bytecount import ByteTable, load_processor
from trainer.data.errors import DataError
from trainer.data.layout import DataFolder, TokenStream, open_folder
from trainer.data.manifest import MANIFEST_FILE, ManifestError, read_json
from trainer.data.shards import ShardError, open_shard, parse_shard_name

_STEP = 1 << 22  # tokens looked at per step
_TRAIN_BYTES_TOKENS = 50_000_000  # of a longer train split, bytes are counted on this many from the front


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """One split. ``text_bytes`` and ``counted_tokens`` belong together: bytes of the first so many tokens."""

    shards: int
    tokens: int
    documents: int  # BOS tokens
    counted_tokens: int
    text_bytes: int

    @property
    def tokens_per_byte(self) -> float:
        return self.counted_tokens / self.text_bytes if self.text_bytes else 0.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Outcome of :func:`check`. The folder is sound when ``problems`` is empty; ``notes`` do no harm."""

    folder: str
    kind: str  # "ours" | "published"
    tokenizer: str
    vocab_size: int
    fingerprint: str  # "" when the folder is too damaged for one
    seq_len: int
    scored_tokens: int  # predicted targets of a full val evaluation at seq_len
    scored_bytes: int  # the text bytes that those stand for: the B of bits per byte
    splits: dict[str, SplitReport]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with ``ok`` and each split's tokens per byte."""
        data: dict[str, Any] = dataclasses.asdict(self)
        data["ok"] = self.ok
        for name, split in self.splits.items():
            data["splits"][name]["tokens_per_byte"] = split.tokens_per_byte
        return data

    def lines(self) -> list[str]:
        """The report for a terminal."""
        out = [f"{self.folder}: {self.kind} layout, vocabulary {self.vocab_size}, tokenizer {self.tokenizer}"]
        for name, s in self.splits.items():
            out.append(f"  {name:8} {s.tokens:>14,} tokens  {s.documents:>11,} documents  "
                       f"{s.shards:>4} shards  {s.tokens_per_byte:.4f} tokens/byte")
        if self.scored_bytes:
            out.append(f"  val at seq_len {self.seq_len}: {self.scored_tokens:,} scored tokens, "
                       f"{self.scored_bytes:,} scored bytes")
        if self.fingerprint:
            out.append(f"  fingerprint {self.fingerprint}")
        out += [f"  note: {n}" for n in self.notes]
        out += [f"  PROBLEM: {p}" for p in self.problems]
        out.append("  sound" if self.ok else f"  {len(self.problems)} problem(s)")
        return out


def check(folder: Path, *, tokenizer: Path | None = None, seq_len: int = 1024, full: bool = True) -> Report:
    """Check every shard's header, size and ids, BOS counts, the manifest, and count tokens and bytes.

    ``tokenizer`` names the SentencePiece model where the layout does not tell. ``full=False`` skips the
    SHA-256 of the files. What is wrong inside the folder is listed in the report, each entry with file,
    field and value. Raises DataError only when nothing can be listed: no folder, no shards, no usable
    tokenizer, a manifest of ours that cannot be read.
    """
    data = open_folder(Path(folder), tokenizer)
    model = data.tokenizer
    sp = load_processor(model)
    table = ByteTable.from_processor(sp, name=str(model))
    problems: list[str] = []
    notes: list[str] = []
    if data.manifest is not None:
        problems += data.manifest.problems(data.path, full)
        if data.manifest.tokenizer.vocab_size != sp.vocab_size():
            problems.append(f"{data.path / MANIFEST_FILE}: tokenizer.vocab_size = "
                            f"{data.manifest.tokenizer.vocab_size}, {model} has {sp.vocab_size()} pieces")
    splits: dict[str, SplitReport] = {}
    for name, paths in data.shards.items():
        found = _check_split(name, paths, table, sp.bos_id(), problems, notes)
        if found is not None:
            splits[name] = found
    _compare_counts(data, splits, problems, notes)
    scored_tokens, scored_bytes = _scored(data, splits, table, seq_len, notes)
    try:
        fingerprint = data.fingerprint
    except (DataError, OSError):
        fingerprint = ""  # the shard that prevents it is among the problems
    return Report(
        folder=str(data.path), kind=data.kind, tokenizer=str(model), vocab_size=sp.vocab_size(),
        fingerprint=fingerprint, seq_len=seq_len, scored_tokens=scored_tokens, scored_bytes=scored_bytes,
        splits=splits, problems=tuple(dict.fromkeys(problems)), notes=tuple(notes),
    )


def _check_split(
    name: str, paths: Sequence[Path], table: ByteTable, bos: int, problems: list[str], notes: list[str]
) -> SplitReport | None:
    """Totals of one split; None when a shard of it is broken (then ``problems`` says which and how)."""
    tokens = documents = 0
    sound = True
    for i, path in enumerate(paths):
        try:
            shard = open_shard(path, table.vocab_size)
        except ShardError as e:
            problems.append(str(e))
            sound = False
            continue
        parsed = parse_shard_name(path.name)
        if parsed is not None and parsed[2] != i:
            notes.append(f"{path}: shard {parsed[2]} is number {i} in reading order: some are not here")
        if tokens == 0 and len(shard) and int(shard[0]) != bos:
            problems.append(f"{path}: token 0 = {int(shard[0])}, expected bos_id = {bos}: "
                            "a split starts with a document")
        for start in range(0, len(shard), _STEP):
            documents += int(np.count_nonzero(shard[start : start + _STEP] == bos))
        tokens += len(shard)
    if not sound:
        return None
    stream = TokenStream(paths)
    counted = min(tokens, _TRAIN_BYTES_TOKENS) if name == "train" else tokens
    return SplitReport(shards=len(paths), tokens=tokens, documents=documents, counted_tokens=counted,
                       text_bytes=_text_bytes(stream, counted, table))


def _text_bytes(stream: TokenStream, tokens: int, table: ByteTable) -> int:
    """Bytes of the stream's first ``tokens`` tokens, but for token 0 (a BOS, 0 bytes)."""
    starts = range(0, tokens - 1, _STEP)
    return sum(table.count_stream(stream.read(s, min(_STEP, tokens - 1 - s) + 1)) for s in starts)


def _scored(
    data: DataFolder, splits: dict[str, SplitReport], table: ByteTable, seq_len: int, notes: list[str]
) -> tuple[int, int]:
    """(targets, bytes) of a full val evaluation: floor((N - 1) / seq_len) windows."""
    if "val" not in splits:
        notes.append("no readable val split: nothing to score")
        return 0, 0
    targets = (splits["val"].tokens - 1) // seq_len * seq_len
    if targets < 1:
        notes.append(f"val has {splits['val'].tokens} tokens: less than one window of seq_len = {seq_len}")
        return 0, 0
    return targets, _text_bytes(data.stream("val"), targets + 1, table)


def _compare_counts(
    data: DataFolder, splits: dict[str, SplitReport], problems: list[str], notes: list[str]
) -> None:
    """Hold what was counted against the manifest, ours or the challenge's."""
    if data.manifest is not None:
        where = data.path / MANIFEST_FILE
        for name, split in splits.items():
            said = data.manifest.splits[name]
            pairs = [("documents", said.documents, split.documents), ("tokens", said.tokens, split.tokens)]
            if split.counted_tokens == split.tokens:
                pairs.append(("text_bytes", said.text_bytes, split.text_bytes))
            problems += [f"{where}: splits.{name}.{field} = {told}, the shards hold {seen}"
                         for field, told, seen in pairs if told != seen]
        return
    found = _challenge_stats(data.path, notes)
    if found is None:
        return
    where, stats = found
    for name, split in splits.items():
        files = stats.get(f"files_{name}")
        if isinstance(files, int) and files != split.shards:
            notes.append(f"{name}: {split.shards} of {files} published shards are here")
            continue
        for field, seen in (("tokens", split.tokens), ("docs", split.documents)):
            told = stats.get(f"{field}_{name}")
            if isinstance(told, int) and told != seen:
                problems.append(f"{where}: {field}_{name} = {told}, the shards hold {seen}: "
                                "manifest and export are of different dates; fetch both again")


def _challenge_stats(folder: Path, notes: list[str]) -> tuple[Path, dict[str, Any]] | None:
    """This data set's ``stats`` in a challenge manifest beside the folder or up to two levels above it."""
    folder = folder.absolute()
    for place in (folder, folder.parent, folder.parent.parent):
        path = place / MANIFEST_FILE
        if not path.is_file():
            continue
        try:
            content = read_json(path)
        except ManifestError as e:
            notes.append(str(e))
            continue
        datasets = content.get("datasets") if isinstance(content, dict) else None
        for entry in datasets if isinstance(datasets, list) else ():
            stats = entry.get("stats") if isinstance(entry, dict) else None
            if isinstance(stats, dict) and entry.get("name") == folder.name:
                return path, stats
    notes.append("no manifest that lists this data set: counts cannot be compared with what was published")
    return None
