"""Calibration over a made-up world whose noise is known: the estimates recover it, kills lose nothing."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import harness.calibrate as calibrate_module
import harness.cli.calibrate as cli_module
import harness.search as search_module
from harness.calibrate import reference_edits, run_calibration
from harness.errors import InfraError
from harness.executor import RunFailed, RunRequest
from harness.gate.correlation import sigma_interval
from harness.plan import Cost
from harness.search import SearchOptions, run_search
from harness.tracks import environment, get_track, run_seed
from harness.views import LiveView
from harness.workspace import Workspace
from ledger.measured import CalibrationMeasured
from ledger.store import Ledger
from ledger.verify import verify
from tests.conftest import IDENTITY, git
from tests.harness.fakes import FakeExecutor, Killed, SilentView

TRACK = "nano"
SEED, OWN = 0.010, 0.002  # standard deviations of the made-up world: shared by a seed, and of a run itself
SIGMA_RUN, SIGMA_D = math.hypot(SEED, OWN), math.sqrt(2) * OWN
CORRELATION = SEED**2 / SIGMA_RUN**2


def normal(*parts: object) -> float:
    """A standard normal number that depends on the parts alone."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")
    return float(np.random.default_rng(seed).standard_normal())


def noisy_world(request: RunRequest) -> float:
    """An edit of beta2 gains 0.004; all else is noise of known size."""
    gain = 0.004 if request.knobs["beta2"] != 0.95 else 0.0
    return 2.5 - gain + SEED * normal(request.seed) + OWN * normal(request.seed, sorted(request.knobs.items()))


