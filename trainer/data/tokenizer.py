"""SentencePiece BPE with the challenge's settings (challenge_spec, section 1), trained in memory.

The model's bytes depend on the text, the vocabulary size and the sentencepiece release alone: no file paths
go in (iterator in, writer out), and one thread does the work, since the thread count is stored in the model.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import sentencepiece as spm

from trainer.data.errors import DataError

MIN_VOCAB = 260  # 4 control pieces + 256 byte pieces, and then there is not one letter yet
MAX_VOCAB = 65_535  # ids must fit 16 bits

# SentencePiece passes over "sentences" above 4,192 bytes, its default, and the challenge's documents are fed
# whole. Ours are cut at spaces instead, so that long documents count too. Merges never cross a space, so a
# cut changes nothing but the first word of each piece, which loses its leading space.
_SENTENCE_BYTES = 4_000


class TokenizerError(DataError):
    """A vocabulary size or a text on which no tokenizer can be trained."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train on ``texts`` and return the serialised model.

    The vocabulary can come out smaller than asked where the text has too few distinct merges (a soft limit,
    as in the challenge). Raises TokenizerError for a size outside [260, 65535] and when SentencePiece
    refuses.
    """
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise TokenizerError(f"vocab_size = {vocab_size}: expected {MIN_VOCAB} to {MAX_VOCAB}")
    sentences = [s for t in texts for s in _sentences(t)]
    if not sentences:
        raise TokenizerError("no text to train a tokenizer on: every document of the train split is empty")
    out = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=out, model_type="bpe", vocab_size=vocab_size,
            character_coverage=0.999, byte_fallback=True, split_digits=True,
            normalization_rule_name="nmt_nfkc", add_dummy_prefix=False,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False,
            num_threads=1, minloglevel=2,
        )
    except RuntimeError as e:
        raise TokenizerError(f"vocab_size = {vocab_size}: SentencePiece cannot train on this text ({e}); "
                             "give more text or another vocabulary size") from e
    return out.getvalue()


def _sentences(text: str) -> Iterator[str]:
    """Pieces of at most 4,000 bytes (a longer word stays whole), NUL as space, stripped, cut at spaces."""
    piece: list[str] = []
    size = 0
    for word in text.replace("\x00", " ").split():
        length = len(word.encode("utf-8")) + 1
        if piece and size + length > _SENTENCE_BYTES:
            yield " ".join(piece)
            piece, size = [], 0
        piece.append(word)
        size += length
    if piece:
        yield " ".join(piece)
