"""Which document goes to which split: by whole documents, in order, decided before anything is tokenized."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.data.errors import DataError
from trainer.data.shards import SPLITS

DROPPED = 255  # in an assignment: belongs to no split
_TRAIN = SPLITS.index("train")
_MAX_BYTES = 150_000_000  # no evaluation split is made larger than the challenge's validation set (151 MB)


class SplitError(DataError):
    """Too few documents for the splits asked for."""


@dataclass(frozen=True)
class _Target:
    """An evaluation split's size: ``share`` of all bytes, at least ``floor`` unless that is over ``cap``."""

    split: str
    share: float
    floor: int  # bytes
    cap: float  # share

    def bytes(self, total: int) -> int:
        return int(min(_MAX_BYTES, max(self.share * total, min(self.floor, self.cap * total))))


# A track scores about 51,000 tokens at once and needs fresh slices: at 1,024 pieces these floors are about
# 180,000 tokens for val and 70,000 for the other two.
_TARGETS = (
    _Target("val", 0.04, 520_000, 0.20),
    _Target("holdout", 0.04, 200_000, 0.10),
    _Target("dev", 0.02, 200_000, 0.10),
)


def first_occurrences(keys: array[int]) -> npt.NDArray[np.bool_]:
    """True at the first position of each distinct key (64-bit), False at the repeats."""
    keep = np.zeros(len(keys), dtype=np.bool_)
    keep[np.unique(np.asarray(keys, dtype=np.uint64), return_index=True)[1]] = True
    return keep


def assign(
    lengths: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_], counts: dict[str, int | None]
) -> npt.NDArray[np.uint8]:
    """Split of each document: index into SPLITS, or DROPPED where ``keep`` is False.

    ``lengths``: UTF-8 bytes of each document. ``counts``: documents of val, holdout, dev; None = by bytes.
    An explicit count takes the next documents in order (val first: "the first N", as in the challenge). By
    bytes: the next documents in order until the target is met, passing over those above an eighth of the
    smallest target, so that no evaluation split is one long document, and all pass over the same ones; where
    that is not enough, the long ones too.
    Raises SplitError when nothing is left for train, or a split stays empty.
    """
    result = np.full(len(lengths), DROPPED, dtype=np.uint8)
    result[keep] = _TRAIN
    total = int(lengths[keep].sum())
    longest = min((t.bytes(total) for t in _TARGETS if counts.get(t.split) is None), default=0) / 8
    for target in _TARGETS:
        code, count = SPLITS.index(target.split), counts.get(target.split)
        free = np.flatnonzero(result == _TRAIN)
        if count is not None:
            if count >= len(free):
                raise SplitError(f"{target.split}_docs = {count}: only {len(free)} documents are left for it "
                                 "and for train; ask for fewer or give a larger corpus")
            result[free[:count]] = code
            continue
        wanted = target.bytes(total)
        chosen = _fill(lengths, free[lengths[free] <= longest], wanted)
        if int(lengths[chosen].sum()) < wanted:
            chosen = _fill(lengths, free, wanted)
        result[chosen] = code
        if not len(chosen) or not (result == _TRAIN).any():
            raise SplitError(f"{int(keep.sum())} documents, {total} bytes: too few to cut {target.split} "
                             "from and leave some for train; give a larger corpus, or --val-docs, "
                             "--holdout-docs and --dev-docs")
    return result


def _fill(
    lengths: npt.NDArray[np.int64], candidates: npt.NDArray[np.intp], wanted: int
) -> npt.NDArray[np.intp]:
    """The shortest prefix of ``candidates`` with at least ``wanted`` bytes, or all of them."""
    sums = np.cumsum(lengths[candidates])
    return candidates[: int(np.searchsorted(sums, wanted)) + 1]
