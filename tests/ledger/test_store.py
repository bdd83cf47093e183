"""The ledger file: what is written is what is read, bytes are chained, bad input is refused."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.errors import LedgerCorrupt, LedgerError
from ledger.records import BODIES, TERMINAL, Body, Decided, Note, PreflightPassed, SearchEnded
from ledger.store import Ledger
from tests.ledger.plain import forge_after, read_file
from tests.ledger.samples import EVERY, decided, figures, fill, proposed, search_started

GOLDEN = Path(__file__).parents[1] / "golden" / "ledger_v1.jsonl"
GOLDEN_GATE = GOLDEN.with_name("ledger_v1_gate.jsonl")  # events that joined later


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def test_samples_cover_every_event_type() -> None:
    assert set(EVERY) == set(BODIES)
    assert set(TERMINAL) <= set(BODIES)


@pytest.mark.parametrize("type", sorted(set(BODIES) - {"ledger.genesis", "ledger.repair"}))
def test_what_is_appended_is_read_back_and_chained(ledger: Ledger, type: str) -> None:
    written = ledger.append(type, EVERY[type], search="night", trial="t1")
    plain = read_file(ledger.path)
    assert [line["type"] for line in plain] == ["ledger.genesis", type]
    assert plain[1]["body"] == msgspec.to_builtins(EVERY[type])
    assert (plain[1]["search"], plain[1]["trial"], plain[1]["h"]) == ("night", "t1", written.h)
    again = list(Ledger(ledger.path).records())
    assert again[1] == written and again[1].body == EVERY[type]


def test_an_empty_ledger_has_no_records_and_a_zero_head(ledger: Ledger) -> None:
    assert ledger.head() == (-1, "0" * 64)
    assert list(ledger.records()) == []
    assert not ledger.path.exists()


def test_an_empty_file_gets_its_genesis(ledger: Ledger) -> None:
    ledger.path.touch()
    ledger.append("note", Note(text="first"))
    assert [line["type"] for line in read_file(ledger.path)] == ["ledger.genesis", "note"]


def test_filters(ledger: Ledger) -> None:
    for search in ("a", "b"):
        for trial in ("t1", "t2"):
            ledger.append("note", Note(text=search + trial), search=search, trial=trial)
            ledger.append("trial.abandoned", EVERY["trial.abandoned"], search=search, trial=trial)
    assert len(list(ledger.records(search="a"))) == 4
    assert [r.body for r in ledger.records(["note"], search="b", trial="t2")] == [Note(text="bt2")]
    assert len(list(ledger.records(types=["note", "ledger.genesis"]))) == 5


def test_two_objects_on_one_file_see_each_other(ledger: Ledger) -> None:
    other = Ledger(ledger.path)
    for index in range(10):
        (ledger, other)[index % 2].append("note", Note(text=str(index)))
    for reader in (ledger, other):
        assert [r.body for r in reader.records(["note"])] == [Note(text=str(i)) for i in range(10)]
    assert ledger.head() == other.head() == (10, read_file(ledger.path)[-1]["h"])


def test_a_link_and_its_target_are_one_ledger(tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "real.jsonl")
    Ledger(link).append("note", Note(text="x"))
    assert Ledger(tmp_path / "real.jsonl").head()[0] == 1
    assert not (tmp_path / "link.jsonl.lock").exists()


# -- what must not get in ------------------------------------------------------------------------

NONE: Any = None
THREE: Any = 3
BAD_NUMBERS = [math.nan, math.inf, -math.inf]
PLACES: list[tuple[str, Callable[[float], Body]]] = [
    ("search.ended", lambda x: SearchEnded(reason="stopped", decided=0, kept=0, seconds=x)),
    ("decided", lambda x: decided(delta_bpb=x)),
    ("decided", lambda x: decided(candidate=x, delta_bpb=None)),
    ("decided", lambda x: msgspec.structs.replace(decided(), policy={"a": [1.0, {"b": x}]})),
    ("trial.proposed", lambda x: proposed(change={"lr": x})),
    ("trial.proposed", lambda x: proposed(predicted={"val_bpb": x})),
    ("search.started", lambda x: search_started(budget={"hours": x})),
    ("control.ended", lambda x: msgspec.structs.replace(EVERY["control.ended"], run=figures(step_ms=x))),
]


@pytest.mark.parametrize("number", BAD_NUMBERS)
@pytest.mark.parametrize("place", range(len(PLACES)))
def test_no_number_that_is_not_finite_gets_in_anywhere(ledger: Ledger, place: int, number: float) -> None:
    type, make = PLACES[place]
    with pytest.raises(LedgerError, match=r"body\..* is (nan|-?inf)"):
        ledger.append(type, make(number))
    assert not ledger.path.exists()


def test_a_line_of_32_kb_is_refused_and_the_message_names_the_field(ledger: Ledger) -> None:
    fill(ledger, 1)
    before = ledger.path.read_bytes()
    with pytest.raises(LedgerError, match=r"text 40,0\d\d bytes.*blob store"):
        ledger.append("note", Note(text="x" * 40_000))
    assert ledger.path.read_bytes() == before


def test_the_longest_line_is_one_byte_under_32_kb(ledger: Ledger) -> None:
    low, high = 1, 32 * 1024
    while high - low > 1:  # the longest text that is accepted
        middle = (low + high) // 2
        try:
            ledger.append("note", Note(text="x" * middle))
            low = middle
        except LedgerError:
            high = middle
    lengths = [len(line) + 1 for line in ledger.path.read_bytes().split(b"\n")]
    assert 32 * 1024 - 20 < max(lengths) < 32 * 1024


@pytest.mark.parametrize(
    ("type", "body", "message"),
    [
        ("trial.invented", Note(text=""), "unknown event type 'trial.invented'"),
        ("note", EVERY["search.ended"], "takes a Note body, not SearchEnded"),
        ("note", Note(text=THREE), "Expected `str`, got `int`"),
        ("note", Note(text="\ud800"), "surrogates"),
        ("noise.measured", msgspec.structs.replace(EVERY["noise.measured"], n=NONE), "Expected `int`"),
        ("decided", decided(policy={"x": object()}), "cannot be written"),
        ("ledger.genesis", EVERY["ledger.genesis"], "written by the ledger itself"),
        ("ledger.repair", EVERY["ledger.repair"], "written by the ledger itself"),
    ],
)
def test_wrong_events_are_refused_before_the_file_is_touched(
    ledger: Ledger, type: str, body: Body, message: str
) -> None:
    with pytest.raises(LedgerError, match=message):
        ledger.append(type, body)
    assert not ledger.path.exists()


def test_a_path_that_cannot_be_written_gives_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"cannot .*file/ledger\.jsonl.*nothing was recorded"):
        Ledger(tmp_path / "file" / "ledger.jsonl").append("note", Note(text="x"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(LedgerError, match="Is a directory"):
        Ledger(tmp_path / "folder.jsonl").append("note", Note(text="x"))


# -- any sequence of lawful bodies ---------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(json_values, texts, texts, st.booleans()), min_size=1, max_size=6))
def test_any_json_survives_and_the_plain_reader_agrees(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[Any, str, str, bool]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "ledger.jsonl"
    ledger = Ledger(path)
    for value, search, trial, reopen in items:
        ledger = Ledger(path) if reopen else ledger
        ledger.append("decided", decided(policy={"value": value}), search=search, trial=trial)
    plain = read_file(path)[1:]
    assert [(p["body"]["policy"]["value"], p["search"], p["trial"]) for p in plain] == [i[:3] for i in items]
    read = [r.body for r in Ledger(path).records(["decided"])]
    assert [b.policy["value"] for b in read if isinstance(b, Decided)] == [i[0] for i in items]


# -- lines of another version --------------------------------------------------------------------


def test_unknown_types_and_fields_are_skipped_with_a_count(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    fill(ledger, 2)
    with ledger.path.open("ab") as file:
        file.write(forge_after(ledger.path.read_bytes(), type="trial.applauded", body={"by": "all"}))
    for index in range(2):
        with ledger.path.open("ab") as file:
            body = {"text": f"new {index}", "mood": "good"}
            file.write(forge_after(ledger.path.read_bytes(), type="note", body=body, id=f"0199-{index}", v=2))
    with ledger.path.open("ab") as file:
        run = {**msgspec.to_builtins(figures("c-9")), "joules": 3.5}
        file.write(forge_after(ledger.path.read_bytes(), type="confirm.ended", body={"run": run}))
    with ledger.path.open("ab") as file:
        file.write(forge_after(ledger.path.read_bytes(), type="note", body={"words": "not a note of ours"}))
    reader = Ledger(ledger.path)
    with caplog.at_level(logging.WARNING):
        records = list(reader.records())
    assert [r.body for r in records[3:5]] == [Note(text="new 0"), Note(text="new 1")]
    assert reader.skipped == {
        "type:trial.applauded": 1,
        "field:note.mood": 2,
        "field:confirm.ended.run.joules": 1,
        "invalid:note": 1,
    }
    assert len(caplog.records) == len(reader.skipped)
    reader.append("note", Note(text="on top"))
    assert read_file(ledger.path)[-1]["seq"] == 8


def test_a_line_without_a_later_default_field_is_no_surprise(ledger: Ledger) -> None:
    fill(ledger, 1)
    body = msgspec.to_builtins(EVERY["preflight.passed"])
    old = msgspec.to_builtins(decided())
    del old["sigma_df"], old["cost_seconds"]
    with ledger.path.open("ab") as file:
        file.write(forge_after(ledger.path.read_bytes(), type="decided", body=old))
    with ledger.path.open("ab") as file:
        file.write(forge_after(ledger.path.read_bytes(), type="preflight.passed", body=body, id="x"))
    *_, first, second = ledger.records()
    assert isinstance(first.body, Decided) and first.body.sigma_df is None
    assert isinstance(second.body, PreflightPassed) and not ledger.skipped


def holds(new: Any, old: Any) -> bool:
    """Whether ``new`` says everything that ``old`` says; fields that came later may stand beside it."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(k in new and holds(new[k], v) for k, v in old.items())
    if isinstance(old, list):
        return isinstance(new, list) and len(new) == len(old) and all(map(holds, new, old))
    return bool(new == old)


