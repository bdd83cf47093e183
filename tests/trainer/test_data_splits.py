"""Assignment of documents to splits: its laws, for any list of document lengths."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.shards import SPLITS
from trainer.data.splits import DROPPED, SplitError, assign, first_occurrences

BY_BYTES: dict[str, int | None] = {"val": None, "holdout": None, "dev": None}
LENGTHS = st.lists(st.integers(1, 100_000), min_size=40, max_size=400)


def members(result: np.ndarray, split: str) -> np.ndarray:
    return np.flatnonzero(result == SPLITS.index(split))


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(0, 2**32 - 1))
def test_by_bytes(lengths: list[int], seed: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    keep = np.random.default_rng(seed).random(len(sizes)) < 0.9
    try:
        result = assign(sizes, keep, BY_BYTES)
    except SplitError:
        return  # too few documents for it: nothing is promised
    assert (result == DROPPED).tolist() == (~keep).tolist()
    total = int(sizes[keep].sum())
    for split, share, floor, cap in (("val", 0.04, 520_000, 0.2), ("holdout", 0.04, 200_000, 0.1),
                                     ("dev", 0.02, 200_000, 0.1)):
        target = int(max(share * total, min(floor, cap * total)))
        chosen = sizes[members(result, split)]
        assert len(chosen)
        # enough, and not one document more than needed; less only when there was nothing left to take
        assert chosen.sum() - chosen[-1] < target
        assert chosen.sum() >= target or len(members(result, "train")) == 0
    assert len(members(result, "train"))


def test_no_evaluation_split_is_one_long_document() -> None:
    sizes = np.array([2_000_000, 300_000] + [10_000] * 1000, dtype=np.int64)
    result = assign(sizes, np.ones(len(sizes), dtype=np.bool_), BY_BYTES)
    assert result[:2].tolist() == [SPLITS.index("train")] * 2
    assert members(result, "val").tolist() == list(range(2, 54))  # 520,000 bytes, the next in order
    only_long = np.array([100_000] * 100, dtype=np.int64)  # nothing else there: then they must do
    assert len(members(assign(only_long, np.ones(100, dtype=np.bool_), BY_BYTES), "val")) == 6


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 60), st.integers(0, 30), st.integers(0, 30))
def test_by_count_takes_the_next_in_order(lengths: list[int], val: int, holdout: int, dev: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    keep = np.ones(len(sizes), dtype=np.bool_)
    counts: dict[str, int | None] = {"val": val, "holdout": holdout, "dev": dev}
    if val + holdout + dev >= len(sizes):
        with pytest.raises(SplitError, match="documents are left"):
            assign(sizes, keep, counts)
        return
    result = assign(sizes, keep, counts)
    order = ["val"] * val + ["holdout"] * holdout + ["dev"] * dev
    order += ["train"] * (len(sizes) - len(order))
    assert [SPLITS[c] for c in result] == order


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63]), max_size=60))
def test_first_occurrences(keys: list[int]) -> None:
    assert first_occurrences(array("Q", keys)).tolist() == [k not in keys[:i] for i, k in enumerate(keys)]
