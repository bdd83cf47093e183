"""Any order of appends, kills in mid-write, reopenings and reads, against a model: a list of what was acknowledged."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ledger.records import Note
from ledger.store import Ledger
from ledger.verify import verify
from tests.ledger.plain import forge_after, read_chain

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


class LedgerMachine(RuleBasedStateMachine):
    """Two writers in one file, and a world that tears their writes."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ledger-machine-"))
        self.path = self.folder / "ledger.jsonl"
        self.writers = [Ledger(self.path), Ledger(self.path)]
        self.acknowledged: list[str] = []  # ids of records, in order
        self.texts: list[str] = []
        self.torn: list[bytes] = []
        self.mended = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def data(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""

    @rule(who=st.integers(0, 1), text=texts)
    def append(self, who: int, text: str) -> None:
        record = self.writers[who].append("note", Note(text=text))
        self.acknowledged.append(record.id)
        self.texts.append(text)

    @rule(who=st.integers(0, 1))
    def reopen(self, who: int) -> None:
        self.writers[who] = Ledger(self.path)

    @rule(who=st.integers(0, 1))
    def read(self, who: int) -> None:
        notes = [r.id for r in self.writers[who].records(["note"])]
        assert [id for id in notes if id in set(self.acknowledged)] == self.acknowledged

    @rule(who=st.integers(0, 1))
    def repair(self, who: int) -> None:
        self.writers[who].repair()

    @precondition(lambda self: self.data().endswith(b"\n"))
    @rule(share=st.floats(0.0, 1.0))
    def killed_while_writing(self, share: float) -> None:
        data = self.data()
        line = forge_after(data, id=f"0190a000-0000-7000-8000-{len(data):012x}", type="note", body={"text": "unsaid"})
        part = line[: max(1, int(share * (len(line) - 1)))]
        self.path.write_bytes(data + part)
        if part == line[:-1]:
            self.mended += 1
        else:
            self.torn.append(part)

    @invariant()
    def the_file_is_whole_but_for_its_tail(self) -> None:
        data = self.data()
        whole = data[: data.rfind(b"\n") + 1]
        records = read_chain(whole)
        present = [r["id"] for r in records]
        assert [id for id in present if id in set(self.acknowledged)] == self.acknowledged
        said = {r["id"]: r["body"].get("text") for r in records}
        assert [said[id] for id in self.acknowledged] == self.texts
        repairs = [r["body"] for r in records if r["type"] == "ledger.repair"]
        kept = {bytes.fromhex(body["torn_hex"]) for body in repairs} | {data[len(whole) :]}
        kept |= {item.read_bytes() for item in self.folder.iterdir() if ".torn-" in item.name}
        assert kept >= set(self.torn)
        if data:
            assert verify(self.path).ok


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.mark.usefixtures("no_fsync")
class TestLedger(LedgerMachine.TestCase):
    """Run by pytest."""