def test_the_golden_file_of_version_1_still_reads() -> None:
    plain = read_file(GOLDEN)
    reader = Ledger(GOLDEN)
    records = list(reader.records())
    assert not reader.skipped
    assert [r.type for r in records] == [p["type"] for p in plain]
    # Said here by hand: a field that changed its name or meaning shows as a difference.
    later = {line["type"] for line in read_file(GOLDEN_GATE)}
    assert {r.type for r in records} | later >= set(EVERY) - {"ledger.repair"}
    by_type = {r.type: json.loads(msgspec.json.encode(r.body)) for r in records}
    assert by_type["decided"]["delta_bpb"] == 2.24 - 2.25
    assert by_type["decided"]["looks"][0]["boundary"] == 2.2
    assert by_type["trial.proposed"]["change"] == {"beta2": 0.99}
    assert by_type["trial.proposed"]["parent_commit"] == "b" * 40
    assert by_type["confirm.ended"]["run"]["val_bpb"] == 2.25
    assert by_type["commit.intent"]["files"] == {"trainer/recipes/pocket.toml": "beta2 = 0.99\n"}
    assert by_type["note"]["text"].endswith("漢字, \U0001f600")
    for record, line in zip(records, plain, strict=True):
        body = json.loads(msgspec.json.encode(record.body))
        assert holds(body, line["body"])