@pytest.fixture(autouse=True)
def fake_world(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeExecutor.reset()
    FakeExecutor.world = staticmethod(noisy_world)
    for module in (calibrate_module, search_module):
        monkeypatch.setattr(module, "ensure_data", lambda ws, track, note: (Path("/nowhere"), "d" * 64))
        monkeypatch.setattr(module, "require_own_code", lambda ws: None)


@pytest.fixture
def ws(checkout: Path) -> Workspace:
    return Workspace(root=checkout, main=checkout)


def go(ws: Workspace, seeds: int = 6, edits: int = 2, ask: Callable[[Cost], bool] = lambda cost: True) -> Any:
    return run_calibration(ws, track=TRACK, name="", seeds=seeds, edits=edits, view=SilentView(), ask=ask,
                           make_executor=FakeExecutor)


def written(ws: Workspace) -> list[CalibrationMeasured]:
    return [r.body for r in Ledger(ws.ledger).records(types=["calibration.measured"])]  # type: ignore[misc]


def test_it_recovers_the_noise_of_the_world(ws: Workspace) -> None:
    outcome = go(ws, seeds=64, edits=2)
    (body,) = written(ws)
    assert outcome.ended == "measured" and outcome.body == body
    assert body.bitwise and body.same_seed[0] == body.same_seed[1]
    low, high = sigma_interval(body.sigma_run, 63, 0.998)
    assert low < SIGMA_RUN < high
    low, high = sigma_interval(body.sigma_d, 126, 0.998)
    assert low < SIGMA_D < high
    assert body.correlation == pytest.approx(CORRELATION, abs=0.03)
    assert body.correlation_low < body.correlation < body.correlation_high
    # The record's figures follow from its own raw figures.
    assert body.sigma_run == pytest.approx(np.std(body.values, ddof=1))
    assert [e.sigma_d for e in body.edits] == pytest.approx([np.std(e.differences, ddof=1) for e in body.edits])
    assert body.sigma_d == pytest.approx(math.sqrt(np.mean([e.sigma_d**2 for e in body.edits])))
    assert np.mean(body.edits[0].differences) == pytest.approx(0.004, abs=4 * SIGMA_D / 8)  # positive = better
    assert body.edits[0].change == {"beta2": 0.97}
    assert len(FakeExecutor.calls) == 1 + 64 * 3 and body.seconds == pytest.approx(1.5 * (1 + 64 * 3))
    assert verify(ws.ledger).ok


def test_both_sides_share_seeds_that_no_search_uses(ws: Workspace) -> None:
    go(ws, seeds=4, edits=2)
    seeds: dict[str, list[int]] = {}
    for request in FakeExecutor.calls:
        seeds.setdefault(request.owner, []).append(request.seed)
        assert (request.split, request.knobs["iterations"]) == ("val", get_track(TRACK).confirm_steps)
    base = seeds.pop("incumbent")
    assert base[0] == base[1] and len(set(base)) == 4
    assert all(set(other) == set(base) and len(other) == 4 for other in seeds.values()) and len(seeds) == 2
    used = {run_seed(1, stage, g, k) for stage in ("breadth", "confirm", "preflight", "timing")
            for g in range(5) for k in range(50)}
    assert not used & set(base)


def test_it_measures_todays_incumbent(ws: Workspace) -> None:
    FakeExecutor.reset()
    run_search(ws, SearchOptions(track=TRACK, trials=4), SilentView(), make_executor=FakeExecutor)
    tip = git(ws.root, "rev-parse", f"search/{TRACK}")
    assert tip != git(ws.root, "rev-parse", "HEAD"), "the bowl world keeps something in four trials"
    FakeExecutor.calls.clear()
    go(ws, seeds=4, edits=1)
    (body,) = written(ws)
    assert body.commit == tip
    assert all(r.commit == tip for r in FakeExecutor.calls)
    assert verify(ws.ledger).ok
    # The search goes on as if nothing had been: no trial, control or seed of its own is touched.
    run_search(ws, SearchOptions(track=TRACK, trials=5), SilentView(), make_executor=FakeExecutor)
    assert verify(ws.ledger).ok


def test_it_moves_no_branch_before_the_search_begins(ws: Workspace) -> None:
    go(ws, seeds=4, edits=1)
    assert git(ws.root, "branch", "--list", "search/*") == ""
    assert git(ws.root, "status", "--porcelain", "--untracked-files=no") in ("", "M ledger/autoresearch.jsonl")


@pytest.mark.parametrize("die", [0, 1, 6, 11])
def test_killed_and_resumed_gives_the_same_record(ws: Workspace, tmp_path: Path, pristine: Path, die: int) -> None:
    git(tmp_path, "clone", "-q", str(pristine), "other")
    other = Workspace(root=tmp_path / "other", main=tmp_path / "other")
    go(other, seeds=4, edits=2)
    FakeExecutor.calls.clear()
    FakeExecutor.die_before = die
    with pytest.raises(Killed):
        go(ws, seeds=4, edits=2)
    FakeExecutor.die_before = None
    seen = {r.run_id for r in FakeExecutor.calls}
    kept = {p.stem for p in (ws.state / calibrate_module.FIGURES_DIR).glob("*.json")}
    assert len(seen - kept) < get_track(TRACK).workers  # at most the other runs of the wave that was cut
    assert written(ws) == []
    go(ws, seeds=4, edits=2)
    again = Counter(r.run_id for r in FakeExecutor.calls)
    assert [r for r in kept if again[r] > 1] == []
    assert written(ws) == written(other)


def test_a_finished_one_is_not_written_twice_and_costs_nothing(ws: Workspace) -> None:
    go(ws)
    runs, asked = len(FakeExecutor.calls), []
    git(ws.root, "commit", "-q", "--allow-empty", "-m", "words only", **IDENTITY)  # the same code and recipe
    outcome = go(ws, ask=lambda cost: asked.append(cost) or True)
    assert (outcome.ended, len(FakeExecutor.calls), len(written(ws)), asked) == ("known", runs, 1, [])


def test_more_seeds_reuse_the_runs_that_are_there(ws: Workspace) -> None:
    go(ws, seeds=4, edits=1)
    first = written(ws)[0]
    go(ws, seeds=8, edits=2)
    assert max(Counter(r.run_id for r in FakeExecutor.calls).values()) == 1
    assert written(ws)[1].values[:4] == first.values


def test_damaged_or_other_figures_are_not_believed(ws: Workspace) -> None:
    go(ws, seeds=4, edits=1)
    one, two, *_ = sorted((ws.state / calibrate_module.FIGURES_DIR).glob("*.json"))
    one.write_text(one.read_text()[:50])
    data = json.loads(two.read_text())
    data["run"]["code"] = "0" * 40  # another trainer
    two.write_text(json.dumps(data))
    FakeExecutor.calls.clear()
    go(ws, seeds=4, edits=1)
    assert {r.run_id for r in FakeExecutor.calls} == {one.stem, two.stem}


def test_a_run_that_does_not_repeat_is_found(ws: Workspace) -> None:
    count = iter(range(10**6))
    FakeExecutor.world = staticmethod(lambda request: noisy_world(request) + 1e-4 * next(count))
    go(ws, seeds=4, edits=1)
    (body,) = written(ws)
    assert not body.bitwise and body.same_seed[0] != body.same_seed[1]


def test_the_cost_is_shown_before_it_is_paid(ws: Workspace) -> None:
    costs: list[tuple[Cost, int]] = []

    def refuse(cost: Cost) -> bool:
        costs.append((cost, len(FakeExecutor.calls)))
        return False

    outcome = go(ws, seeds=8, edits=2, ask=refuse)
    (cost, made), = costs
    assert outcome.ended == "declined" and written(ws) == []
    assert made == len(FakeExecutor.calls) == 2  # one on each worker, to time them: nothing was known
    assert (cost.runs, cost.left) == (25, 23)
    assert cost.seconds == pytest.approx(1.5 * 12)  # two workers, 1.5 s a run in the fakes
    go(ws, seeds=8, edits=2, ask=refuse)
    assert costs[-1] == (cost, 2)  # these are known now


def test_the_live_view_carries_it(ws: Workspace) -> None:
    screen = io.StringIO()
    view = LiveView(Console(file=screen, force_terminal=True, width=100))
    outcome = run_calibration(ws, track=TRACK, name="", seeds=4, edits=1, view=view, ask=lambda cost: True,
                              make_executor=FakeExecutor)
    assert outcome.ended == "measured"
    assert f"{TRACK} on {TRACK}" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())


