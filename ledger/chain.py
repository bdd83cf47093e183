"""The bytes of the ledger: how one line is sealed, and how a run of lines is checked. No I/O.

A line is a JSON object whose last member is ``h``: ``<prefix>,"h":"<64 hex>"}`` + newline, where the hex
is SHA-256 over ``<prefix>``, that is over every byte before ``,"h":``. ``prev`` inside the prefix is the
``h`` of the line before (64 zeros in the first), so that the last hash speaks for the whole file.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import msgspec

from ledger.errors import LedgerCorrupt, LedgerError
from ledger.records import BODIES, Body, Envelope

GENESIS_PREV = "0" * 64
MAX_LINE = 32 * 1024
"""A line, newline included, is shorter than this many bytes (DESIGN, section 5: lines under 32 KB)."""

_KEY = b',"h":"'
_SEAL_BYTES = len(_KEY) + 64 + 2  # ,"h":" + hex + "}
_SEAL = re.compile(rb',"h":"([0-9a-f]{64})"\}')
_ENCODER = msgspec.json.Encoder()
_ENVELOPE = msgspec.json.Decoder(Envelope)
_BODY_DECODERS = {name: msgspec.json.Decoder(struct) for name, struct in BODIES.items()}


class Cursor(NamedTuple):
    """A verified position: the byte after the last good line, that line's ``seq`` and its ``h``."""

    offset: int = 0
    seq: int = -1
    h: str = GENESIS_PREV


class Scan(NamedTuple):
    """Lines found good, where they end, and the bytes of an unfinished last line (no newline yet)."""

    envelopes: list[Envelope]
    cursor: Cursor
    tail: bytes


def encode_body(type: str, body: Body) -> msgspec.Raw:
    """JSON of a body, checked against its declared struct.

    Raises LedgerError for an unknown type, a body of another struct, a wrong field type, or a number that is
    not finite (msgspec would write it as null without a word).
    """
    struct = BODIES.get(type)
    if struct is None:
        raise LedgerError(
            f"unknown event type {type!r}: declare it in ledger/records.py (BODIES). "
            f"Known: {', '.join(BODIES)}"
        )
    if body.__class__ is not struct:
        raise LedgerError(
            f"event {type!r} takes a {struct.__name__} body, not {body.__class__.__name__}: "
            "pass the struct that ledger.records.BODIES names"
        )
    try:
        check_finite(msgspec.to_builtins(body), "body")
        raw = _ENCODER.encode(body)
        _BODY_DECODERS[type].decode(raw)  # structs do not check their fields when they are built
    except LedgerError as error:
        raise LedgerError(f"event {type!r}: {error}") from None
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LedgerError(
            f"event {type!r} cannot be written as its {struct.__name__} body: {error}. "
            "Use plain int, float, str, bool, lists and dicts of the declared types"
        ) from error
    return msgspec.Raw(raw)


