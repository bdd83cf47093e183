"""What a person sees: every record worth a line has one, and the panel fits the terminal."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.executor import RunRequest
from harness.views import LiveView, PlainView, RunView, make_view
from ledger.records import Decided, Finding, TrialFailed, TrialProposed
from tests.ledger import samples


def request(k: int = 0, owner: str = "pocket-0003") -> RunRequest:
    return RunRequest(run_id=f"r{k}", owner=owner, stage="confirm", k=k, seed=1, knobs={}, commit="c")


@pytest.mark.parametrize("width", [80, 200])
def test_the_panel_fits_and_shows_the_figures(width: int) -> None:
    out = io.StringIO()
    view = LiveView(Console(file=out, width=width, height=24, force_terminal=True, color_system=None))
    s = view.status
    s.search, s.track, s.decided, s.target, s.kept = "pocket", "pocket", 2, 5, 1
    s.best_bpb, s.baseline_bpb = 2.51234, 2.55321
    for k in range(2):
        view.run_event(request(k), {"kind": "step", "step": 60, "of": 120, "train_loss": 4.123})
    for i in range(30):
        view.note(f"line {i} " + "x" * 300)
    view.console.print(view.render())
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and len(lines) <= 24
    text = "\n".join(lines)
    for figure in ("2/5", "2.5123", "2.5532", "60/120", "4.123", "line 29", "Ctrl-C"):
        assert figure in text
    assert "line 3 " not in text


def test_progress_follows_the_event_stream() -> None:
    run = RunView(request())
    for event, expected in [
        ({"kind": "phase", "name": "data"}, ("data", 0, 0)),
        ({"kind": "step", "step": 3, "of": 9, "train_loss": 5.0}, ("train", 3, 9)),
        ({"kind": "phase", "name": "export"}, ("export", 3, 9)),
        ({"kind": "score", "done": 4, "of": 8}, ("score", 4, 8)),
        ({"kind": "unheard-of"}, ("score", 4, 8)),
    ]:
        run.update(event)
        assert (run.phase, run.done, run.of) == expected


def lines_of(type_: str, body: Any) -> str:
    out = io.StringIO()
    PlainView(out).record(type_, "pocket-0003", body)
    return out.getvalue()


def test_verdicts_failures_and_proposals_get_a_line_and_findings_do_not() -> None:
    bodies: dict[type, Any] = {type(body): (name, body) for name, body in samples.EVERY.items()}
    assert "pocket-0003" in lines_of(*bodies[TrialProposed])
    assert bodies[Decided][1].reason in lines_of(*bodies[Decided])
    assert bodies[TrialFailed][1].reason in lines_of(*bodies[TrialFailed])
    assert lines_of(*bodies[Finding]) == ""


def test_markup_in_a_model_text_is_not_interpreted() -> None:
    out = io.StringIO()
    PlainView(out).note("[red]not markup[/red] [link=http://x]y[/link]")
    assert "[red]not markup[/red]" in out.getvalue()


def test_a_reader_who_leaves_stops_nothing() -> None:
    read, write = os.pipe()
    out = os.fdopen(write, "w")
    view = PlainView(out)
    view.note("heard")
    os.close(read)
    for _ in range(3):
        view.note("nobody listens")
    assert str(Path(f"/proc/self/fd/{write}").readlink()) == os.devnull
    out.close()  # flushes what the broken pipe left in the buffer: raises if that is still to be noisy at exit


def test_a_full_disk_or_a_closed_stream_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        PlainView(full).note("no space")
    closed = io.StringIO()
    closed.close()
    PlainView(closed).note("closed")
    monkeypatch.setattr(sys, "stdout", None)
    view = make_view()
    view.note("no stdout at all")
    assert isinstance(view, PlainView)


def test_characters_that_the_stream_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    PlainView(out).note("na\u00efve \u2192 x")
    assert b"na\\xefve \\u2192 x\n" in raw.getvalue()


def test_a_signal_in_the_middle_of_a_line_does_not_block() -> None:
    """The loop's signal handler notes too: its line follows the one that it interrupted."""

    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if "first" in text:
                view.note("handler")
            return super().write(text)

    out = Interrupted()
    view = PlainView(out)
    thread = threading.Thread(target=view.note, args=("first",), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert [line.split("] ")[1] for line in out.getvalue().splitlines()] == ["first", "handler"]
