"""val_bpb, as the challenge defines it (challenge_spec, section 2).  Protected: candidates cannot change it.

The model enters as a *player*: a callable that gets input windows and gives back logits. Targets,
normalisation and byte counting stay on this side, so the figure holds whatever the player does
inside, and the player may live in another process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

Player = Callable[[Tensor], Tensor]
"""Input ids int64 [B, L] -> logits fp32 [B, L, V], both on the scoring device."""

Progress = Callable[[int, int], None]
"""Called after every batch with (windows done, windows in all)."""

MAX_LOGITS = 1 << 27
"""Most logits asked for at once (512 MiB of fp32): larger batches are cut, whole windows at a time."""


class EvaluationError(ValueError):
    """A token stream or setting that cannot be scored; the message names the fault."""


class PlayerError(EvaluationError):
    """A player returned something that is not logits of the agreed shape, dtype and device."""


class NonFiniteLogitsError(PlayerError):
    """A player returned NaN or infinity."""


class ByteCounter(Protocol):
    """What is needed of :class:`trainer.data.bytecount.ByteTable`."""

    def count(self, prev_ids: npt.NDArray[np.integer], target_ids: npt.NDArray[np.integer], /) -> int:
        """Bytes of text that ``target_ids`` stand for, each after its ``prev_ids``."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """``val_loss``: nats/token. ``val_bpb`` = val_loss / ln 2 * tokens / bytes."""

    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int


def uniform(vocab_size: int) -> Player:
    """A player that knows nothing: every token equally likely, loss ln(vocab_size)."""
    return lambda x: torch.zeros((*x.shape, vocab_size), dtype=torch.float32, device=x.device)


def evaluate(
    player: Player, tokens: npt.NDArray[np.uint16], table: ByteCounter, *, vocab_size: int, seq_len: int,
    batch_seqs: int, device: torch.device | str = "cpu", progress: Progress | None = None,
) -> Evaluation:
    """Score a token stream in non-overlapping windows.

    ``tokens``: 1-D, length n * seq_len + 1, n >= 1 (see ``trainer.data.loader.eval_tokens``). Window i
    predicts tokens [i*L + 1, (i+1)*L] from [i*L, (i+1)*L - 1]; the model's state starts anew in each,
    attention crosses documents, every target counts (a BOS target adds loss and no bytes), the
    stream's token 0 is never a target. Losses are fp32 log-softmax, summed in fp64.

    Raises EvaluationError for a stream of another length, ids outside the vocabulary or no bytes of
    text; PlayerError for logits of wrong shape, dtype or device; NonFiniteLogitsError for NaN or
    infinite logits.
    """
    windows = _check_stream(tokens, vocab_size, seq_len, batch_seqs)
    step = max(1, min(batch_seqs, MAX_LOGITS // (seq_len * vocab_size)))
    scored, total_nll, total_bytes = windows * seq_len, 0.0, 0
    with torch.inference_mode():
        for first in range(0, windows, step):
            count = min(step, windows - first)
            part = np.asarray(tokens[first * seq_len : (first + count) * seq_len + 1]).astype(np.int64)
            ids = torch.from_numpy(part).to(device)
            targets = ids[1:].view(count, seq_len)
            # A copy: a player that writes into its input must not reach the targets.
            logits = player(ids[:-1].clone().view(count, seq_len))
            total_nll += _nll_sum(logits, targets, vocab_size, f"windows {first} to {first + count - 1}")
            total_bytes += table.count(part[:-1], part[1:])
            if progress is not None:
                progress(first + count, windows)
    if total_bytes <= 0:
        raise EvaluationError(f"{scored} targets stand for {total_bytes} bytes of text: bpb is undefined")
    loss = total_nll / scored
    return Evaluation(loss, loss / math.log(2) * scored / total_bytes, scored, total_bytes)


def _check_stream(tokens: npt.NDArray[np.uint16], vocab_size: int, seq_len: int, batch_seqs: int) -> int:
    """Number of windows in the stream, or EvaluationError."""
    for name, value in (("vocab_size", vocab_size), ("seq_len", seq_len), ("batch_seqs", batch_seqs)):
        if value < 1:
            raise EvaluationError(f"{name} = {value}: expected 1 or more")
    size = len(tokens)
    if tokens.ndim != 1 or size <= seq_len or (size - 1) % seq_len:
        raise EvaluationError(
            f"token stream of shape {tokens.shape}: expected n * seq_len + 1 tokens, n >= 1, "
            f"seq_len = {seq_len}"
        )
    highest = int(tokens.max())
    if highest >= vocab_size:
        raise EvaluationError(f"token id {highest} in the stream: expected below vocab_size = {vocab_size}")
    return (size - 1) // seq_len


def _nll_sum(logits: Tensor, targets: Tensor, vocab_size: int, where: str) -> float:
    """Sum over [B, L] of -log softmax(logits)[target]: fp32 per token, fp64 sum."""
    want = (*targets.shape, vocab_size)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != want:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise PlayerError(f"{where}: player returned {got}; expected logits of shape {want}")
    if logits.dtype != torch.float32 or logits.device != targets.device:
        raise PlayerError(
            f"{where}: player returned {logits.dtype} on {logits.device}; "
            f"expected torch.float32 on {targets.device}"
        )
    low, high = torch.aminmax(logits)  # one pass; NaN propagates into both
    if not math.isfinite(float(low)) or not math.isfinite(float(high)):
        raise NonFiniteLogitsError(f"{where}: non-finite logits (min {float(low)}, max {float(high)})")
    nll = F.cross_entropy(logits.reshape(-1, vocab_size), targets.reshape(-1), reduction="none")
    total = float(nll.sum(dtype=torch.float64))
    if not math.isfinite(total):  # finite logits so far apart that fp32 cannot hold their difference
        raise NonFiniteLogitsError(f"{where}: the log-softmax of the player's logits is not finite")
    return total
