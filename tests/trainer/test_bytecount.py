"""Byte counts against the text itself: SentencePiece's decoder, its normaliser, and plain Python."""

from __future__ import annotations

import io
import json
import math
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.bytecount import ByteTable, ByteTableError
from trainer.data.corpus import embedded_documents
from trainer.data.tokenizer import train_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
VOCABS = (1024, 4096, 8192)
DOCS = 40


@cache
def embedded_texts() -> tuple[str, ...]:
    """A slice of the standard library: small modules, enough for a 1,024-piece vocabulary."""
    return tuple(t for t in embedded_documents() if len(t) < 9_000)


@cache
def embedded_model() -> bytes:
    return train_tokenizer(embedded_texts()[::3], 1024)


@cache
def shared_texts() -> tuple[str, ...]:
    path = SHARED / "corpus" / "docs.jsonl.zst"
    if not path.is_file():
        pytest.skip(f"no shared corpus at {path}")
    with path.open("rb") as f:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(f), encoding="utf-8")
        return tuple(json.loads(next(lines))["text"] for _ in range(DOCS))


def shared_processor(vocab: int) -> spm.SentencePieceProcessor:
    path = SHARED / "tokenizers" / f"fineweb_{vocab}_bpe.model"
    if not path.is_file():
        pytest.skip(f"no shared tokenizer at {path}")
    return spm.SentencePieceProcessor(model_file=str(path))


def counted(sp: spm.SentencePieceProcessor, table: ByteTable, text: str) -> int:
    return table.count_stream(np.array([sp.bos_id(), *sp.encode(text)], dtype=np.uint16))


def check_documents(sp: spm.SentencePieceProcessor, texts: tuple[str, ...]) -> None:
    """Per document and over the joined stream: the count is the decoded and the normalised text's length."""
    table = ByteTable.from_processor(sp)
    stream: list[int] = []
    total = 0
    for text in texts:
        ids = sp.encode(text)
        decoded = len(sp.decode(ids).encode("utf-8"))
        assert counted(sp, table, text) == decoded
        dummy = 1 if sp.id_to_piece(ids[0]).startswith("▁") else 0  # a space before the text, not part of it
        assert len(sp.normalize(text).replace("▁", " ").encode("utf-8")) - dummy == decoded
        stream += [sp.bos_id(), *ids]
        total += decoded
    tokens = np.array(stream, dtype=np.uint16)
    assert table.count_stream(tokens) == total
    assert table.count_stream(tokens, chunk=1000) == total
    assert table.count(tokens[:-1], tokens[1:]) == total


def test_embedded_tokenizer_counts_the_normalised_text_exactly() -> None:
    sp = spm.SentencePieceProcessor(model_proto=embedded_model())
    check_documents(sp, embedded_texts()[:DOCS])
    table = ByteTable.from_processor(sp)
    ascii_docs = [t for t in embedded_texts() if t.isascii() and not re.search(r"[^\x20-\x7e\n\t\f\r]", t)]
    assert len(ascii_docs) > 100
    for text in ascii_docs[:DOCS]:  # here the normalisation is whitespace alone, which Python can do by itself
        assert counted(sp, table, text) == len(" ".join(text.split()))


@pytest.mark.parametrize("vocab", VOCABS)
def test_shared_tokenizers_count_the_normalised_text_exactly(vocab: int) -> None:
    check_documents(shared_processor(vocab), shared_texts())


def test_identity_normaliser_with_dummy_prefix_counts_the_text_itself() -> None:
    """The 4,096-piece model keeps newlines and characters; only runs of spaces and spaces at the ends go."""
    sp = shared_processor(4096)
    table = ByteTable.from_processor(sp)
    for text in shared_texts():
        assert counted(sp, table, text) == len(re.sub(" +", " ", text).strip(" ").encode("utf-8"))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_counted_as_it_decodes(text: str) -> None:
    """Also emoji, NUL, combining marks, exotic spaces: whatever is not in the vocabulary goes by bytes."""
    sp = spm.SentencePieceProcessor(model_proto=embedded_model())
    assert counted(sp, ByteTable.from_processor(sp), text) == len(sp.decode(sp.encode(text)).encode("utf-8"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1023), min_size=2, max_size=50))
