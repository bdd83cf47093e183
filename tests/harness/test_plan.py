"""The plan of a night: its arithmetic recomputed, its figures traced to the ledger, nothing run and nothing written."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import harness.calibrate as calibrate_module
import harness.cli.calibrate as cli_module
import harness.plan as plan_module
import harness.search as search_module
from harness.calibrate import run_calibration
from harness.cli.common import guard
from harness.gate.noise import pool, shipped
from harness.gate.policy import load_policy
from harness.gate.simulate import rates
from harness.plan import (
    CALIBRATION_SHARE,
    DEFAULT_EDITS,
    DEFAULT_SEEDS,
    MIN_SEEDS,
    Night,
    RunTime,
    calibration_runs,
    cost_of,
    gate_rates,
    gather,
    hold,
    passing,
    plan,
    run_time,
    shrink,
    stage_time,
    timed_runs,
)
from harness.search import SearchOptions, run_search
from harness.tracks import declared_track, fingerprint, get_track
from harness.workspace import Workspace
from ledger.records import Decided, RunFigures
from ledger.store import Ledger
from tests.conftest import git
from tests.harness.fakes import FakeExecutor, SilentView, fake_figures
from tests.harness.test_gate_correlation import PARTS, measured, started

TRACK = "nano"


# -- arithmetic ----------------------------------------------------------------------------------------


def night(**change: Any) -> Night:
    base: dict[str, Any] = {
        "seconds": 8 * 3600.0, "trials": None, "workers": 2, "breadth_s": 16.0, "confirm_s": 24.0, "preflight_s": 6.0,
        "breadth_pairs": 2, "controls": 4, "confirm_runs": 2.5, "pass_share": 0.8, "keep_rate": 0.1, "false_rate": 0.02}
    return Night(**{**base, **change})


def clock(n: Night, trials: int) -> float:
    """Seconds that so many trials take, wave by wave, as the loop goes: an independent reckoning."""
    def wave_of(runs: int, each: float) -> float:
        total = 0.0
        while runs > 0:
            runs -= n.workers
            total += each
        return total

    spent = n.calibration_s + wave_of(n.breadth_pairs, n.breadth_s) + wave_of(n.controls, n.confirm_s)
    for _ in range(trials):
        spent += n.preflight_s + wave_of(n.breadth_pairs, n.breadth_s)
        spent += n.pass_share * n.confirm_s * (n.confirm_runs / n.workers if n.confirm_runs > n.workers else 1.0)
        settle = wave_of(n.breadth_pairs, n.breadth_s)
        settle += wave_of(n.honest_pairs, n.confirm_s)  # the parent again
        settle += wave_of(n.controls if n.controls > n.honest_pairs else n.honest_pairs, n.confirm_s)  # the winner
        spent += n.pass_share * n.keep_rate * settle
    return spent


def test_by_hand() -> None:
    held = hold(night())
    # 16 for breadth, 24 * 2.5 / 2 = 30 for the 8 in 10 that reach confirm, 6 before; a keep costs 16 + 2 * 24.
    assert held.trial_s == pytest.approx(6 + 16 + 0.8 * 30)
    assert (held.first_s, held.keep_s) == (16 + 48, 16 + 48)
    assert held.trials == pytest.approx((28800 - 64) / (46 + 0.8 * 0.1 * 64))
    assert held.keeps == pytest.approx(held.trials * 0.8 * 0.1)
    assert held.false_keeps == pytest.approx(held.trials * 0.8 * 0.02)
    assert (held.limit, held.dollars) == ("time", 0.0)


@settings(max_examples=150, deadline=None)
@given(
    hours=st.floats(0.2, 12), workers=st.integers(1, 8), b=st.floats(1, 60), c=st.floats(1, 360), p=st.floats(0.5, 30),
    pairs=st.integers(1, 4), controls=st.integers(1, 8), runs=st.floats(1, 8), share=st.floats(0.05, 1),
    keep=st.floats(0, 0.5), honest=st.integers(0, 6), calibration=st.floats(0, 3000))
def test_the_trials_that_fit_fit_and_one_more_does_not(
    hours: float, workers: int, b: float, c: float, p: float, pairs: int, controls: int, runs: float, share: float,
    keep: float, honest: int, calibration: float,
) -> None:
    n = night(seconds=hours * 3600, workers=workers, breadth_s=b, confirm_s=c, preflight_s=p, breadth_pairs=pairs,
              controls=controls, confirm_runs=runs, pass_share=share, keep_rate=keep, honest_pairs=honest,
              calibration_s=calibration, price=3.0)
    held = hold(n)
    fit = math.floor(held.trials + 1e-9)
    if fit > 0:
        assert clock(n, fit) <= n.seconds * (1 + 1e-9)
        assert held.seconds == pytest.approx(n.seconds)
        assert held.dollars == pytest.approx(n.seconds / 3600 * workers * 3.0)
    if held.trials > 0 or clock(n, 0) > n.seconds:
        assert clock(n, fit + 1) > n.seconds * (1 - 1e-9)
    asked = hold(dataclasses.replace(n, seconds=0.0, trials=7))
    assert (asked.trials, asked.limit) == (7.0, "trials") and asked.seconds == pytest.approx(clock(n, 7))


def test_the_lesser_of_trials_and_time_ends_it() -> None:
    assert hold(night(trials=5)).limit == "trials" and hold(night(trials=5)).trials == 5
    assert hold(night(trials=10**6)).limit == "time"
    assert hold(night(seconds=10.0)).trials == 0.0


@pytest.mark.parametrize("seconds", [600.0, 3600.0, 8 * 3600.0])
@pytest.mark.parametrize(("confirm", "workers"), [(24.0, 2), (180.0, 1), (360.0, 1)])
def test_a_calibration_is_shrunk_to_a_tenth_of_the_night(seconds: float, confirm: float, workers: int) -> None:
    def cost(seeds: int, edits: int) -> float:
        return math.ceil(calibration_runs(seeds, edits) / workers) * confirm

    best = shrink(seconds, confirm, workers)
    fitting = [(s, e) for s in range(MIN_SEEDS, DEFAULT_SEEDS + 1) for e in range(1, DEFAULT_EDITS + 1)
               if cost(s, e) <= CALIBRATION_SHARE * seconds]
    if not fitting:
        assert best == (0, 0)
    else:
        assert best in fitting
        assert calibration_runs(*best) == max(calibration_runs(*f) for f in fitting)


def test_calibration_runs_are_those_that_are_made() -> None:
    track = get_track(TRACK)
    changes = calibrate_module.reference_edits(track, track.resolve({}), 2)
    assert len(calibrate_module.calibration_jobs(track, changes, 8)) == calibration_runs(8, 2)


def test_cost_by_hand() -> None:
    ten, two = RunTime(seconds=10.0, source="a"), RunTime(seconds=2.0, source="b")
    cost = cost_of([(8, 5, ten), (4, 4, two), (3, 0, two)], workers=2, price=3.6)
    assert (cost.runs, cost.left, cost.seconds) == (15, 9, 3 * 10.0 + 2 * 2.0)
    assert cost.dollars == pytest.approx((50 + 8) / 3600 * 3.6)
    assert cost.source == "a; b" and "9 runs (6 of 15 are done)" in cost.words()


# -- run times -----------------------------------------------------------------------------------------


def figures(stage: str, steps: int, wall: float, train: float) -> tuple[str, RunFigures]:
    request = SimpleNamespace(run_id="r", seed=1, k=0, split="val",
                              knobs={"model_dim": 8, "num_layers": 1, "iterations": steps})
    return stage, msgspec.structs.replace(fake_figures(request, 2.5), wall_seconds=wall, train_seconds=train)  # type: ignore[arg-type]


def test_times_of_the_same_length_and_scaled_ones() -> None:
    runs = [figures("confirm", 120, w, 16.0) for w in (21.0, 22.0, 40.0)]
    runs.append(figures("confirm", 120, 3.0, 16.0))  # its training was taken over from an earlier attempt
    same = run_time(runs, "confirm", 120)
    assert same is not None and same.seconds == 22.0 and "n = 3" in same.source
    scaled = run_time(runs, "breadth", 60)
    assert scaled is not None and scaled.seconds == pytest.approx((22.0 - 16.0) + 60 * 16.0 / 120)
    assert "scaled" in scaled.source
    assert run_time([], "confirm", 120) is None and run_time(runs[3:], "confirm", 120) is None


def test_the_order_of_what_is_believed() -> None:
    track = get_track("pocket")
    assumed = stage_time([], "a", track, "confirm", 120)
    assert assumed.seconds == 120 * track.step_time_limit_s and not assumed.measured and "assumed" in assumed.source
    calibrated = stage_time([measured("a", seconds=900.0)], "a", track, "confirm", 120)
    assert calibrated.seconds == pytest.approx(900.0 / calibration_runs(4, 2)) and calibrated.measured
    breadth = stage_time([measured("a", seconds=900.0)], "a", track, "breadth", 60)
    assert breadth.source.startswith("at most") and not breadth.measured
    assert stage_time([measured("b", seconds=900.0)], "a", track, "confirm", 120) == assumed  # no run of its own


# -- what the gate would do -----------------------------------------------------------------------------


def test_rates_are_the_simulations_under_the_noise_that_is_named() -> None:
    policy = load_policy("pocket")
    found = gate_rates(policy, shipped(policy), "as shipped", trials=4000)
    assert (found.sigma, found.source) == (policy.prior.sigma_d, "as shipped")
    direct = rates(policy, 2 * policy.prior.sigma_d, trials=4000, seed=3, sigma=policy.prior.sigma_d)
    assert found.rates["2 sigma"].p_keep == direct.p_keep
    assert found.rates["materiality"].gain == policy.materiality_bpb
    p = [found.rates[f"{m} sigma"].p_keep for m in (1, 2, 3)]
    assert p == sorted(p) and p[2] > 5 * found.rates["no gain"].p_keep
    assert found.keep_rate == pytest.approx(0.9 * found.rates["no gain"].p_keep + 0.1 * p[1])
    assert found.false_rate / found.keep_rate == pytest.approx(found.false_share)


def test_measured_noise_moves_the_sigma_and_the_power() -> None:
    policy = load_policy("pocket")
    quiet = [([2.5 + 0.01 * i for i in range(30)], [2.5 + 0.01 * i + 1e-4 * (i % 3) for i in range(30)])]
    noise = pool(policy, quiet)
    found = gate_rates(policy, noise, "measured", trials=4000)
    assert found.sigma == noise.sigma_d < policy.prior.sigma_d
    gain = 2 * policy.prior.sigma_d
    before = rates(policy, gain, trials=4000, sigma=policy.prior.sigma_d).p_keep
    after = rates(policy, gain, trials=4000, sigma=noise.sigma_d, noise=noise).p_keep
    assert after > before


# -- from a workspace -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fake_world(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeExecutor.reset()
    for module in (calibrate_module, search_module):
        monkeypatch.setattr(module, "ensure_data", lambda ws, track, note: (Path("/nowhere"), "d" * 64))
        monkeypatch.setattr(module, "require_own_code", lambda ws: None)
    monkeypatch.setattr("harness.workspace.require_own_code", lambda ws: None)
    monkeypatch.setattr("trainer.data.manifest.load_manifest", lambda folder: SimpleNamespace(fingerprint="d" * 64))
    monkeypatch.setattr("trainer.tree.evaluator_hash", lambda root: "e" * 64)


@pytest.fixture
def ws(checkout: Path) -> Workspace:
    return Workspace(root=checkout, main=checkout)


def search(ws: Workspace, trials: int, **options: Any) -> None:
    run_search(ws, SearchOptions(track=TRACK, trials=trials, **options), SilentView(), make_executor=FakeExecutor)


def test_the_fingerprint_is_the_searchs_own(ws: Workspace) -> None:
    search(ws, 1)
    track = get_track(TRACK)
    fp, parts, notes = plan_module.todays_fingerprint(ws, track)
    (begun,) = [r.body for r in Ledger(ws.ledger).records(types=["search.started"])]
    assert (fp, parts, notes) == (begun.fingerprint, begun.fingerprint_parts, [])  # type: ignore[attr-defined]


def test_a_fresh_checkout_is_planned_on_assumptions_that_are_named(ws: Workspace) -> None:
    found = gather(ws, SearchOptions(track=TRACK))
    assert found.calibration.status == "missing" and found.night.seconds == 8 * 3600
    assert found.night.calibration_s == found.calibration.seconds > 0
    assert not any(t.measured for t in found.times.values())
    assert "nothing measured" in found.gate.source and found.decided == 0 and found.night.pass_share == 1.0
    assert git(ws.root, "status", "--porcelain", "--ignored") == "" and FakeExecutor.calls == []
    assert git(ws.root, "branch", "--list", "search/*") == ""


def test_after_a_search_and_a_calibration_figures_come_from_the_ledger(ws: Workspace) -> None:
    search(ws, 6)
    before = gather(ws, SearchOptions(track=TRACK, trials=10))
    assert (before.decided, before.night.trials, before.calibration.status) == (6, 4, "missing")
    assert [t.measured for t in before.times.values()] == [True] * 3
    assert before.times["confirm"].seconds == before.times["breadth"].seconds == 1.5  # the fakes' wall time
    assert "verdict" in before.gate.source
    records = list(Ledger(ws.ledger).records())
    share, source = passing(records, before_fp(ws))
    bodies = [r.body for r in records if isinstance(r.body, Decided)]
    assert share == sum(b.stage == "confirm" for b in bodies) / len(bodies) and "6 trials" in source
    run_calibration(ws, track=TRACK, name="", seeds=4, edits=1, view=SilentView(), ask=lambda cost: True,
                    make_executor=FakeExecutor)
    after = gather(ws, SearchOptions(track=TRACK, trials=10))
    assert (after.calibration.status, after.calibration.advice, after.night.calibration_s) == ("present", "", 0.0)
    assert "a calibration of 1 edit" in after.gate.source
    assert after.held.seconds < before.held.seconds


def before_fp(ws: Workspace) -> str:
    return plan_module.todays_fingerprint(ws, get_track(TRACK))[0]


def test_runs_of_another_fingerprint_are_a_labelled_estimate(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    search(ws, 1)
    monkeypatch.setattr("trainer.tree.evaluator_hash", lambda root: "f" * 64)
    found = gather(ws, SearchOptions(track=TRACK))
    confirm = found.times["confirm"]
    assert confirm.seconds == 1.5 and not confirm.measured and "another fingerprint" in confirm.source
    assert "nothing measured" in found.gate.source  # figures do not cross
    assert timed_runs(list(Ledger(ws.ledger).records()), {before_fp(ws)}) == []


def test_stale_says_why_in_the_plan() -> None:
    track = declared_track("pocket")
    records = [measured("a"), started("a", {"torch": "0"})]
    found = plan(records, "b", {**PARTS, "data": "x" * 64}, track, "pocket", None, None, 0, [])
    assert found.calibration.status == "stale" and "data" in found.calibration.why
    assert "under another fingerprint (a)" in found.gate.source  # as a scale, as the search would take it
    assert found.gate.sigma == 0.0012
    unknown = plan(records, "", {}, track, "pocket", None, None, 0, ["no data"])
    assert unknown.calibration.status == "missing" and unknown.notes == ["no data"]


def test_too_dear_a_calibration_says_what_would_fit() -> None:
    track = declared_track("pocket")
    short = plan([], "b", PARTS, track, "pocket", None, time.time() + 600, 0, []).calibration
    assert short.share > CALIBRATION_SHARE and "even with --seeds 4 --edits 1" in short.advice
    hours = float(short.advice.split("night of ")[1].split(" ")[0])
    fits = plan([], "b", PARTS, track, "pocket", None, time.time() + (hours + 0.1) * 3600, 0, []).calibration
    assert "--seeds" in fits.advice and "even" not in fits.advice
    long = plan([], "b", PARTS, track, "pocket", None, time.time() + 100 * 3600, 0, []).calibration
    assert long.share <= CALIBRATION_SHARE and long.advice == "autoresearch gate calibrate --track pocket"


def test_a_night_on_a_machine_that_is_not_here() -> None:
    track = declared_track("gpu-proxy")
    found = plan([], fingerprint(track, "d" * 64, "e" * 64)[0], PARTS, track, "gpu-proxy", None, None, 0, [])
    assert found.held.dollars == pytest.approx(8 * track.workers * track.worker_price_per_hour)


# -- the printing ---------------------------------------------------------------------------------------


@pytest.fixture
def cli(ws: Workspace) -> Iterator[Callable[..., Any]]:
    """show_plan behind the guard that every command has, on a workspace."""
    app = typer.Typer()

    @app.command()
    @guard
    def show(track: str = TRACK, name: str = "", agent: str = "garden", json_: bool = typer.Option(False, "--json"),
             ) -> None:
        cli_module.show_plan(ws, SearchOptions(track=track, name=name, agent=agent), json_)

    runner = CliRunner()
    yield lambda *args: runner.invoke(app, list(args))


def test_json_and_words(cli: Callable[..., Any]) -> None:
    done = cli("--json")
    data = json.loads(done.stdout)
    assert done.exit_code == 0 and data["held"]["trials"] > 0 and set(data["gate"]["rates"]) >= {"1 sigma", "no gain"}
    done = cli()
    assert done.exit_code == 0, done.output
    for text in ("trials that fit", "ESTIMATE, assumed", "kept at 3 sigma", "nothing was run", "missing", "dollars"):
        assert text in done.stdout


@pytest.mark.parametrize(("args", "names"), [
    (["--track", "pokcet"], "pokcet"), (["--agent", "gpt"], "gpt"), (["--name", "../x"], "../x"),
])
def test_a_mistake_is_named(cli: Callable[..., Any], args: list[str], names: str) -> None:
    done = cli(*args)
    assert done.exit_code == 2 and names in done.output and "Traceback" not in done.output


def test_a_search_of_another_track(cli: Callable[..., Any], ws: Workspace) -> None:
    search(ws, 1, name="night")
    done = cli("--track", "pocket", "--name", "night")
    assert done.exit_code == 2 and "belongs to track nano" in done.output
