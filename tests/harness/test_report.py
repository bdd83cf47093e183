"""What is printed at the end of a search addresses this search, and promises nothing that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.report import print_search
from harness.search import SearchOutcome
from harness.state import SearchState
from harness.workspace import Workspace
from tests.ledger import samples


def shown(capsys: pytest.CaptureFixture[str], root: Path, search: str, reason: str) -> str:
    """The text printed for a search without trials."""
    state = SearchState(search, started=[samples.search_started()])
    (root / "ledger").mkdir(parents=True, exist_ok=True)
    here = Workspace(root=root, main=root)
    print_search(here, SearchOutcome(search=search, reason=reason, state=state, seconds=1.0))
    return capsys.readouterr().out


def test_a_named_search_goes_on_under_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track = samples.search_started().track
    assert "--name big" in shown(capsys, tmp_path, "big", "stopped")
    assert "--name" not in shown(capsys, tmp_path, track, "stopped")


def test_without_a_verdict_no_verdict_and_no_commit_is_pointed_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, tmp_path, "big", "stopped")
    assert "none yet" in out and "gate explain" not in out and "git log" not in out and "resumes" in out


def test_a_stopped_demo_is_resumed_by_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "make demo" in shown(capsys, tmp_path / ".demo", "big", "stopped")
    assert "in the checkout itself" in shown(capsys, tmp_path / ".demo", "big", "exhausted")