def test_each_position_follows_the_rule(ids: list[int]) -> None:
    sp = spm.SentencePieceProcessor(model_proto=embedded_model())
    expected = []
    for prev, target in pairwise(ids):
        piece = sp.id_to_piece(target)
        if target < 4:  # pad, bos, eos, unk
            expected.append(0)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            expected.append(1)
        else:
            word = piece[1:] if piece[0] == "▁" else piece
            expected.append(len(word.encode("utf-8")) + (1 if piece[0] == "▁" and prev >= 4 else 0))
    tokens = np.array(ids, dtype=np.uint16)
    assert ByteTable.from_processor(sp).per_token(tokens[:-1], tokens[1:]).tolist() == expected


def test_a_uniform_model_scores_log2_v_tokens_per_byte() -> None:
    sp = spm.SentencePieceProcessor(model_proto=embedded_model())
    text = embedded_texts()[0]
    ids = sp.encode(text)
    nll = -np.log(np.full((len(ids), 1024), 1 / 1024))[np.arange(len(ids)), ids].sum()
    bpb = nll / math.log(2) / counted(sp, ByteTable.from_processor(sp), text)
    assert bpb == pytest.approx(10 * len(ids) / len(sp.decode(ids).encode("utf-8")), rel=1e-12)


def test_padding_ids_stand_for_nothing_and_a_space_after_them_is_not_counted() -> None:
    sp = spm.SentencePieceProcessor(model_proto=embedded_model())
    table = ByteTable.from_processor(sp, vocab_size=1088)
    spaced = next(i for i in range(1024) if sp.id_to_piece(i) == "▁the")
    assert table.vocab_size == 1088
    assert table.count(np.array([spaced]), np.array([1087])) == 0
    assert table.count(np.array([1087]), np.array([spaced])) == 3
    assert table.count(np.array([spaced]), np.array([spaced])) == 4


def test_ids_and_shapes_that_do_not_fit_are_refused() -> None:
    table = ByteTable.from_processor(spm.SentencePieceProcessor(model_proto=embedded_model()))
    with pytest.raises(ByteTableError, match="target id 1024"):
        table.count(np.array([5]), np.array([1024]))
    with pytest.raises(ByteTableError, match="previous id -1"):
        table.count(np.array([-1]), np.array([5]))
    with pytest.raises(ByteTableError, match="one previous id for each target"):
        table.count(np.array([5]), np.array([5, 6]))


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(ByteTableError, match="No such file"):
        ByteTable.from_model(path)
    path.write_bytes(b"")
    with pytest.raises(ByteTableError, match="empty"):
        ByteTable.from_model(path)
    path.write_bytes(b"not a model, not at all")
    with pytest.raises(ByteTableError, match=re.escape(str(path))):
        ByteTable.from_model(path)
    path.write_bytes(embedded_model())
    with pytest.raises(ByteTableError, match="vocab_size = 1000, but the tokenizer has 1024"):
        ByteTable.from_model(path, 1000)
    assert ByteTable.from_model(path, 1024).vocab_size == 1024


def train(sentences: list[str], **more: Any) -> spm.SentencePieceProcessor:
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=out, model_type="bpe",
                                   vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
                                   pad_id=0, bos_id=1, eos_id=2, unk_id=3, **more)
    return spm.SentencePieceProcessor(model_proto=out.getvalue())


def test_trap_no_lone_space_piece() -> None:
    sp = train(["abcabcabd", "bcdabc"], add_dummy_prefix=False)
    # the trap itself: a space turns into three byte tokens
    assert [sp.id_to_piece(i) for i in sp.encode("a b")][1:4] == ["<0xE2>", "<0x96>", "<0x81>"]
    with pytest.raises(ByteTableError, match=r"no piece that is U\+2581 alone"):
        ByteTable.from_processor(sp)


def test_trap_space_inside_a_piece() -> None:
    sp = train(["the cat and the dog and the cow"] * 3, treat_whitespace_as_suffix=True)
    with pytest.raises(ByteTableError, match=r"U\+2581 after its first character"):
        ByteTable.from_processor(sp)
