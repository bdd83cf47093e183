"""How many bytes of text a target token stands for (challenge_spec, section 2).

A token's bytes depend on the token before it: a leading space is counted only when the previous token is
not a boundary (control, unknown or unused piece). Over a document encoded as BOS + ids the sum is exactly the
UTF-8 length of the *normalised* text that SentencePiece encoded: after nmt_nfkc, with runs of spaces
squeezed and both ends stripped. A tokenizer with a dummy prefix puts one space before the text; the token
that carries it follows BOS, a boundary, so it is not counted and the sum is still that of the text alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece as spm

from trainer.data.errors import DataError

SPACE = "▁"  # U+2581: how SentencePiece writes a space inside a piece

IntArray = npt.NDArray[np.integer]


class ByteTableError(DataError):
    """A tokenizer whose bytes cannot be counted, or ids that are not its own."""


def load_processor(model: Path | bytes) -> spm.SentencePieceProcessor:
    """Load a SentencePiece model from a file or from its bytes. Raises ByteTableError naming the file."""
    name = str(model) if isinstance(model, Path) else "tokenizer model"
    try:
        proto = model.read_bytes() if isinstance(model, Path) else model
    except OSError as e:
        raise ByteTableError(f"{name}: cannot be read ({e.strerror or e})") from e
    if not proto:  # an empty model_proto would be taken for "not given"
        raise ByteTableError(f"{name}: empty file, expected a SentencePiece model")
    try:
        return spm.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as e:
        raise ByteTableError(f"{name}: not a SentencePiece model ({e})") from e


@dataclass(frozen=True, eq=False)
class ByteTable:
    """Per-id tables, each of length ``vocab_size``: bytes without a leading space, and two flags."""

    base: npt.NDArray[np.int32]
    space: npt.NDArray[np.bool_]  # the piece starts with U+2581
    boundary: npt.NDArray[np.bool_]  # control, unknown or unused: a space after it does not count

    @property
    def vocab_size(self) -> int:
        return len(self.base)

    @classmethod
    def from_model(cls, path: Path, vocab_size: int | None = None) -> ByteTable:
        """Tables for the SentencePiece model at ``path``.

        ``vocab_size`` may exceed the model's own (a padded embedding): the added ids stand for 0 bytes.
        Raises ByteTableError for a file that is no model, a vocabulary smaller than the model's, or a
        tokenizer on which the challenge's count is wrong (see :meth:`from_processor`).
        """
        return cls.from_processor(load_processor(path), vocab_size, name=str(path))

    @classmethod
    def from_processor(
        cls, sp: spm.SentencePieceProcessor, vocab_size: int | None = None, name: str = "tokenizer"
    ) -> ByteTable:
        """Tables for a loaded model; ``name`` stands in error messages.

        Two kinds of tokenizer are refused, because the figure would be silently wrong (section 7, trap 4):
        without a lone U+2581 piece, an unmergeable space falls back to three byte tokens and counts 3
        instead of 1; and a U+2581 that is not the first character of its piece counts 3 instead of 1.
        """
        own = sp.vocab_size()
        size = own if vocab_size is None else vocab_size
        if size < own:
            raise ByteTableError(f"{name}: vocab_size = {size}, but the tokenizer has {own} pieces: "
                                 f"set vocab_size to {own} or more")
        base = np.zeros(size, dtype=np.int32)
        space = np.zeros(size, dtype=np.bool_)
        boundary = np.ones(size, dtype=np.bool_)
        lone_space = False
        for i in range(own):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            boundary[i] = False
            if sp.is_byte(i):
                base[i] = 1
                continue
            piece = sp.id_to_piece(i)
            text = piece.removeprefix(SPACE)
            if SPACE in text:
                raise ByteTableError(
                    f"{name}: piece {i} = {piece!r} holds U+2581 after its first character, which would "
                    "count 3 bytes for one space: train with split_by_whitespace, without "
                    "treat_whitespace_as_suffix and allow_whitespace_only_pieces")
            lone_space = lone_space or piece == SPACE
            space[i] = piece.startswith(SPACE)
            base[i] = len(text.encode("utf-8"))
        if not lone_space:
            raise ByteTableError(
                f"{name}: no piece that is U+2581 alone, so a space can fall back to three byte tokens "
                "and count 3 bytes: add '▁' to the vocabulary, or train on text with spaces")
        return cls(base, space, boundary)

    def per_token(self, prev_ids: IntArray, target_ids: IntArray) -> npt.NDArray[np.int32]:
        """Bytes at each position, in the shape of the two id arrays (equal shapes, any integer dtype).

        bytes = base[target] + (space[target] and not boundary[prev]). Raises ByteTableError for an id
        outside the table or for unequal shapes.
        """
        if prev_ids.shape != target_ids.shape:
            raise ByteTableError(f"prev_ids of shape {prev_ids.shape}, target_ids of shape "
                                 f"{target_ids.shape}: expected one previous id for each target")
        for label, ids in (("previous", prev_ids), ("target", target_ids)):
            if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
                bad = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
                raise ByteTableError(f"{label} id {bad}: expected 0 <= id < vocab_size = {self.vocab_size}")
        return self.base[target_ids] + (self.space[target_ids] & ~self.boundary[prev_ids])

    def count(self, prev_ids: IntArray, target_ids: IntArray) -> int:
        """Total bytes that ``target_ids`` stand for, each after its ``prev_ids``; summed in int64."""
        return int(self.per_token(prev_ids, target_ids).sum(dtype=np.int64))

    def count_stream(self, tokens: IntArray, chunk: int = 1 << 22) -> int:
        """Bytes of every token of a 1-D stream but the first, which nothing predicts; ``chunk`` at a time."""
        total = 0
        for start in range(0, len(tokens) - 1, chunk):
            part = np.asarray(tokens[start : start + chunk + 1])
            total += self.count(part[:-1], part[1:])
        return total
