"""Batches: the challenge's order against a naive reimplementation, shuffled windows against their law."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.layout import LayoutError, TokenStream
from trainer.data.loader import LoaderError, TrainLoader, _splitmix64, eval_tokens, window_starts
from trainer.data.shards import ShardError, write_shard


def folder(path: Path, sizes: list[int], val: int = 0) -> Path:
    """Train shards that hold 0, 1, 2, ...: a token says where it stands in the stream."""
    path.mkdir(exist_ok=True)
    start = 0
    for i, size in enumerate(sizes):
        write_shard(path / f"fineweb_train_{i:06d}.bin", np.arange(start, start + size))
        start += size
    if val:
        write_shard(path / "fineweb_val_000000.bin", np.arange(val))
        write_shard(path / "fineweb_val_bytes_000000.bin", np.arange(999))  # must never be read as val
    return path


class NaiveStream:
    """Reads token after token, file after file, for ever: the published loader's order, one token at a time."""

    def __init__(self, sizes: list[int]) -> None:
        self.files, start = [], 0
        for size in sizes:
            self.files.append(list(range(start, start + size)))
            start += size
        self.file, self.offset = 0, 0

    def take(self, n: int) -> list[int]:
        out: list[int] = []
        while len(out) < n:
            if self.offset == len(self.files[self.file]):
                self.file, self.offset = (self.file + 1) % len(self.files), 0
                continue
            out.append(self.files[self.file][self.offset])
            self.offset += 1
        return out


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda s: sum(s) > 8),
       st.integers(1, 8), st.integers(1, 5), st.sampled_from([1, 2, 4]))
