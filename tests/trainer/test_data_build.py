"""The builder: same bytes for same input, disjoint splits, and nothing half-built under any name that loads."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm

from trainer.data.build import BuildError, build
from trainer.data.corpus import TextSource, embedded_documents
from trainer.data.errors import DataError
from trainer.data.loader import TrainLoader, eval_tokens
from trainer.data.manifest import Manifest, ManifestError, load_manifest
from trainer.data.shards import open_shard
from trainer.data.splits import SplitError
from trainer.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["one", "two", "three", "four", "five", "six", "river", "stone", "cloud", "letter", "garden", "window"]


def make_texts(n: int, seed: int = 0) -> list[str]:
    """Distinct documents of 40 to 160 words, by a plain generator."""
    out = []
    state = seed * 7919 + 1
    for i in range(n):
        words = []
        for _ in range(40 + (i * 37) % 120):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            words.append(WORDS[(state >> 33) % len(WORDS)])
        out.append(f"Document {i}.\n" + " ".join(words) + "\n")
    return out


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_bytes(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts))
    return path


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def decode(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """Documents of a split, from its shards, by SentencePiece's own decoder."""
    sp = spm.SentencePieceProcessor(model_file=str(folder / manifest.tokenizer.path))
    ids = np.concatenate([open_shard(folder / s.path) for s in manifest.splits[split].shards])
    starts = np.flatnonzero(ids == 1)
    assert starts[0] == 0
    return [sp.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("embedded") / "data"
    return out, build("embedded", out)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Manifest, list[str]]:
    texts = make_texts(200)
    out = tmp_path / "data"
    manifest = build(write_jsonl(tmp_path / "docs.jsonl", texts), out, 300, val_docs=20, holdout_docs=10, dev_docs=5)
    return out, manifest, texts


def test_embedded_build_is_what_the_tracks_need(embedded: tuple[Path, Manifest]) -> None:
    out, manifest = embedded
    manifest.verify(out, full=True)
    assert load_manifest(out) == manifest
    assert manifest.tokenizer.vocab_size == 1024 and manifest.bos_id == 1
    tokens = {n: s.tokens for n, s in manifest.splits.items()}
    assert tokens["val"] >= 150_000 and tokens["dev"] >= 51_329 and tokens["holdout"] >= 51_329
    assert tokens["train"] > 2 * (tokens["val"] + tokens["dev"] + tokens["holdout"])
    assert all(s.documents >= 10 for s in manifest.splits.values())
    TrainLoader(out, 2048, 128, 0).next()
    assert (len(eval_tokens(out, "val", 51_329, 128)) - 1) == 51_328


def test_embedded_splits_are_disjoint_and_their_bytes_are_the_decoded_text(embedded: tuple[Path, Manifest]) -> None:
    out, manifest = embedded
    known = {" ".join(t.split())[:200] for t in embedded_documents()}
    seen: dict[str, str] = {}
    for split in ("dev", "val", "holdout", "train"):
        documents = decode(out, manifest, split)
        info = manifest.splits[split]
        assert len(documents) == info.documents
        assert sum(len(d.encode("utf-8")) for d in documents) == info.text_bytes
        for d in documents:
            assert seen.setdefault(d, split) == split
    assert len(seen) == sum(s.documents for s in manifest.splits.values())
    found = sum(d[:200] in known for d in seen)  # NFKC changes a few beginnings, no more
    assert found > 0.95 * len(seen)


def test_two_builds_are_equal_whatever_the_folder_and_the_threads(tmp_path: Path) -> None:
    texts = make_texts(150)
    results = []
    for i, threads in enumerate(("1", "2")):
        base = tmp_path / f"some{i}" / ("deep" * i)
        base.mkdir(parents=True)
        docs = write_jsonl(base / "docs.jsonl", texts)
        code = (f"from pathlib import Path; from trainer.data.build import build; "
                f"build({str(docs)!r}, Path({str(base / 'out')!r}), 300, val_docs=10, shard_tokens=3000)")
        env = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=base)
        results.append(files(base / "out"))
    assert results[0] == results[1]
    assert sum("train" in name for name in results[0]) > 1


def test_first_n_documents_are_val_then_holdout_dev_train(small: tuple[Path, Manifest, list[str]]) -> None:
    out, manifest, texts = small
    plain = [" ".join(t.split()) for t in texts]
    assert decode(out, manifest, "val") == plain[:20]
    assert decode(out, manifest, "holdout") == plain[20:30]
    assert decode(out, manifest, "dev") == plain[30:35]
    assert decode(out, manifest, "train") == plain[35:]
    for split, part in (("val", texts[:20]), ("train", texts[35:])):
        assert manifest.splits[split].raw_bytes == sum(len(t) for t in part)
        assert manifest.splits[split].text_bytes == sum(len(" ".join(t.split())) for t in part)