@pytest.mark.parametrize(("terminal", "yes", "answer", "goes_on"), [
    (True, False, True, True), (True, False, False, False), (True, True, False, True), (False, False, False, True),
])
def test_only_a_terminal_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, yes: bool, answer: bool,
    goes_on: bool,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(typer, "confirm", lambda text, **kw: asked.append(text) or answer)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: terminal))
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    cost = Cost(runs=3, left=2, seconds=120.0, dollars=1.5, source="s")
    assert cli_module._asker(yes, False)(cost) is goes_on
    assert bool(asked) is (terminal and not yes)
    assert "2 runs (1 of 3 are done), about 2.0 minutes, $1.50 (s)" in capsys.readouterr().out


def test_the_ledgers_own_times_are_used(ws: Workspace) -> None:
    FakeExecutor.reset()
    run_search(ws, SearchOptions(track=TRACK, trials=1), SilentView(), make_executor=FakeExecutor)
    before, seen = len(FakeExecutor.calls), []
    go(ws, ask=lambda cost: seen.append(cost) or False)
    assert len(FakeExecutor.calls) == before and "under this fingerprint" in seen[0].source


def test_ctrl_c_stops_and_the_same_command_goes_on(ws: Workspace) -> None:
    benches: list[Any] = []

    class Interrupting(FakeExecutor):
        def submit(self, request: Any, sink: Any) -> Any:
            if len(FakeExecutor.calls) == 7:
                benches[0].on_signal(2, None)
            return super().submit(request, sink)

    original = calibrate_module.Session.attended

    def spy(self: Any) -> Any:
        benches[:] = [self.bench]
        return original(self)

    calibrate_module.Session.attended = spy  # type: ignore[method-assign]
    try:
        stopped = run_calibration(ws, track=TRACK, name="", seeds=6, edits=2, view=SilentView(),
                                  ask=lambda cost: True, make_executor=Interrupting)
    finally:
        calibrate_module.Session.attended = original  # type: ignore[method-assign]
    assert stopped.ended == "stopped" and 7 <= stopped.done < stopped.of == 19
    assert written(ws) == []
    made = len(FakeExecutor.calls)
    assert stopped.done == made  # the wave was finished, and kept
    assert go(ws).ended == "measured"
    assert len(FakeExecutor.calls) == 19


def test_a_failing_incumbent_is_the_machines_fault(ws: Workspace) -> None:
    FakeExecutor.fails = staticmethod(
        lambda request: RunFailed(request=request, kind="oom", detail="out of memory") if request.k == 2 else None)
    with pytest.raises(InfraError, match="out of memory"):
        go(ws)
    assert written(ws) == []


