"""The checker: sound folders of both layouts pass, and every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

from tests.trainer.test_data_build import make_texts, write_jsonl
from trainer.data.build import build
from trainer.data.bytecount import ByteTableError
from trainer.data.check import check
from trainer.data.layout import LayoutError, open_folder
from trainer.data.manifest import ManifestError
from trainer.data.shards import open_shard, write_shard


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("check")
    build(write_jsonl(base / "docs.jsonl", make_texts(150)), base / "data", 300, val_docs=20, holdout_docs=5,
          dev_docs=5, shard_tokens=4000)
    return base / "data"


@pytest.fixture
def ours(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "data"))


@pytest.fixture
def published(built: Path, tmp_path: Path) -> Path:
    """The same shards in the published layout, with the challenge's manifest where its downloader puts it."""
    folder = tmp_path / "datasets" / "fineweb10B_sp300"
    folder.mkdir(parents=True)
    (tmp_path / "tokenizers").mkdir()
    shutil.copy(built / "tokenizer.model", tmp_path / "tokenizers" / "fineweb_300_bpe.model")
    (tmp_path / "tokenizers" / "fineweb_999_bpe.model").write_bytes(b"another one")
    stats = {}
    for split in ("train", "val"):
        shards = sorted(built.glob(f"fineweb_{split}_*.bin"))
        for s in shards:
            shutil.copy(s, folder)
        ids = np.concatenate([open_shard(s) for s in shards])
        stats |= {f"files_{split}": len(shards), f"tokens_{split}": len(ids), f"docs_{split}": int((ids == 1).sum())}
    content = {"version": "10B", "datasets": [{"name": "other"}, {"name": folder.name, "stats": stats}]}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    return folder


def test_a_sound_folder_of_ours(ours: Path) -> None:
    report = check(ours, seq_len=64)
    assert report.ok and report.kind == "ours" and report.vocab_size == 300
    assert {n: s.documents for n, s in report.splits.items()} == {"train": 120, "dev": 5, "val": 20, "holdout": 5}
    sp = spm.SentencePieceProcessor(model_file=str(ours / "tokenizer.model"))
    ids = np.concatenate([open_shard(p) for p in sorted(ours.glob("fineweb_val_*.bin"))])
    n = (len(ids) - 1) // 64 * 64
    documents = np.split(ids[: n + 1], np.flatnonzero(ids[: n + 1] == 1)[1:])  # each begins with its BOS
    decoded = sum(len(sp.decode(d[1:].tolist()).encode("utf-8")) for d in documents)
    assert (report.scored_tokens, report.scored_bytes) == (n, decoded)
    assert json.loads(json.dumps(report.to_dict()))["splits"]["val"]["tokens_per_byte"] > 0
    text = "\n".join(report.lines())
    assert "sound" in text and f"{report.scored_bytes:,}" in text and report.fingerprint in text


def test_a_sound_published_folder(published: Path, ours: Path) -> None:
    report = check(published, seq_len=64)
    assert report.ok and report.kind == "published" and report.notes == ()
    assert report.tokenizer.endswith("fineweb_300_bpe.model")
    own = check(ours, seq_len=64)
    assert report.scored_bytes == own.scored_bytes and report.splits["val"] == own.splits["val"]


def test_per_token_byte_files_are_not_validation_shards(published: Path) -> None:
    before = check(published, seq_len=64)
    write_shard(published / "fineweb_val_bytes_000000.bin", np.full(100, 7))
    assert check(published, seq_len=64) == before


def test_published_counts_are_held_against_the_challenge_manifest(published: Path) -> None:
    path = published.parent.parent / "manifest.json"
    content = json.loads(path.read_text())
    content["datasets"][1]["stats"]["tokens_val"] += 1
    path.write_text(json.dumps(content))
    (problem,) = check(published).problems
    assert str(path) in problem and "tokens_val" in problem
    sorted(published.glob("*_train_*"))[-1].unlink()  # a partial download is fine, and noted
    content["datasets"][1]["stats"]["tokens_val"] -= 1
    path.write_text(json.dumps(content))
    report = check(published)
    assert report.ok and any("published shards are here" in n for n in report.notes)
    path.unlink()
    assert check(published).ok and any("no manifest" in n for n in check(published).notes)


def test_a_missing_shard_in_the_middle_is_noted(published: Path) -> None:
    sorted(published.glob("*_train_*"))[0].unlink()
    report = check(published)
    assert any("fineweb_train_000001.bin: shard 1 is number 0" in n for n in report.notes)


def flip(path: Path, at: int) -> None:
    """Change one bit; in a tokenizer's middle lies its normaliser table, where it still parses."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: flip(f / "fineweb_train_000000.bin", 2000), "sha256"),
        (lambda f: (f / "fineweb_train_000001.bin").unlink(), "No such file"),
        (lambda f: (f / "fineweb_val_000000.bin").write_bytes(b"x" * 1024), "magic"),
        (lambda f: write_shard(f / "fineweb_dev_000000.bin", [1, 5, 300]), "token 2 = 300"),
        (lambda f: write_shard(f / "fineweb_dev_000000.bin", [7, 5, 299]), "token 0 = 7, expected bos_id = 1"),
        (lambda f: write_shard(f / "fineweb_dev_000000.bin", [1, 5, 1]), "splits.dev.documents = 5, the shards hold 2"),
        (lambda f: flip(f / "tokenizer.model", 100_000), "tokenizer.model: sha256"),
    ],
)
def test_damage_is_found_and_named(ours: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(ours)
    report = check(ours)
    assert not report.ok
    assert any(words in p and str(ours) in p for p in report.problems), report.problems
    assert any("PROBLEM" in line for line in report.lines())


def test_shards_of_another_tokenizer_are_found(published: Path, tmp_path: Path) -> None:
    write_shard(published / "fineweb_val_000000.bin", [1, 4095])
    assert any("token 1 = 4095, expected an id below vocab_size = 300" in p for p in check(published).problems)


def test_what_cannot_be_checked_at_all(ours: Path, published: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="no such folder"):
        check(tmp_path / "gone")
    with pytest.raises(LayoutError, match="no shards"):
        check(tmp_path)
    shutil.copy(published / "fineweb_val_000000.bin", published / "other_val_000000.bin")
    with pytest.raises(LayoutError, match="several data sets: fineweb, other"):
        check(published)
    (ours / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ByteTableError, match=r"tokenizer\.model: empty"):
        check(ours)
    (ours / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="not JSON"):
        check(ours)


def test_which_tokenizer(published: Path, tmp_path: Path) -> None:
    assert open_folder(published).tokenizer == tmp_path / "tokenizers" / "fineweb_300_bpe.model"
    renamed = published.rename(published.with_name("mine"))
    with pytest.raises(LayoutError, match="which tokenizer"):
        check(renamed)
    assert check(renamed, tokenizer=tmp_path / "tokenizers" / "fineweb_300_bpe.model").ok
    shutil.copy(tmp_path / "tokenizers" / "fineweb_300_bpe.model", renamed / "t.model")
    assert open_folder(renamed).tokenizer == renamed / "t.model"


def test_published_fingerprint_follows_what_is_scored(published: Path) -> None:
    first = open_folder(published).fingerprint
    assert open_folder(published).fingerprint == first
    tokens = open_shard(published / "fineweb_val_000000.bin").copy()
    tokens[5] ^= 1
    write_shard(published / "fineweb_val_000000.bin", tokens)
    second = open_folder(published).fingerprint
    sorted(published.glob("*_train_*"))[-1].unlink()
    assert len({first, second, open_folder(published).fingerprint}) == 3