def test_tokenizer_has_the_settings_of_the_challenge(small: tuple[Path, Manifest, list[str]]) -> None:
    out, _, _ = small
    sp = spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert [sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()] == [0, 1, 2, 3]
    assert sum(sp.is_byte(i) for i in range(sp.vocab_size())) == 256  # byte fallback
    assert sp.normalize("① ½  x\n y ") == "1▁1⁄2▁x▁y"  # nmt_nfkc, no dummy prefix, ends stripped
    numbers = [" ".join(str(1900 + (i * j) % 150) for j in range(200)) for i in range(20)]
    sp = spm.SentencePieceProcessor(model_proto=train_tokenizer(numbers, 300))
    assert [sp.id_to_piece(i) for i in sp.encode("1999 2024")] == list("1999▁2024")  # split digits


def test_the_tokenizer_never_sees_an_evaluation_document(tmp_path: Path) -> None:
    texts = make_texts(60)
    others = [t.replace("river", "qzqzqz") for t in make_texts(20, seed=5)]
    models = []
    for i, front in enumerate((make_texts(20, seed=5), others)):
        out = tmp_path / f"o{i}"
        build(write_jsonl(tmp_path / f"{i}.jsonl", front + texts), out, 300, val_docs=10, holdout_docs=5, dev_docs=5)
        models.append((out / "tokenizer.model").read_bytes())
    assert models[0] == models[1]


def test_shards_are_cut_at_the_limit_and_join_to_the_same_stream(
    tmp_path: Path, small: tuple[Path, Manifest, list[str]]
) -> None:
    out, manifest, _ = small
    cut = tmp_path / "cut"
    parts = build(tmp_path / "docs.jsonl", cut, 300, val_docs=20, holdout_docs=10, dev_docs=5, shard_tokens=777)
    for split, info in parts.splits.items():
        assert [s.tokens for s in info.shards[:-1]] == [777] * (len(info.shards) - 1)
        assert 0 < info.shards[-1].tokens <= 777
        joined = np.concatenate([open_shard(cut / s.path) for s in info.shards])
        assert np.array_equal(joined, open_shard(out / manifest.splits[split].shards[0].path))
    assert parts.fingerprint != manifest.fingerprint


def test_a_second_build_of_the_same_returns_at_once(
    tmp_path: Path, small: tuple[Path, Manifest, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, manifest, _ = small
    monkeypatch.setattr("trainer.data.build._write", lambda *a: pytest.fail("built again"))
    before = files(out)
    args: dict[str, Any] = {"val_docs": 20, "holdout_docs": 10, "dev_docs": 5}
    assert build(tmp_path / "docs.jsonl", out, 300, **args) == manifest
    with pytest.raises(BuildError, match="holds other data"):
        build(tmp_path / "docs.jsonl", out, 301, **args)
    with pytest.raises(BuildError, match="holds other data"):
        build(write_jsonl(tmp_path / "docs.jsonl", make_texts(201)), out, 300, **args)
    assert files(out) == before
    (out / "fineweb_val_000000.bin").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"fineweb_val_000000\.bin.*build it again"):
        build(write_jsonl(tmp_path / "docs.jsonl", make_texts(200)), out, 300, **args)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    docs = write_jsonl(tmp_path / "docs.jsonl", make_texts(50))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BuildError, match="not empty"):
        build(docs, tmp_path / "mine", 300)
    assert files(tmp_path / "mine").keys() == {"thesis.txt"}
    with pytest.raises(BuildError, match="is a file"):
        build(docs, docs, 300)
    (tmp_path / "empty").mkdir()
    build(docs, tmp_path / "empty", 300).verify(tmp_path / "empty")


KILLED = """
import os, signal, sys
from pathlib import Path
from trainer.data.build import build
docs, out, stage, share = sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
def progress(name, done):
    if name == stage and done >= share:
        os.kill(os.getpid(), signal.SIGKILL)
if stage == "rename":
    Path.rename = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
build(docs, out, 300, progress=progress)
"""


@pytest.mark.parametrize(("stage", "share"), [("read", 1), ("tokenizer", 1), ("encode", 0), ("encode", 1),
                                              ("rename", 0)])