def check_finite(value: object, where: str) -> None:
    """Refuse NaN and infinities anywhere inside builtins. Raises LedgerError naming the path."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise LedgerError(
                f"{where} is {value}: a ledger holds finite numbers only; say it with a status or reason"
            )
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[object, object]", value).items():
            check_finite(key, f"a key of {where}")
            check_finite(item, f"{where}.{key}")
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(cast("Iterable[object]", value)):
            check_finite(item, f"{where}[{index}]")


def seal(envelope: Envelope) -> tuple[bytes, str]:
    """The whole line of ``envelope`` (its ``h`` is ignored) and its hash. Raises LedgerError if too long."""
    try:
        encoded = _ENCODER.encode(envelope)
    except (TypeError, ValueError) as error:
        raise LedgerError(f"event {envelope.type!r} cannot be written: {error}") from error
    # ``h`` is the envelope's last field: strip it as it was encoded, whatever it held.
    prefix = encoded[: -(len(_ENCODER.encode(envelope.h)) + len(_KEY))]
    h = hashlib.sha256(prefix).hexdigest()
    line = prefix + _KEY + h.encode() + b'"}\n'
    if len(line) >= MAX_LINE:
        raise LedgerError(_too_long(envelope, len(line)))
    return line, h


def _too_long(envelope: Envelope, size: int) -> str:
    fields = cast("dict[str, msgspec.Raw]", msgspec.json.decode(envelope.body, type=dict[str, msgspec.Raw]))
    sizes = sorted(((len(bytes(raw)), name) for name, raw in fields.items()), reverse=True)
    longest = ", ".join(f"{name} {length:,} bytes" for length, name in sizes[:3])
    return (
        f"event {envelope.type!r} makes a line of {size:,} bytes; lines stay under {MAX_LINE:,}. "
        f"Longest fields: {longest}. Put long text into the blob store and cite its SHA-256"
    )


def check_line(line: bytes, at: Cursor, path: object) -> Envelope:
    """One line (without its newline) that must follow ``at``. Raises LedgerCorrupt."""
    number = at.seq + 2

    def bad(reason: str) -> LedgerCorrupt:
        return LedgerCorrupt(str(path), number, at.offset, reason)

    found = _SEAL.fullmatch(line, max(0, len(line) - _SEAL_BYTES))
    if found is None:
        raise bad('the line does not end with ,"h":"<64 hex>"}')
    if hashlib.sha256(line[:-_SEAL_BYTES]).hexdigest().encode() != found[1]:
        raise bad("the line's hash does not match its bytes")
    try:
        envelope = _ENVELOPE.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise bad(f"not a ledger record ({error})") from error
    if envelope.h.encode() != found[1]:
        raise bad("the key h occurs twice")
    if envelope.seq != at.seq + 1:
        raise bad(f"seq is {envelope.seq}, expected {at.seq + 1}")
    if envelope.prev != at.h:
        raise bad(f"prev is {envelope.prev[:12]}..., but the line before has h {at.h[:12]}...")
    if (envelope.type == "ledger.genesis") != (envelope.seq == 0):
        raise bad(f"record {envelope.seq} is {envelope.type}; ledger.genesis is record 0 and no other")
    return envelope


def scan(data: bytes, start: Cursor, path: object) -> Scan:
    """Check the whole lines of ``data``, which begins at ``start``. Raises LedgerCorrupt at a bad one."""
    envelopes: list[Envelope] = []
    cursor = start
    begin = 0
    while (end := data.find(b"\n", begin)) >= 0:
        envelope = check_line(data[begin:end], cursor, path)
        envelopes.append(envelope)
        cursor = Cursor(cursor.offset + end + 1 - begin, envelope.seq, envelope.h)
        begin = end + 1
    return Scan(envelopes, cursor, data[begin:])


class Tail(NamedTuple):
    """What an unfinished last line is: ``record``, a sealed record or empty; ``torn``, what must be cut."""

    record: bytes
    torn: bytes


def judge_tail(tail: bytes, at: Cursor, path: object) -> Tail:
    """Tell a torn write from damage, for the bytes after the last newline.

    A torn write is a proper prefix of a line, perhaps followed by NUL bytes (blocks allocated, never
    written). A whole record that lacks only its newline is mended. A whole JSON object with a wrong hash,
    or a sealed record followed by something else, was complete once: LedgerCorrupt.
    """

    def bad(reason: str) -> LedgerCorrupt:
        return LedgerCorrupt(str(path), at.seq + 2, at.offset, reason)

    content = tail.rstrip(b"\0")
    for found in _SEAL.finditer(content):
        if hashlib.sha256(content[: found.start()]).hexdigest().encode() == found[1]:
            record = content[: found.end()]
            check_line(record, at, path)
            if found.end() != len(content):
                raise bad("the newline after a whole record was overwritten")
            return Tail(record, tail[len(content) :])
    try:
        whole = isinstance(msgspec.json.decode(content), dict)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        whole = False
    if not whole:
        return Tail(b"", tail)
    raise bad("a whole record whose hash does not match its bytes")
