"""From verified lines to typed records. What this version does not know is left out and counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import cast

import msgspec

from ledger.records import BODIES, Body, Envelope, Writer

_LOG = logging.getLogger(__name__)
_ENCODER = msgspec.json.Encoder()
_DECODERS = {name: msgspec.json.Decoder(struct) for name, struct in BODIES.items()}


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One event: the envelope's fields, and the body as the struct that ``BODIES`` declares for ``type``."""

    v: int
    seq: int
    id: str
    type: str
    ts: str
    writer: Writer
    search: str
    trial: str
    body: Body
    prev: str
    h: str

    @classmethod
    def of(cls, envelope: Envelope, body: Body) -> Record:
        """The record of ``envelope`` with its body decoded."""
        return cls(
            v=envelope.v,
            seq=envelope.seq,
            id=envelope.id,
            type=envelope.type,
            ts=envelope.ts,
            writer=envelope.writer,
            search=envelope.search,
            trial=envelope.trial,
            body=body,
            prev=envelope.prev,
            h=envelope.h,
        )


def decode(envelope: Envelope, skipped: Counter[str]) -> Record | None:
    """The typed record, or None (counted in ``skipped``) where type or body is not known here."""
    decoder = _DECODERS.get(envelope.type)
    if decoder is None:
        _skip(skipped, f"type:{envelope.type}")
        return None
    try:
        body = decoder.decode(envelope.body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        _skip(skipped, f"invalid:{envelope.type}")
        return None
    # Equal bytes mean equal fields; only a line of another version takes the slow way.
    if _ENCODER.encode(body) != bytes(envelope.body):
        raw: object = msgspec.json.decode(envelope.body)
        for field in _unknown(raw, msgspec.to_builtins(body), envelope.type):
            _skip(skipped, f"field:{field}")
    return Record.of(envelope, body)


def _unknown(raw: object, known: object, where: str) -> Iterator[str]:
    if isinstance(raw, Mapping) and isinstance(known, Mapping):
        decoded = cast("Mapping[object, object]", known)
        for key, value in cast("Mapping[object, object]", raw).items():
            if key in decoded:
                yield from _unknown(value, decoded[key], f"{where}.{key}")
            else:
                yield f"{where}.{key}"
    elif isinstance(raw, list) and isinstance(known, list):
        for left, right in zip(cast("list[object]", raw), cast("list[object]", known), strict=False):
            yield from _unknown(left, right, where)


def _skip(skipped: Counter[str], what: str) -> None:
    if not skipped[what]:
        _LOG.warning("ledger reader skips %s: written by a newer version, or not known here", what)
    skipped[what] += 1
