"""Views: everything that matters is on the screen at 80 columns, and the dicts are JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console, RenderableType

from ledger import render
from ledger.decode import Record
from ledger.queries import best, lineage, tail, trials
from ledger.records import Note, PreflightRefused
from ledger.store import Ledger
from ledger.summary import summarise
from tests.ledger.samples import BASE, EVERY, control, decided, proposed, run_trial, search_started

ROOT = Path(__file__).parents[2]
SHA = "a1b2c3d4e5" + "0" * 30


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("search.started", search_started(), search="night")
    ledger.append("control.ended", control(), search="night")
    run_trial(ledger, "pocket-0001", 1, decided("reject", 2.2537))
    run_trial(ledger, "pocket-0002", 2, decided("keep", 2.2399), sha=SHA)
    long = proposed(3, SHA, change={f"a_knob_with_a_long_name_{i}": 0.001 for i in range(9)}, previous={})
    ledger.append("trial.proposed", long, search="night", trial="pocket-0003")
    refused = PreflightRefused(reason="rejected.duplicate", detail="[bold]as[/bold] pocket-0001")
    ledger.append("preflight.refused", refused, search="night", trial="pocket-0003")
    ledger.append("note", Note(text="two\nlines [red]and markup[/red]"))
    return list(ledger.records())


def draw(what: RenderableType, width: int) -> list[str]:
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(what)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 200])
def test_nothing_is_wider_than_the_screen(records: list[Record], width: int) -> None:
    views = trials(records)
    everything = [
        render.lineage_tree(lineage(records)),
        render.trial_table(views),
        render.record_lines(records),
        render.best_table(best(records)),
        *(render.trial_panel(view, records) for view in views),
    ]
    for what in everything:
        lines = draw(what, width)
        assert lines and max(len(line.rstrip()) for line in lines) <= width


@pytest.mark.parametrize("width", [80, 200])
def test_lineage_shows_trials_changes_gains_and_reasons_whole(records: list[Record], width: int) -> None:
    lines = draw(render.lineage_tree(lineage(records)), width)
    assert len(lines) == 4
    base, first, second, third = lines
    assert BASE[:10] in base and "2.2500" in base
    for line, words in (
        (first, ("✗ pocket-0001", "beta2 0.95 → 0.99", "+0.0037", "rejected.noise")),
        (second, ("● pocket-0002", "beta2 0.95 → 0.99", "-0.0101", "kept.gain")),
        (third, ("– pocket-0003", "a_knob_with_a_long_name_0", "rejected.duplicate")),
    ):
        assert all(word in line for word in words), line
    assert (SHA[:10] in second) == (width == 200)
    assert first.startswith("│ ") and second.startswith("● ")


def test_a_long_line_of_keeps_is_not_indented_and_old_attempts_can_be_left_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    parent = BASE
    for number in range(1, 40, 4):
        for extra in range(3):
            run_trial(ledger, f"t{number + extra}", number + extra, decided("reject"), parent=parent)
        sha = f"{number:040x}"
        run_trial(ledger, f"t{number + 3}", number + 3, decided("keep"), parent=parent, sha=sha)
        parent = sha
    roots = lineage(ledger.records())
    lines = draw(render.lineage_tree(roots), 80)
    assert len(lines) == 1 + 40
    assert sum(line.startswith("● ") for line in lines) == 10
    short = draw(render.lineage_tree(roots, attempts=1), 80)
    assert len(short) == 1 + 10 + 10 * 2
    assert sum("and 2 earlier" in line for line in short) == 10


@pytest.mark.parametrize("width", [80, 200])
def test_the_panel_tells_the_whole_story(records: list[Record], width: int) -> None:
    kept = next(view for view in trials(records) if view.status == "kept")
    text = "\n".join(draw(render.trial_panel(kept, records), width))
    for words in ("beta2 0.95 → 0.99", "steadies the embeddings", "kept.gain", "-0.01010", "2.2399 against 2.2500",
                  "540,000", SHA[:12], BASE[:12], "2.23990", "$0.02", "commit.done"):
        assert words in text, words
    alone = "\n".join(draw(render.trial_panel(kept), 80))
    assert "kept.gain" in alone and "commit.done" not in alone


def test_text_from_the_ledger_is_never_taken_for_markup(records: list[Record]) -> None:
    text = "\n".join(draw(render.record_lines(records), 200))
    assert "two lines [red]and markup[/red]" in text and "[bold]as[/bold]" in text


def test_empty_views_say_so() -> None:
    assert "no trials yet" in draw(render.lineage_tree([]), 80)[0]
    assert "no trials" in draw(render.trial_table([]), 80)[0]
    assert "nothing measured" in draw(render.best_table([]), 80)[0]
    assert draw(render.record_lines([]), 80) in ([], [""])


def test_every_event_has_a_line_of_words(records: list[Record]) -> None:
    for type, body in EVERY.items():
        line = summarise(msgspec.structs.replace(records[0], type=type, body=body))
        assert line and "\n" not in line


@pytest.mark.parametrize(("kind", "words"), [
    ("track.derived", ["pocket-2x from pocket", "confirm_steps 120 -> 240", "does it last?"]),
    ("transfer.measured", ["t1 transfers", "pocket to pocket-2x", "+0.0110 bpb", "+0.0090 to +0.0130", "2 pairs"]),
    ("calibration.measured", ["pocket confirm", "sigma 0.0070 over 2 seeds", "0.0014", "0.90", "bit for bit"]),
    ("panel.measured", ["pocket: 1 configuration", "60 steps 0.50"]),
    ("timing.measured", ["+10.2%", "2 pairs of 10 steps"]),
    ("honest.measured", ["extend", "-0.0050 bpb", "2 fresh seeds", "0.0150", "+0.0200 claimed"]),
    ("revert.intent", ["2222222222", "1111111111", "reverted.honest"]),
    ("trial.reverted", ["1111111111 taken back by 2222222222", "reverted.honest"]),
    ("revert.void", ["2222222222 void", "the branch has moved"]),
])
def test_measurements_are_told_with_their_figures(records: list[Record], kind: str, words: list[str]) -> None:
    line = summarise(msgspec.structs.replace(records[0], type=kind, body=EVERY[kind]))
    assert all(word in line for word in words), line
    assert "=" not in line and "_measured" not in line


def test_dicts_are_json_and_whole(records: list[Record]) -> None:
    forest = json.loads(json.dumps(render.lineage_dict(lineage(records))))
    assert [(n["commit"], n["parent"]) for n in forest["nodes"]] == [(BASE, ""), (SHA, BASE)]
    assert forest["nodes"][1]["trial"]["delta_bpb"] == pytest.approx(-0.0101)
    assert [a["trial"] for a in forest["nodes"][0]["attempts"]] == ["pocket-0001"]
    views = json.loads(json.dumps([render.trial_dict(view) for view in trials(records)]))
    assert [v["status"] for v in views] == ["rejected", "kept", "refused"]
    last = json.loads(json.dumps(render.record_dict(tail(records, 1)[0])))
    assert last["body"] == {"text": "two\nlines [red]and markup[/red]"} and last["type"] == "note"
    (leader,) = json.loads(json.dumps([render.best_dict(item) for item in best(records)]))
    assert leader["commit"] == BASE and leader["fresh"] is True


def test_mermaid_has_a_node_per_commit_and_an_edge_per_keep(records: list[Record]) -> None:
    chart = render.lineage_mermaid(lineage(records)).splitlines()
    assert chart[0] == "flowchart TD"
    assert sum("-->" in line for line in chart) == 1 and sum('["' in line for line in chart) == 2


def test_reading_a_ledger_does_not_import_rich() -> None:
    code = "import sys, ledger.store, ledger.queries, ledger.verify, ledger.render; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60).returncode == 0
