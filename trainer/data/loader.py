"""Training batches and evaluation streams, straight from memory-mapped shards.

A batch is a pair (x, y) of int64 arrays of shape [batch_tokens // seq_len, seq_len]; y is x one token later.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trainer.data.errors import DataError
from trainer.data.layout import open_folder

Order = Literal["sequential", "shuffled"]
Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


class LoaderError(DataError):
    """A batch shape that does not fit the data, or a state that belongs to another loader."""


class TrainLoader:
    """Endless batches of the train split.

    ``sequential``: the challenge's order for one rank, the same for every seed (challenge_spec, section 1).
    A batch takes ``slices`` runs of ``batch_tokens / slices + 1`` consecutive tokens, x is a run without its
    last token, y without its first; the next batch starts after the last token taken, so that one token per
    run is never predicted. At the end of the last shard it goes on with the first, inside a batch too. The
    published script cuts a step into 8 micro-batches (world size x accumulation), which is ``slices=8``.

    ``shuffled``: windows of ``seq_len`` at a phase and in an order that hash(seed, "loader", epoch) gives,
    one set per epoch; neighbouring windows share one token, so each token of the covered range is predicted
    exactly once an epoch. A batch may end one epoch and begin the next.

    Deterministic, and independent of NumPy's random generators, whose streams may change between releases.
    """

    def __init__(
        self, data_dir: Path, batch_tokens: int, seq_len: int, seed: int, order: Order = "sequential",
        slices: int = 1,
    ) -> None:
        """Open the train shards only. Raises LoaderError for a shape that cannot be served, ShardError,
        LayoutError and ManifestError for the folder."""
        if seq_len < 1 or slices < 1 or batch_tokens < 1 or batch_tokens % (seq_len * slices):
            raise LoaderError(f"batch_tokens = {batch_tokens}, seq_len = {seq_len}, slices = {slices}: "
                              "batch_tokens must be a positive multiple of seq_len * slices")
        if order not in ("sequential", "shuffled"):
            raise LoaderError(f"order = {order!r}: expected 'sequential' or 'shuffled'")
        self._stream = open_folder(Path(data_dir)).stream("train")
        self._n = len(self._stream)
        if self._n < seq_len + 1:
            raise LoaderError(f"{data_dir}: train split of {self._n} tokens: seq_len = {seq_len} "
                              f"needs at least {seq_len + 1}")
        self.batch_tokens, self.seq_len, self.slices = batch_tokens, seq_len, slices
        self.seed, self.order = seed, order
        self._position = 0  # sequential: index of the next token
        self._epoch = 0  # shuffled: current epoch and how many of its windows are used up
        self._cursor = 0
        self._starts: npt.NDArray[np.int64] | None = None

    def next(self) -> Batch:
        """The next (x, y): fresh, contiguous, and sharing no memory."""
        return self._next_sequential() if self.order == "sequential" else self._next_shuffled()

    def _next_sequential(self) -> Batch:
        run = self.batch_tokens // self.slices + 1
        taken = self._stream.read_wrapped(self._position, run * self.slices).astype(np.int64)
        self._position = (self._position + run * self.slices) % self._n
        runs = taken.reshape(self.slices, run)
        x, y = runs[:, :-1].copy(), runs[:, 1:].copy()
        return x.reshape(-1, self.seq_len), y.reshape(-1, self.seq_len)

    def _next_shuffled(self) -> Batch:
        rows = self.batch_tokens // self.seq_len
        out = np.empty((rows, self.seq_len + 1), dtype=np.int64)
        for r in range(rows):
            if self._starts is None:
                self._starts = window_starts(self._n, self.seq_len, self.seed, self._epoch)
            out[r] = self._stream.read(int(self._starts[self._cursor]), self.seq_len + 1)
            self._cursor += 1
            if self._cursor == len(self._starts):
                self._epoch, self._cursor, self._starts = self._epoch + 1, 0, None
        return out[:, :-1].copy(), out[:, 1:].copy()

    def _identity(self) -> dict[str, Any]:
        return {"order": self.order, "seed": self.seed, "batch_tokens": self.batch_tokens,
                "seq_len": self.seq_len, "slices": self.slices, "train_tokens": self._n}

    def state(self) -> dict[str, Any]:
        """Where the loader stands: a small JSON object that :meth:`load_state` of an equal loader takes."""
        return self._identity() | {"position": self._position, "epoch": self._epoch, "cursor": self._cursor}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``. Raises LoaderError when it was saved under other settings or data."""
        for key, mine in self._identity().items():
            if state.get(key) != mine:
                raise LoaderError(f"loader state: {key} = {state.get(key)!r}, this loader has {mine!r}: "
                                  "a checkpoint continues only with the settings and data it was made with")
        for key in ("position", "epoch", "cursor"):
            value = state.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise LoaderError(f"loader state: {key} = {value!r}: expected an integer >= 0")
        self._position = state["position"] % self._n
        self._epoch, self._cursor, self._starts = state["epoch"], state["cursor"], None


def window_starts(tokens: int, seq_len: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """First token of each window of one shuffled epoch, in order of use.

    int64 [floor((tokens - 1 - phase) / seq_len)]; phase is in [0, min(seq_len, tokens - seq_len)), so that at
    least one window always fits.
    """
    digest = hashlib.sha256(f"{seed}/loader/{epoch}".encode("ascii")).digest()
    phase = int.from_bytes(digest[:8], "little") % min(seq_len, tokens - seq_len)
    count = (tokens - 1 - phase) // seq_len
    keys = _splitmix64(np.arange(count, dtype=np.uint64), int.from_bytes(digest[8:16], "little"))
    return phase + seq_len * np.argsort(keys, kind="stable").astype(np.int64)


def _splitmix64(index: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Element ``index`` of the SplitMix64 sequence from ``seed`` (Steele, Lea, Flood 2014); uint64 wraps.

    The function is a bijection of 64-bit words, so keys never tie.
    """
    z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def eval_tokens(data_dir: Path, split: str, max_tokens: int, seq_len: int) -> npt.NDArray[np.uint16]:
    """The stream that an evaluation scores: 1-D uint16, ``floor((N - 1) / seq_len) * seq_len + 1`` long.

    ``max_tokens`` caps N first (0 = the whole split). Window w predicts tokens [w*seq_len + 1, (w+1)*seq_len]
    from those one earlier; token 0 is never scored. A copy in memory. Raises LoaderError when not one window
    fits, LayoutError when the folder lacks the split.
    """
    if seq_len < 1 or max_tokens < 0:
        raise LoaderError(f"seq_len = {seq_len}, max_tokens = {max_tokens}: expected seq_len >= 1 and "
                          "max_tokens >= 0 (0 = all)")
    stream = open_folder(Path(data_dir)).stream(split)
    n = min(len(stream), max_tokens) if max_tokens else len(stream)
    windows = (n - 1) // seq_len
    if windows < 1:
        raise LoaderError(f"{data_dir}: {split} split has {len(stream)} tokens, max_tokens = {max_tokens}: "
                          f"one window of seq_len = {seq_len} needs {seq_len + 1}")
    return stream.read(0, windows * seq_len + 1)
