"""trainer.evaluate against an independent float64 numpy computation, on hand-made tokenizer tables."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.data.bytecount import ByteTable
from trainer.evaluate import EvaluationError, NonFiniteLogitsError, PlayerError, evaluate, uniform

VOCAB = 7
# id:    0 pad  1 BOS  2 "a"  3 "▁b"  4 "▁"  5 "éé" (4 bytes)  6 byte token
TABLE = ByteTable(
    base=np.array([0, 0, 1, 1, 0, 4, 1], np.int32),
    space=np.array([0, 0, 0, 1, 1, 0, 0], bool),
    boundary=np.array([1, 1, 0, 0, 0, 0, 0], bool),
)


def bytes_by_hand(tokens: np.ndarray) -> int:
    total = 0
    for prev, target in itertools.pairwise(tokens):
        total += {0: 0, 1: 0, 2: 1, 3: 1, 4: 0, 5: 4, 6: 1}[int(target)]
        if int(target) in (3, 4) and int(prev) not in (0, 1):
            total += 1
    return total


class Windowed:
    """A model whose logits depend on the ids *and* on the position in the window: errors of cutting show."""

    def __init__(self, seed: int, vocab: int = VOCAB, positions: int = 64) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.normal(size=(vocab, vocab)) * 3
        self.position = rng.normal(size=(positions, vocab))
        self.first = rng.normal(size=(vocab, vocab))
        self.calls: list[tuple[int, ...]] = []

    def reference(self, window: np.ndarray) -> np.ndarray:
        """float64 logits [L, V] of one window of input ids [L]."""
        return self.table[window] + self.position[: len(window)] + self.first[window[0]]

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        assert x.dtype == torch.int64
        return torch.from_numpy(np.stack([self.reference(row) for row in x.numpy()]).astype(np.float32))


def reference_loss(model: Windowed, tokens: np.ndarray, seq_len: int) -> float:
    """Mean nats per token, float64, one position at a time, windows cut anew here."""
    nll = []
    for start in range(0, len(tokens) - 1, seq_len):
        logits = model.reference(tokens[start : start + seq_len].astype(np.int64))
        for t in range(seq_len):
            z = logits[t] - logits[t].max()
            nll.append(math.log(np.exp(z).sum()) - z[int(tokens[start + t + 1])])
    return float(np.mean(nll))


def stream(seed: int, windows: int, seq_len: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, windows * seq_len + 1).astype(np.uint16)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000), windows=st.integers(1, 9), seq_len=st.integers(1, 12), batch=st.integers(1, 10),
)
def test_loss_and_bpb_match_numpy(seed: int, windows: int, seq_len: int, batch: int) -> None:
    tokens, model = stream(seed, windows, seq_len), Windowed(seed)
    hand = bytes_by_hand(tokens)
    if hand == 0:
        return
    got = evaluate(model, tokens, TABLE, vocab_size=VOCAB, seq_len=seq_len, batch_seqs=batch)
    loss = reference_loss(model, tokens, seq_len)
    assert got.tokens == windows * seq_len and got.bytes == hand
    assert got.val_loss == pytest.approx(loss, rel=1e-6, abs=5e-6)  # logits near 10 have an fp32 spacing of 1e-6
    assert got.val_bpb == pytest.approx(got.val_loss * got.tokens / hand / math.log(2), rel=1e-12)
    assert sum(shape[0] for shape in model.calls) == windows and max(s[0] for s in model.calls) <= batch
    assert all(shape[1] == seq_len for shape in model.calls)


def test_windows_do_not_overlap_and_token_0_is_never_a_target() -> None:
    tokens = np.array([5, 2, 2, 2, 3, 3, 3], np.uint16)
    seen: list[list[int]] = []

    def player(x: Tensor) -> Tensor:
        seen.extend(x.tolist())
        return uniform(VOCAB)(x)

    got = evaluate(player, tokens, TABLE, vocab_size=VOCAB, seq_len=3, batch_seqs=1)
    assert seen == [[5, 2, 2], [2, 3, 3]]
    assert got.bytes == 3 * 1 + 3 * 2 == bytes_by_hand(tokens)  # token 0 (4 bytes) is not counted


def test_bos_targets_count_as_loss_without_bytes() -> None:
    tokens = np.array([1, 2, 1, 3, 1], np.uint16)

    def player(x: Tensor) -> Tensor:
        logits = torch.zeros(*x.shape, VOCAB)
        logits[..., 1] = -2.0  # BOS held to be unlikely: only BOS targets cost more
        return logits

    got = evaluate(player, tokens, TABLE, vocab_size=VOCAB, seq_len=4, batch_seqs=8)
    norm = math.log(6 + math.exp(-2))
    assert got.bytes == 2  # "a", and "b" whose space follows BOS
    assert got.val_loss == pytest.approx((4 * norm + 2 * 2.0) / 4, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), vocab=st.integers(7, 5000), windows=st.integers(1, 5))
def test_uniform_is_analytic(seed: int, vocab: int, windows: int) -> None:
    tokens = np.concatenate([[0, 2], stream(seed, windows, 8)[2:]]).astype(np.uint16)
    got = evaluate(uniform(vocab), tokens, TABLE, vocab_size=vocab, seq_len=8, batch_seqs=2)
    assert got.val_loss == pytest.approx(math.log(vocab), rel=1e-6)
    assert got.val_bpb == pytest.approx(math.log2(vocab) * windows * 8 / bytes_by_hand(tokens), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_adding_a_constant_to_all_logits_changes_nothing(seed: int, shift: float) -> None:
    """Normalisation is the evaluator's: an unnormalised model gains nothing."""
    tokens, model = stream(seed, 4, 6), Windowed(seed)
    plain = evaluate(model, tokens, TABLE, vocab_size=VOCAB, seq_len=6, batch_seqs=4)
    moved = evaluate(lambda x: model(x) + shift, tokens, TABLE, vocab_size=VOCAB, seq_len=6, batch_seqs=4)
    assert moved.val_loss == pytest.approx(plain.val_loss, abs=1e-4)