def test_the_golden_file_of_later_events_still_reads() -> None:
    plain, reader = read_file(GOLDEN_GATE), Ledger(GOLDEN_GATE)
    records = list(reader.records())
    assert not reader.skipped and len(records) == len(plain) > 9
    for record, line in zip(records, plain, strict=True):
        body = json.loads(msgspec.json.encode(record.body))
        assert holds(body, line["body"])
    by_type = {line["type"]: line["body"] for line in plain}
    assert by_type["timing.measured"]["pairs"][1] == [101.0, 111.0]
    assert by_type["trial.reverted"]["reverts"] == "1" * 40
    assert by_type["transfer.measured"]["differences"] == [0.01, 0.012]


# -- the file changing under a reader ------------------------------------------------------------


def test_a_ledger_that_shrank_or_vanished_is_refused(ledger: Ledger) -> None:
    fill(ledger, 4)
    data = ledger.path.read_bytes()
    ledger.path.write_bytes(data[: data.rindex(b"\n", 0, -1) + 1])
    with pytest.raises(LedgerCorrupt, match="bytes were verified"):
        ledger.append("note", Note(text="x"))
    ledger.path.unlink()
    for act in (lambda: ledger.append("note", Note(text="x")), ledger.head):
        with pytest.raises(LedgerCorrupt, match="vanished"):
            act()
    assert not ledger.path.exists()
    ledger.path.write_bytes(data)
    ledger.append("note", Note(text="whole again"))
    assert len(read_file(ledger.path)) == 6


def test_a_replaced_file_is_verified_from_its_start(ledger: Ledger, tmp_path: Path) -> None:
    fill(ledger, 3)
    fresh = tmp_path / "new"
    fresh.write_bytes(ledger.path.read_bytes())
    Ledger(fresh).append("note", Note(text="appended elsewhere"))
    os.replace(fresh, ledger.path)  # noqa: PTH105
    assert [r.body for r in ledger.records(["note"])][-1] == Note(text="appended elsewhere")
    other = Ledger(tmp_path / "other")
    fill(other, 9)
    os.replace(other.path, ledger.path)  # noqa: PTH105
    with pytest.raises(LedgerCorrupt, match="without the records already read"):
        ledger.append("note", Note(text="x"))


def test_an_edit_in_place_is_noticed_by_a_writer_that_had_verified_it(ledger: Ledger) -> None:
    fill(ledger, 5)
    data = bytearray(ledger.path.read_bytes())
    where = data.index(b"note 2")
    data[where : where + 6] = b"vote 2"
    ledger.path.write_bytes(data)
    os.utime(ledger.path, ns=(1, 1))
    with pytest.raises(LedgerCorrupt) as caught:
        ledger.append("note", Note(text="x"))
    start = data.rindex(b"\n", 0, where) + 1
    assert (caught.value.line, caught.value.offset) == (4, start)
    assert "git show" in str(caught.value) and "does not match" in str(caught.value)
    assert ledger.path.read_bytes() == bytes(data)
