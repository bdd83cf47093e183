"""Documents in: what is read, in which order, and what a broken file is told."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.corpus import CorpusError, cut, distinct, embedded_documents, open_source

PROSE = [f"This is the story of number {i}, told at some length to be worth a line of its own.\n" for i in range(300)]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts)


def test_embedded_corpus_is_large_distinct_and_in_hash_order() -> None:
    texts = list(open_source("embedded"))
    assert sum(len(t.encode("utf-8")) for t in texts) >= 3_000_000
    assert len(set(texts)) == len(texts) >= 100
    keys = [hashlib.sha256(t.encode("utf-8")).hexdigest() for t in texts]
    assert keys == sorted(keys)
    assert texts == list(open_source("embedded"))
    assert any(t.startswith('"""\nMore') or "class JSONDecoder" in t for t in texts)  # a module known to be there


def test_embedded_corpus_of_a_stripped_python_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "os.py").write_text("".join(PROSE))
    with pytest.raises(CorpusError, match=r"holds [\d,]+ bytes of source text, the embedded corpus needs 3,000,000"):
        embedded_documents(tmp_path)


def test_embedded_corpus_leaves_out_what_is_not_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.corpus.MIN_EMBEDDED_BYTES", 1)
    text = "".join(PROSE[:20])
    for i, name in enumerate(("os.py", "json/tool.py", "test/a.py", "unittest/test/b.py", "site-packages/c.py",
                              "tkinter/d.py", "encodings/e.py", "_sysconfigdata__linux.py", "sitecustomize.py",
                              "config-3.11-x86/f.py", "idlelib/g.py")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(PROSE[20 * i : 20 * i + 20]))
    (tmp_path / "bad.py").write_bytes(b"\xff" + text.encode())
    (tmp_path / "pydoc_data").mkdir()
    topic = "A help topic, long enough. " * 20
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {{'a': {topic!r}, 'b': 'too short'}}\n")
    assert sorted(embedded_documents(tmp_path)) == sorted(
        ["".join(PROSE[:20]), "".join(PROSE[20:40]), topic])


def test_near_duplicates_go_and_the_longer_stays() -> None:
    long, part, other = "".join(PROSE[:40]), "".join(PROSE[5:20]), "".join(PROSE[100:120])
    half_new = "".join(PROSE[30:40] + PROSE[200:215])
    for order in ([long, part, other, half_new, long], [part, half_new, long, other]):
        assert sorted(distinct(order)) == sorted([long, other, half_new])
    assert distinct(["too short"]) == []


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=20), st.integers(1, 3))
def test_jsonl_and_zst_give_the_texts_in_file_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], frames: int
) -> None:
    d = tmp_path_factory.mktemp("j")
    data = jsonl(texts)
    (d / "docs.jsonl").write_bytes(data)
    step = -(-len(data) // frames)
    parts = [data[i : i + step] for i in range(0, len(data), step)]
    (d / "docs.jsonl.zst").write_bytes(b"".join(zstandard.ZstdCompressor().compress(p) for p in parts))
    for name in ("docs.jsonl", "docs.jsonl.zst"):
        source = open_source(d / name)
        assert list(source) == list(source) == texts
        assert str(d) not in source.description


def test_jsonl_longer_than_a_read_block(tmp_path: Path) -> None:
    texts = ["x" * 700_000 + str(i) for i in range(5)] + ["y" * 3_000_000]
    (tmp_path / "d.jsonl").write_bytes(jsonl(texts).rstrip(b"\n"))  # and without a last newline
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl(texts)))
    assert list(open_source(tmp_path / "d.jsonl")) == list(open_source(tmp_path / "d.jsonl.zst")) == texts


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at 10"),
        (b'{"body": "x"}', "text = None"),
        (b'{"text": 5}', "text = 5"),
        (b'["text"]', "a JSON list"),
        (b'{"text": "\\ud800"}', r"text holds a lone surrogate U\+D800 at character 0"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(jsonl(["good"]) + b"\n" + line + b"\n" + jsonl(["good"]))  # the second line is blank
    with pytest.raises(CorpusError, match=re.escape(f"{path}, line 3: ") + words):
        list(open_source(path))


@pytest.mark.parametrize("cut_at", [0, 1, 10, -1])
def test_a_cut_off_zst_is_noticed(tmp_path: Path, cut_at: int) -> None:
    path = tmp_path / "docs.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(jsonl(PROSE))[:cut_at])
    with pytest.raises(CorpusError, match="ends early"):
        list(open_source(path))


def test_a_zst_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl.zst"
    path.write_bytes(jsonl(PROSE))
    with pytest.raises(CorpusError, match="not zstd data"):
        list(open_source(path))


def test_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / "two.md").write_text("two")
    (tmp_path / "three.py").write_text("three")
    texts = list(open_source(tmp_path))
    assert texts == sorted(["one", "two"], key=lambda t: hashlib.sha256(t.encode()).digest())
    (tmp_path / "bad.txt").write_bytes(b"fine\nnot \xe9\n")
    with pytest.raises(CorpusError, match=r"bad\.txt, line 2: not UTF-8: byte 0xe9"):
        open_source(tmp_path)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["short\n", "\n", "é" * 500 + "\n", "word " * 2000 + "\n"]), max_size=200))
def test_cutting_loses_nothing(parts: list[str]) -> None:
    text = "".join(parts)
    pieces = list(cut(text))
    assert "".join(pieces) == text
    if len(text.encode()) <= 64_000:
        assert pieces == [text]
    else:
        assert max(len(p.encode()) for p in pieces) < 48_000


@pytest.mark.parametrize("name", ["nothing.jsonl", "x.csv", "empty"])
def test_what_is_no_corpus_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=re.escape(str(tmp_path / name))):
        open_source(tmp_path / name)