def test_kill_leaves_nothing_that_loads_and_the_next_build_cleans_up(tmp_path: Path, stage: str, share: float) -> None:
    docs = write_jsonl(tmp_path / "docs.jsonl", make_texts(80))
    out = tmp_path / "data"
    args = [sys.executable, "-c", KILLED, str(docs), str(out), stage, str(share)]
    killed = subprocess.run(args, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    with pytest.raises(DataError):
        TrainLoader(out, 16, 16, 0)
    build(docs, out, 300).verify(out, full=True)
    assert {p.name for p in tmp_path.iterdir()} == {"docs.jsonl", "data", ".data.lock"}


def test_builds_at_the_same_time_give_one_result(tmp_path: Path) -> None:
    docs = write_jsonl(tmp_path / "docs.jsonl", make_texts(120))
    code = textwrap.dedent(f"""
        from pathlib import Path
        from trainer.data.build import build
        print(build({str(docs)!r}, Path({str(tmp_path / "data")!r}), 300).fingerprint)
    """)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
            for _ in range(3)]
    prints = {r.communicate()[0] for r in runs}
    assert [r.returncode for r in runs] == [0, 0, 0]
    assert prints == {load_manifest(tmp_path / "data").fingerprint + "\n"}
    load_manifest(tmp_path / "data").verify(tmp_path / "data", full=True)


def test_the_second_builder_waits_for_the_first(tmp_path: Path) -> None:
    docs = write_jsonl(tmp_path / "docs.jsonl", make_texts(50))
    first_holds, second_waits = threading.Event(), threading.Event()
    second: list[Manifest] = []

    def slow(stage: str, share: float) -> None:
        if stage == "tokenizer" and share == 0:
            first_holds.set()
            assert second_waits.wait(20)

    def run_second() -> None:
        first_holds.wait(20)
        second.append(build(docs, tmp_path / "data", 300,
                            progress=lambda stage, share: second_waits.set() if stage == "wait" else None))

    thread = threading.Thread(target=run_second)
    thread.start()
    first = build(docs, tmp_path / "data", 300, progress=slow)
    thread.join(20)
    assert second == [first]


def test_duplicates_and_blanks_are_dropped_unless_asked(tmp_path: Path) -> None:
    texts = make_texts(40)
    docs = write_jsonl(tmp_path / "docs.jsonl", [*texts[:5], " \n\t", texts[0], *texts[5:], texts[2], ""])
    kept = build(docs, tmp_path / "a", 300, val_docs=5)
    assert kept.dropped_documents == 4
    assert sum(s.documents for s in kept.splits.values()) == 40
    everything = build(docs, tmp_path / "b", 300, val_docs=5, drop_duplicates=False)
    assert everything.dropped_documents == 2
    assert sum(s.documents for s in everything.splits.values()) == 42


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path, small: tuple[Path, Manifest, list[str]]) -> None:
    out, manifest, _ = small
    model = out / "tokenizer.model"
    other = build(write_jsonl(tmp_path / "o.jsonl", make_texts(50, seed=3)), tmp_path / "o", tokenizer_model=model)
    assert (tmp_path / "o" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert other.tokenizer.kind == "given" and other.tokenizer.sha256 == manifest.tokenizer.sha256
    with pytest.raises(BuildError, match=r"vocab_size = 5000, but .* has 300 pieces"):
        build(tmp_path / "o.jsonl", tmp_path / "p", 5000, tokenizer_model=model)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"vocab_size": 100}, "vocab_size = 100: expected 260 to 65535"),
        ({"vocab_size": 70000}, "vocab_size = 70000"),
        ({"name": "a/b"}, "name = 'a/b'"),
        ({"val_docs": 0}, "val_docs = 0: expected 1 or more"),
        ({"dev_docs": -1}, "dev_docs = -1"),
        ({"shard_tokens": 0}, "shard_tokens = 0"),
        ({"val_docs": 30}, "val_docs = 30: only 30 documents"),
        ({"tokenizer_model": Path("gone.model")}, "gone.model"),
    ],
)
def test_a_wrong_argument_is_named_and_leaves_nothing(tmp_path: Path, args: dict[str, Any], words: str) -> None:
    docs = write_jsonl(tmp_path / "docs.jsonl", make_texts(30))
    with pytest.raises(DataError, match=words):
        build(docs, tmp_path / "data", **args)
    assert {p.name for p in tmp_path.iterdir()} <= {"docs.jsonl", ".data.lock"}


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no documents with text"):
        build(TextSource("nothing", ["", "  "]), tmp_path / "a")
    with pytest.raises(SplitError, match="3 documents"):
        build(TextSource("three", make_texts(3)), tmp_path / "b", 300)


def test_no_torch_is_imported() -> None:
    code = "import sys, trainer.data.build, trainer.data.check, trainer.data.loader; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
