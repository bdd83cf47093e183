"""The manifest: a file that says what it should, and a fingerprint that moves when the content does."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.manifest import (
    KIND,
    MANIFEST_FILE,
    Manifest,
    ManifestError,
    ShardInfo,
    SplitInfo,
    TokenizerInfo,
    content_fingerprint,
    load_manifest,
)
from trainer.data.shards import write_shard


def sample(folder: Path) -> Manifest:
    """A small folder made by hand, without the builder."""
    splits: dict[str, SplitInfo] = {}
    for split, tokens in {"train": [1, 5, 6, 1, 7], "val": [1, 9, 8]}.items():
        path = folder / f"fineweb_{split}_000000.bin"
        write_shard(path, np.array(tokens))
        info = ShardInfo(path=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                         bytes=path.stat().st_size, tokens=len(tokens))
        splits[split] = SplitInfo(documents=tokens.count(1), raw_bytes=30, text_bytes=20, shards=(info,))
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    tokenizer = TokenizerInfo(path="tokenizer.model", sha256=hashlib.sha256(b"a tokenizer").hexdigest(), bytes=11,
                              vocab_size=300, kind="given", train_documents=0, train_bytes=0)
    manifest = Manifest(
        kind=KIND, version=1, builder_version=1, name="fineweb", source="by hand", source_sha256="0" * 64,
        request_sha256="1" * 64, dropped_documents=0, bos_id=1, tokenizer=tokenizer, splits=splits,
        fingerprint=content_fingerprint(tokenizer, splits, 1),
    )
    manifest.save(folder)
    return manifest


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_saved_and_loaded_are_equal(tmp_path: Path) -> None:
    manifest = sample(tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert list(load_manifest(tmp_path).splits) == ["train", "val"]
    manifest.verify(tmp_path)
    manifest.verify(tmp_path, full=True)


def shard(split: str) -> Callable[[Any], Any]:
    return lambda d: d["splits"][split]["shards"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(kind="other"), r"kind = 'other', expected 'autoresearch-data'"),
        (lambda d: d.update(version=2), r"version = 2, expected 1"),
        (lambda d: d.pop("bos_id"), r"bos_id: missing field"),
        (lambda d: d.update(name=7), r"name = 7: expected a string"),
        (lambda d: d.update(bos_id=True), r"bos_id = True: expected an integer"),
        (lambda d: d.update(bos_id=2), r"fingerprint = .* the manifest was edited"),
        (lambda d: d.update(splits=[]), r"splits = \[\]: expected an object"),
        (lambda d: d["splits"].pop("train"), r"splits: no 'train'"),
        (lambda d: d["splits"].update(test={}), r"unknown split 'test'"),
        (lambda d: d["splits"]["val"].update(shards=[]), r"splits\.val\.shards = \[\]"),
        (lambda d: d["splits"]["val"].update(documents=-1), r"splits\.val\.documents = -1"),
        (lambda d: shard("val")(d).update(path="../fineweb_val_000000.bin"), r"path = '\.\./fineweb"),
        (lambda d: shard("val")(d).update(path="fineweb_train_000009.bin"), r"expected <name>_val_<6 digits>"),
        (lambda d: shard("val")(d).update(tokens=4), r"bytes = 1030: expected 1032 for tokens = 4"),
        (lambda d: shard("val")(d).update(sha256="0" * 64), r"fingerprint"),
        (lambda d: d["tokenizer"].update(path="/etc/passwd"), r"tokenizer\.path = '/etc/passwd'"),
        (lambda d: d.update(tokenizer=None), r"tokenizer = None: expected an object"),
    ],
)
def test_a_damaged_manifest_names_file_field_and_value(
    tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    sample(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ManifestError, match=words) as e:
        load_manifest(tmp_path)
    assert str(tmp_path / MANIFEST_FILE) in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_a_file_that_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(ManifestError, match=re.escape(str(tmp_path))):
        load_manifest(tmp_path)


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="No such file"):
        load_manifest(tmp_path)


def test_quick_check_sees_sizes_and_the_full_one_every_byte(tmp_path: Path) -> None:
    manifest = sample(tmp_path)
    val = tmp_path / "fineweb_val_000000.bin"
    content = val.read_bytes()
    val.write_bytes(content[:-1] + b"\x01")  # same size
    manifest.verify(tmp_path)
    with pytest.raises(ManifestError, match=r"fineweb_val_000000\.bin: sha256 = .* changed or damaged"):
        manifest.verify(tmp_path, full=True)
    val.write_bytes(content[:-2])
    with pytest.raises(ManifestError, match="size = 1028 bytes, manifest says 1030"):
        manifest.verify(tmp_path)
    val.unlink()
    with pytest.raises(ManifestError, match="No such file"):
        manifest.verify(tmp_path)
    val.write_bytes(content)
    (tmp_path / "tokenizer.model").write_bytes(b"b tokenizer")
    assert [str(tmp_path / "tokenizer.model") in p for p in manifest.problems(tmp_path, full=True)] == [True]


def test_fingerprint_follows_content_not_names(tmp_path: Path) -> None:
    manifest = sample(tmp_path)
    t, s = manifest.tokenizer, manifest.splits
    base = manifest.fingerprint
    train, val = s["train"], s["val"]

    def renamed(info: SplitInfo) -> SplitInfo:
        first = info.shards[0]
        other = ShardInfo(path="zzz", sha256=first.sha256, bytes=first.bytes, tokens=first.tokens)
        return SplitInfo(documents=9, raw_bytes=9, text_bytes=9, shards=(other,))

    assert content_fingerprint(t, {"val": renamed(val), "train": renamed(train)}, 1) == base
    swapped = {"train": val, "val": train}
    fewer = {"train": train}
    assert len({base, content_fingerprint(t, swapped, 1), content_fingerprint(t, fewer, 1),
                content_fingerprint(t, s, 2)}) == 4