def test_sequential_is_the_published_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seq_len: int, rows: int, slices: int
) -> None:
    data = folder(tmp_path_factory.mktemp("d"), sizes)
    batch = seq_len * rows * slices
    loader = TrainLoader(data, batch, seq_len, seed=5, slices=slices)
    naive = NaiveStream(sizes)
    for _ in range(6):
        x, y = loader.next()
        assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (batch // seq_len, seq_len)
        want_x, want_y = [], []
        for _ in range(slices):
            run = naive.take(batch // slices + 1)
            want_x += run[:-1]
            want_y += run[1:]
        assert x.ravel().tolist() == want_x and y.ravel().tolist() == want_y


def test_shuffled_uses_each_window_once_an_epoch(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", [137, 300, 1, 570])  # 1,008 tokens: 62 windows of 16 whatever the phase
    loader = TrainLoader(data, 62 * 16, 16, seed=3, order="shuffled")
    orders = []
    for _ in range(4):  # a batch is an epoch here
        x, y = loader.next()
        assert (y == x + 1).all() and (np.diff(x, axis=1) == 1).all()
        starts = np.sort(x[:, 0])
        assert (np.diff(starts) == 16).all() and 0 <= starts[0] < 16
        assert len(np.unique(y)) == y.size
        orders.append(x[:, 0].tolist())
    assert len({tuple(o) for o in orders}) == 4
    assert all(o != sorted(o) for o in orders)
    assert len({min(o) for o in orders}) > 1  # the phase moves too


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 2000), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_windows_always_fit(seq_len: int, more: int, seed: int, epoch: int) -> None:
    tokens = seq_len + more
    starts = window_starts(tokens, seq_len, seed, epoch)
    assert len(starts) >= 1
    assert starts.min() >= 0 and starts.max() + seq_len + 1 <= tokens
    assert starts.min() < seq_len and tokens - (starts.max() + seq_len + 1) < seq_len  # nothing more would fit
    assert sorted(starts.tolist()) == list(range(int(starts.min()), int(starts.max()) + 1, seq_len))


def test_shuffled_order_does_not_depend_on_batch_size_but_on_the_seed(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", [500])

    def rows(seed: int, per_batch: int) -> list[int]:
        loader = TrainLoader(data, 8 * per_batch, 8, seed, "shuffled")
        return [int(s) for _ in range(180 // per_batch) for s in loader.next()[0][:, 0]]

    assert rows(1, 4) == rows(1, 9) == rows(1, 4)
    assert rows(1, 4) != rows(2, 4)


def test_splitmix64_matches_its_published_values() -> None:
    """First outputs of the generator for seed 1234567, as listed on Rosetta Code, and for seed 0."""
    assert _splitmix64(np.arange(5, dtype=np.uint64), 1234567).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert int(_splitmix64(np.arange(1, dtype=np.uint64), 0)[0]) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
@pytest.mark.parametrize("steps", [0, 1, 7, 40])
def test_a_restored_loader_goes_on_as_if_never_stopped(tmp_path: Path, order: str, steps: int) -> None:
    data = folder(tmp_path / "d", [300, 211])
    args = {"data_dir": data, "batch_tokens": 48, "seq_len": 16, "seed": 11, "order": order}
    first = TrainLoader(**args)
    for _ in range(steps):
        first.next()
    state = json.loads(json.dumps(first.state()))
    second = TrainLoader(**args)
    second.next()
    second.load_state(state)
    for _ in range(15):
        for a, b in zip(first.next(), second.next(), strict=True):
            assert np.array_equal(a, b)


def test_a_foreign_state_is_refused(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", [300])
    loader = TrainLoader(data, 32, 16, 1)
    state = loader.state()
    for key, value in [("seed", 2), ("seq_len", 8), ("order", "shuffled"), ("train_tokens", 301), ("cursor", -1),
                       ("position", "3")]:
        with pytest.raises(LoaderError, match=f"{key} = {value!r}"):
            loader.load_state(state | {key: value})


def test_batches_are_writable_copies(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", [100])
    loader = TrainLoader(data, 16, 16, 1)
    x, y = loader.next()
    before = y.copy()
    x += 1
    assert np.array_equal(y, before) and x.flags.c_contiguous and y.flags.c_contiguous


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", [10])
    with pytest.raises(LoaderError, match="batch_tokens = 30, seq_len = 16"):
        TrainLoader(data, 30, 16, 1)
    with pytest.raises(LoaderError, match="train split of 10 tokens: seq_len = 16 needs at least 17"):
        TrainLoader(data, 32, 16, 1)
    with pytest.raises(LoaderError, match="order = 'random'"):
        TrainLoader(data, 8, 8, 1, "random")  # pyright: ignore[reportArgumentType]
    with pytest.raises(LayoutError, match="no such folder"):
        TrainLoader(tmp_path / "gone", 8, 8, 1)
    (data / "fineweb_train_000001.bin").write_bytes(b"short")
    with pytest.raises(ShardError, match=r"fineweb_train_000001\.bin"):
        TrainLoader(data, 8, 8, 1)


def test_only_train_shards_are_needed(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", [100])
    (data / "fineweb_val_000000.bin").write_bytes(b"unreadable on purpose")
    assert TrainLoader(data, 16, 16, 1).next()[0][0, 0] == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(1, 64))
def test_eval_stream_law(tmp_path_factory: pytest.TempPathFactory, cap: int, seq_len: int) -> None:
    data = folder(tmp_path_factory.mktemp("d"), [10], val=200)
    n = min(cap, 200) if cap else 200
    if n - 1 < seq_len:
        with pytest.raises(LoaderError, match="one window"):
            eval_tokens(data, "val", cap, seq_len)
        return
    tokens = eval_tokens(data, "val", cap, seq_len)
    assert tokens.dtype == np.uint16 and tokens.ndim == 1
    assert tokens.tolist() == list(range(len(tokens)))
    assert (len(tokens) - 1) % seq_len == 0 and 0 <= n - len(tokens) < seq_len


def test_published_layout_has_no_dev_split(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", [10], val=20)
    with pytest.raises(LayoutError, match="no 'dev' split: it has train, val"):
        eval_tokens(data, "dev", 0, 8)


def test_stream_reads_across_shards(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", [5, 0, 3, 0, 9])
    stream = TokenStream(sorted(data.iterdir()))
    assert len(stream) == 17
    for start in range(17):
        for count in range(20):
            assert stream.read(start, count).tolist() == list(range(start, min(17, start + count)))
            assert stream.read_wrapped(start, count).tolist() == [(start + i) % 17 for i in range(count)]
