"""The root of every error that a data folder, a corpus or a tokenizer of the user's can cause."""

from __future__ import annotations


class DataError(ValueError):
    """Something about the user's data is wrong; the message names the thing, its value and what is valid."""