def test_large_batches_are_cut_to_bounded_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, model = stream(3, 9, 8), Windowed(3)
    whole = evaluate(model, tokens, TABLE, vocab_size=VOCAB, seq_len=8, batch_seqs=100)
    assert model.calls == [(9, 8)]
    monkeypatch.setattr("trainer.evaluate.MAX_LOGITS", 2 * 8 * VOCAB)
    model.calls.clear()
    done: list[tuple[int, int]] = []
    cut = evaluate(
        model, tokens, TABLE, vocab_size=VOCAB, seq_len=8, batch_seqs=100, progress=lambda n, of: done.append((n, of))
    )
    assert model.calls == [(2, 8)] * 4 + [(1, 8)]
    assert done == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]
    assert cut.val_loss == pytest.approx(whole.val_loss, rel=1e-12) and cut.bytes == whole.bytes


def test_a_player_that_writes_into_its_input_reaches_no_target() -> None:
    tokens, model = stream(8, 5, 6), Windowed(8)

    def vandal(x: Tensor) -> Tensor:
        logits = model(x)
        x.zero_()
        return logits

    before = tokens.copy()
    honest, spoiled = (
        evaluate(player, tokens, TABLE, vocab_size=VOCAB, seq_len=6, batch_seqs=2) for player in (model, vandal)
    )
    assert honest == spoiled
    assert np.array_equal(tokens, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("window", [0, 3, 4])
def test_non_finite_logits_are_refused_wherever_they_are(value: float, window: int) -> None:
    tokens = stream(1, 5, 4)

    def player(x: Tensor) -> Tensor:
        logits = torch.zeros(*x.shape, VOCAB)
        if np.array_equal(x[-1].numpy(), tokens[window * 4 : window * 4 + 4]):
            target = int(tokens[window * 4 + 3])
            logits[-1, 2, (target + 1) % VOCAB] = value  # not the target's own: its loss could stay finite
        return logits

    with pytest.raises(NonFiniteLogitsError, match=f"windows {window} to {window}"):
        evaluate(player, tokens, TABLE, vocab_size=VOCAB, seq_len=4, batch_seqs=1)


def test_finite_logits_too_far_apart_are_refused() -> None:
    def player(x: Tensor) -> Tensor:
        logits = torch.full((*x.shape, VOCAB), -3e38)
        logits[..., 0] = 3e38
        return logits

    tokens = np.array([2, 2, 2], np.uint16)
    with pytest.raises(NonFiniteLogitsError, match="log-softmax"):
        evaluate(player, tokens, TABLE, vocab_size=VOCAB, seq_len=2, batch_seqs=1)


PLAYERS: list[tuple[Callable[[Tensor], object], str]] = [
    (lambda x: torch.zeros(*x.shape, VOCAB + 1), r"\(2, 4, 8\); expected logits of shape \(2, 4, 7\)"),
    (lambda x: torch.zeros(*x.shape), "shape"),
    (lambda x: torch.zeros(1, x.shape[1], VOCAB), "shape"),
    (lambda x: torch.zeros(*x.shape, VOCAB, dtype=torch.float64), "float64.*expected torch.float32"),
    (lambda x: torch.zeros(*x.shape, VOCAB, dtype=torch.bfloat16), "bfloat16"),
    (lambda x: torch.zeros(*x.shape, VOCAB, device="meta"), "meta"),
    (lambda x: 0.5, "returned float"),
]


@pytest.mark.parametrize("player,message", PLAYERS)
def test_what_is_not_logits_is_refused(player: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(PlayerError, match=message):
        evaluate(player, stream(0, 2, 4), TABLE, vocab_size=VOCAB, seq_len=4, batch_seqs=2)


@pytest.mark.parametrize("size,seq_len,ok", [
    (9, 8, True), (17, 8, True), (2, 1, True),
    (8, 8, False), (1, 8, False), (0, 8, False), (16, 8, False), (18, 8, False),
])
def test_stream_length(size: int, seq_len: int, ok: bool) -> None:
    tokens = np.full(size, 2, np.uint16)
    refused = contextlib.nullcontext() if ok else pytest.raises(EvaluationError, match=r"n \* seq_len \+ 1")
    with refused:
        got = evaluate(uniform(VOCAB), tokens, TABLE, vocab_size=VOCAB, seq_len=seq_len, batch_seqs=3)
        assert got.tokens == size - 1


def test_bad_settings_and_streams_are_named() -> None:
    tokens = stream(0, 2, 4)
    with pytest.raises(EvaluationError, match="batch_seqs = 0"):
        evaluate(uniform(VOCAB), tokens, TABLE, vocab_size=VOCAB, seq_len=4, batch_seqs=0)
    with pytest.raises(EvaluationError, match="token id 6 in the stream"):
        evaluate(uniform(6), np.full(5, 6, np.uint16), TABLE, vocab_size=6, seq_len=4, batch_seqs=1)
    with pytest.raises(EvaluationError, match="4 targets stand for 0 bytes"):
        evaluate(uniform(VOCAB), np.full(5, 1, np.uint16), TABLE, vocab_size=VOCAB, seq_len=4, batch_seqs=1)
    with pytest.raises(EvaluationError, match="shape"):
        evaluate(uniform(VOCAB), tokens.reshape(1, -1), TABLE, vocab_size=VOCAB, seq_len=4, batch_seqs=1)