def test_reference_edits_exist_on_every_track_and_are_small() -> None:
    for name in ("nano", "pocket"):
        track = get_track(name)
        knobs = track.resolve({})
        edits = reference_edits(track, knobs, 6)
        assert edits[:2] == [{"beta2": 0.97}, {"matrix_lr": 0.036}]
        for edit in edits:
            (knob, value), = edit.items()
            assert track.resolve({}, edit)[knob] == value != knobs[knob]


def test_an_edit_that_changes_nothing_here_is_passed_over() -> None:
    track = get_track(TRACK)
    edits = reference_edits(track, {**track.resolve({}), "matrix_lr": 0.0}, 2)
    assert edits == [{"beta2": 0.97}, {"tied_embed_lr": 0.045}]


# -- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, ws: Workspace) -> Iterator[Callable[..., Any]]:
    """run(args) -> the command's result, over the fakes."""
    real = calibrate_module.run_calibration
    monkeypatch.setattr(calibrate_module, "run_calibration",
                        lambda *a, **kw: real(*a, **kw, make_executor=FakeExecutor))
    app = typer.Typer()
    app.command()(cli_module.calibrate)
    app.command()(cli_module.panel)
    runner = CliRunner()
    yield lambda *args: runner.invoke(app, ["calibrate", "-w", str(ws.root), *args])


def test_json_is_one_document_and_the_rest_goes_to_stderr(cli: Callable[..., Any], ws: Workspace) -> None:
    done = cli("--track", TRACK, "--seeds", "4", "--edits", "1", "--yes", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["ended"] == "measured" and data["sigma_d"] == written(ws)[0].sigma_d
    assert "this takes" in done.stderr


def test_words_for_people(cli: Callable[..., Any]) -> None:
    done = cli("--track", TRACK, "--seeds", "4", "--edits", "1", "--plain")  # not a terminal: goes on, having said
    assert done.exit_code == 0, done.output
    for text in ("this takes", "equal, bit for bit", "same-seed correlation", "pairing", "beta2=0.97"):
        assert text in done.stdout
    again = cli("--track", TRACK, "--seeds", "4", "--edits", "1", "--plain")
    assert again.exit_code == 0 and "nothing was written" in again.stdout and "this takes" not in again.stdout


@pytest.mark.parametrize(("args", "names", "helps"), [
    (["--track", "pokcet"], "pokcet", "pocket"),
    (["--seeds", "3"], "--seeds 3", "4 to 64"),
    (["--seeds", "1000"], "--seeds 1000", "4 to 64"),
    (["--edits", "0"], "--edits 0", "1 to 6"),
    (["--edits", "7"], "--edits 7", "1 to 6"),
    (["--name", "../x"], "../x", "pocket-2"),
])
def test_a_mistake_is_named(cli: Callable[..., Any], ws: Workspace, args: list[str], names: str, helps: str) -> None:
    done = cli(*(["--track", TRACK] if "--track" not in args else []), *args)
    assert done.exit_code == 2 and names in done.output and helps in done.output
    assert FakeExecutor.calls == [] and not ws.ledger.exists()


def test_a_search_of_another_track_is_refused(cli: Callable[..., Any], ws: Workspace) -> None:
    FakeExecutor.reset()
    run_search(ws, SearchOptions(track=TRACK, name="night", trials=1), SilentView(), make_executor=FakeExecutor)
    done = cli("--track", "pocket", "--name", "night")
    assert done.exit_code == 2 and "belongs to track nano" in done.output


def test_uncommitted_changes_are_refused(cli: Callable[..., Any], ws: Workspace) -> None:
    (ws.root / "README.md").write_text("edited")
    done = cli("--track", TRACK)
    assert done.exit_code == 2 and "README.md" in done.output
    git(ws.root, "commit", "-aqm", "edited", **IDENTITY)
    assert cli("--track", TRACK, "--seeds", "4").exit_code == 0


def test_the_environment_of_the_fingerprint_is_what_searches_record() -> None:
    # stale() reads it back from search.started by these names; they are tracks.environment's own.
    assert {"torch", "cpu", "gpu", "numpy"} <= set(environment(get_track(TRACK)))
