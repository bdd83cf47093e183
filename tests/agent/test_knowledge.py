"""The parser and the lint, against small knowledge bases written here: every defect is named exactly."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from agent.knowledge import KnowledgeError, lint, load
from tests.agent.support import RECORD, line_block, write_kb


def problems(folder: Path) -> list[str]:
    return [str(p) for p in lint(folder)]


def test_a_clean_base_loads_typed_and_lints_clean(tmp_path: Path) -> None:
    kb = write_kb(tmp_path, [line_block()], prose="A gain of 0.0123 at 2.1235 and 1,234,567 bytes [src.one].")
    assert problems(kb) == []
    knowledge = load(kb)
    line = knowledge.lines["one"]
    assert (line.status, line.priority, line.moves[0].ladder, line.moves[0].bpb) == ("active", 0.5, "beta2", -0.01)
    assert knowledge.evidence["src.one"].metrics["bytes"] == 1234567
    digest = hashlib.sha256((kb / "research_tracks.md").read_bytes()).hexdigest()
    assert knowledge.cite("one") == f"kb/research_tracks.md#one@{digest[:12]}"


def test_a_prior_has_the_priority_as_mean_and_grows_firmer_with_evidence(tmp_path: Path) -> None:
    kb = write_kb(tmp_path, [line_block(), line_block(name="two").replace('["src.one"]', "[]")])
    knowledge = load(kb)
    with_evidence, without = (knowledge.prior(knowledge.lines[n]) for n in ("one", "two"))
    for good, bad in (with_evidence, without):
        assert good / (good + bad) == pytest.approx(0.5)
    assert sum(with_evidence) > sum(without)


BROKEN_BLOCKS = [
    ('ladder = "beta3"', "one moves[0].ladder: unknown knob 'beta3'"),
    ("knobs = { beta2 = 1.5 }", "one moves[0].knobs: knob beta2 = 1.5: expected a number from 0"),
    ("knobs = { smear_gate = 3 }", "expected true or false"),
    ('ladder = "adam_eps"', "declares no ladder"),
    ("scale = { matrix_lr = -1.0 }", "expected a factor above 0"),
    ("scale = { num_layers = 2.0 }", "num_layers is not a real number"),
    ('reshape = ["beta2"]', "names 'beta2': expected some of num_layers"),
    ('ladder = "beta2"\ncombine = true', "sets ladder, combine of"),
    ('ladder = "beta2"\ntoward = "left"', "moves[0].toward: = 'left': expected up or down"),
    ('ladder = "beta2"\ncolour = "red"', "moves[0].colour: is not a field"),
    ('ladder = "BETA2"', "write it in lower case"),
]


@pytest.mark.parametrize(("move", "message"), BROKEN_BLOCKS)
def test_a_broken_move_is_named_with_file_block_and_field(tmp_path: Path, move: str, message: str) -> None:
    kb = write_kb(tmp_path, [line_block(move)])
    assert any(message in p and p.startswith("research_tracks.md: one ") for p in problems(kb)), problems(kb)
    with pytest.raises(KnowledgeError, match=r"research_tracks\.md: one "):
        load(kb)


BROKEN_LINES = [
    ('status = "active"', 'status = "open"', "one status: = 'open': expected one of active, parked"),
    ("priority = 0.5", "priority = 1.5", "one priority: = 1.5: expected a number from 0 to 1"),
    ("priority = 0.5", 'priority = "high"', "one priority: = 'high': expected a finite number"),
    ("{track}", "{machine}", "uses {machine}; known: bpb, change, track"),
    ('title = "T"\n', "", "one title: is missing"),
    ('["src.one"]', '["src.two"]', "one evidence: cites 'src.two', which is not in evidence.jsonl"),
    ('status = "active"', 'status = "deferred"\nneeds = ["beta2"]', "a knob that exists by now"),
    ('status = "active"', 'status = "deferred"', "a deferred line lists what it needs"),
    ("priority = 0.5", "priority = ", "not valid TOML"),
    ('id = "one"', 'id = "One Two"', "use lower-case letters"),
]


@pytest.mark.parametrize(("old", "new", "message"), BROKEN_LINES)
def test_a_broken_line_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    block = line_block()
    assert old in block
    kb = write_kb(tmp_path, [block.replace(old, new)])
    assert any(message in p for p in problems(kb)), problems(kb)
    with pytest.raises(KnowledgeError):
        load(kb)


def test_duplicate_lines_and_records_are_found(tmp_path: Path) -> None:
    kb = write_kb(tmp_path, [line_block(), line_block()], records=[RECORD, RECORD])
    text = "\n".join(problems(kb))
    assert "one id: appears twice" in text and "src.one id: appears twice (again in line 2)" in text


BROKEN_RECORDS = [
    ("{", "evidence.jsonl: line 1: not valid JSON"),
    ("[1]", "line 1: expected a JSON object"),
    ({**RECORD, "verdict": "great"}, "src.one verdict: = 'great': expected one of kept, rejected"),
    ({**RECORD, "regime": "moon"}, "src.one regime: = 'moon' is not declared in README.md"),
    ({**RECORD, "base": "src.zero"}, "src.one base: = 'src.zero' is not a record"),
    ({**RECORD, "metrics": {"val_bpb": "two"}}, "src.one metrics.val_bpb: = 'two': expected a finite number"),
    ({k: v for k, v in RECORD.items() if k != "source"}, "src.one source: is missing"),
    ({**RECORD, "colour": "red"}, "src.one colour: is not a field"),
]


@pytest.mark.parametrize(("record", "message"), BROKEN_RECORDS)
def test_a_broken_record_is_named(tmp_path: Path, record: object, message: str) -> None:
    kb = write_kb(tmp_path, [line_block().replace('["src.one"]', "[]")], records=[record])
    assert any(message in p for p in problems(kb)), problems(kb)


BAD_PROSE = [
    ("It gained a lot [src.two].", "src.two: is cited but is not in evidence.jsonl"),
    ("It gained 0.0124 [src.one].", "0.0124: is not in the records cited (src.one)"),
    ("It scored 2.1234 [src.one].", "2.1234: is not in the records cited"),
    ("It gained +0.0123 [src.one].", "+0.0123: is not in the records cited"),
    ("It took 7,654,321 bytes [src.one].", "7,654,321: is not in the records cited"),
    ("It scored 2.1235, they say.", "2.1235: is a figure without a citation"),
    ("- good: 2.1235 [src.one]\n- elsewhere 2.1235", "2.1235: is a figure without a citation"),
]


@pytest.mark.parametrize(("prose", "message"), BAD_PROSE)
def test_a_figure_must_be_its_records_own(tmp_path: Path, prose: str, message: str) -> None:
    kb = write_kb(tmp_path, [line_block()], prose=prose)
    found = problems(kb)
    assert len(found) == 1 and message in found[0]
    load(kb)  # the blocks are sound: prose never stops a search


@pytest.mark.parametrize("prose", [
    "A gain of −0.0123 [src.one].", "2.12345678 and 2.12, then 1,234,567 [src.one].",
    "The cap is 16,000,000 bytes.", "Version 3.11.9, file 2.5.1, year 2026, share 0.06.",
])
def test_honest_figures_pass(tmp_path: Path, prose: str) -> None:
    assert problems(write_kb(tmp_path, [line_block()], prose=prose)) == []


def test_missing_files_and_open_fences_are_said(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match="not a knowledge base"):
        load(tmp_path)
    kb = write_kb(tmp_path, [line_block()])
    page = kb / "research_tracks.md"
    page.write_text(page.read_text() + "\n```toml\nid = 3\n")
    assert any("2 toml fences are opened, 1 are closed" in p for p in problems(kb))
