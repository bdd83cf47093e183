"""A second reader of the ledger format, written from its description with json and hashlib alone.

It shares no code with the package, so that a mistake there cannot hide here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

KEYS = ["v", "seq", "id", "type", "ts", "writer", "search", "trial", "body", "prev", "h"]


def read_chain(data: bytes) -> list[dict[str, Any]]:
    """Every record of a whole, undamaged file; AssertionError otherwise."""
    assert data == b"" or data.endswith(b"\n"), "the file does not end with a newline"
    before = "0" * 64
    records: list[dict[str, Any]] = []
    for number, line in enumerate(data.split(b"\n")[:-1]):
        assert len(line) + 1 < 32 * 1024, "line too long"
        cut = line.rindex(b',"h":"')
        digest = hashlib.sha256(line[:cut]).hexdigest()
        assert line[cut:] == b',"h":"' + digest.encode() + b'"}', f"line {number + 1}: hash"
        record = json.loads(line, parse_constant=_refuse)
        assert list(record) == KEYS, f"line {number + 1}: keys {list(record)}"
        assert record["seq"] == number and record["prev"] == before, f"line {number + 1}: chain"
        assert (record["type"] == "ledger.genesis") == (number == 0)
        before = digest
        records.append(record)
    assert len({record["id"] for record in records}) == len(records), "ids repeat"
    return records


def read_file(path: Path) -> list[dict[str, Any]]:
    return read_chain(path.read_bytes())


def forge(record: dict[str, Any]) -> bytes:
    """A correctly sealed line for whatever ``record`` says (its "h" is left out)."""
    unsealed = {key: value for key, value in record.items() if key != "h"}
    body = json.dumps(unsealed, separators=(",", ":"), ensure_ascii=False).encode()[:-1]
    return body + b',"h":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def forge_after(data: bytes, **changes: Any) -> bytes:
    """A sealed line that continues ``data``, like its last record but for ``changes``."""
    last = read_chain(data)[-1]
    seq = last["seq"] + 1
    record = {**last, "seq": seq, "prev": last["h"], "id": f"{last['id'][:-4]}{seq:04x}", **changes}
    return forge(record)


def _refuse(name: str) -> float:
    raise AssertionError(f"{name} in a ledger line")
