"""Panels: which configurations, and what is concluded, over worlds where the truth is known."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from scipy import stats
from typer.testing import CliRunner

import harness.calibrate as calibrate_module
import harness.cli.calibrate as cli_module
import harness.panel as panel_module
from harness.errors import InfraError, UserError
from harness.executor import RunFailed, RunRequest
from harness.gate.noise import shipped
from harness.gate.policy import load_policy
from harness.panel import (
    MAX_FALSE_KILL,
    MIN_TAU,
    SIZE,
    Report,
    assess,
    configurations,
    default_lengths,
    label,
    recommend,
    run_panel,
)
from harness.tracks import Track, get_track, run_seed
from harness.workspace import Workspace
from ledger.measured import PanelMeasured
from ledger.records import RunFigures
from ledger.store import Ledger
from ledger.verify import verify
from tests.conftest import git
from tests.harness.fakes import FakeExecutor, Killed, SilentView, fake_figures, unit
from trainer.knobs import REGISTRY

TRACK = "nano"
POCKET = get_track("pocket")


# -- which configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize("track", ["nano", "pocket"])
@pytest.mark.parametrize("recipe", [{}, {"warmdown_frac": 0.5, "muon_momentum": 0.9},
                                    {"beta2": 0.96, "matrix_lr": 0.5}])
def test_the_list_is_long_legal_and_goes_both_ways(track: str, recipe: dict[str, Any]) -> None:
    protocol = get_track(track)
    knobs = protocol.resolve(recipe)
    found = configurations(protocol, knobs)
    assert SIZE <= len(found) <= SIZE + 1
    hashes = {REGISTRY.config_hash(protocol.resolve(recipe, change)) for change in found}  # resolve refuses the illegal
    assert len(hashes) == len(found) and REGISTRY.config_hash(knobs) not in hashes
    ways: dict[str, set[bool]] = {}
    steps: list[int] = []
    for change in found:
        (name, value), = change.items()
        ladder = sorted(float(v) for v in REGISTRY.get(name).ladder)
        ways.setdefault(name, set()).add(float(value) > float(knobs[name]))
        low, high = sorted((float(value), float(knobs[name])))
        steps.append(sum(low < v < high for v in ladder))
    assert sum(len(w) == 2 for w in ways.values()) >= 4
    assert steps.count(0) >= 4 and sum(s > 0 for s in steps) >= 4  # the next rung, and steps over rungs
    assert found == configurations(protocol, knobs)


def test_locked_and_inactive_knobs_are_left_alone() -> None:
    track = dataclasses.replace(POCKET, fixed={**POCKET.fixed, "matrix_lr": 0.04}, start={
        **POCKET.start, "tie_embeddings": False})
    names = {n for change in configurations(track, track.resolve({})) for n in change}
    assert not {"matrix_lr", "tied_embed_lr"} & names  # the latter acts only on tied embeddings


def test_a_track_that_leaves_too_little_is_refused() -> None:
    free = {"beta2", "matrix_lr"}
    fixed = {k.name: POCKET.resolve({})[k.name] for k in REGISTRY if k.role != "shape" and k.name not in free}
    track = dataclasses.replace(POCKET, fixed={**POCKET.fixed, **fixed}, start={})
    with pytest.raises(UserError, match=r"pocket leaves 6 .* 12"):
        configurations(track, track.resolve({}))
    assert len(configurations(track, track.resolve({}), size=4)) == 4


def test_default_lengths() -> None:
    assert default_lengths(POCKET) == [30, 60, 90]
    assert default_lengths(get_track("nano")) == [1, 2, 3]


# -- what is concluded -----------------------------------------------------------------------------------

CHANGES: list[dict[str, Any]] = [{"matrix_lr": 0.03 + 0.001 * i} for i in range(8)]
TRUTH = [0.03, 0.02, 0.01, 0.0015, -0.0015, -0.01, -0.02, -0.03]  # pocket's materiality is 0.002


def run(change: dict[str, Any], stage: str, steps: int, k: int, bpb: float, dev: list[list[float]] | None = None,
        ) -> RunFigures:
    request = RunRequest(run_id=f"{stage}{steps}-{k}-{change}", owner="t", stage=stage, k=k, seed=1000 + k, commit="c",
                         knobs={**POCKET.resolve({}), **change, "iterations": steps},
                         split="val" if stage == "confirm" else "dev")
    return msgspec.structs.replace(fake_figures(request, bpb), dev=dev or [])


def panel(effects: dict[int, list[float]], pairs: int = 2, **dev: Any) -> Report:
    """A pocket panel whose gains are exactly ``effects`` by length and TRUTH in confirm; a seed shifts both sides."""
    def runs(stage: str, steps: int, gains: list[float], count: int) -> Any:
        sides: dict[Any, list[RunFigures]] = {(): [
            run({}, stage, steps, k, 2.5 + 0.1 * k, dev.get("base")) for k in range(count)]}
        for i, (change, gain) in enumerate(zip(CHANGES, gains, strict=True)):
            curve = dev["curves"][i] if "curves" in dev else None
            sides[tuple(change.items())] = [run(change, stage, steps, k, 2.5 + 0.1 * k - gain, curve)
                                            for k in range(count)]
        return sides

    policy = dataclasses.replace(load_policy("pocket"), breadth_pairs=pairs, breadth_veto_sigmas=1.0,
                                 materiality_bpb=0.002, **dev.get("policy", {}))
    return assess(policy, shipped(policy), POCKET, "h" * 64, "f" * 64, CHANGES,
                  {n: runs("breadth", n, gains, pairs) for n, gains in effects.items()}, runs("confirm", 120, TRUTH, 4))


def test_rank_and_kills_by_hand() -> None:
    reverse = TRUTH[::-1]
    mixed = [-0.05, 0.02, 0.01, 0.0, 0.0, -0.01, 0.5, -0.05]
    report = panel({30: reverse, 60: mixed, 90: TRUTH})
    assert report.body.confirm_gains == pytest.approx(TRUTH)
    short, middle, long = report.body.lengths
    assert (short.tau, long.tau) == pytest.approx((-1.0, 1.0))
    assert middle.tau == pytest.approx(stats.kendalltau(mixed, TRUTH)[0])
    assert middle.tau_low <= middle.tau <= middle.tau_high
    # Three are better by more than 0.002, three worse; the veto (1 standard error, about 0.003) takes what lies below.
    assert [(v.better, v.worse) for v in report.vetoes] == [(3, 3)] * 3
    assert (short.false_kill, short.true_kill) == (1.0, 0.0)
    assert (middle.false_kill, middle.true_kill) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (long.false_kill, long.true_kill) == (0.0, 1.0)
    warned = [w for w in report.warnings if "only veto" in w]
    assert ["30 steps" in warned[0], "60 steps" in warned[1], len(warned)] == [True, True, 2]
    assert middle.tau < MIN_TAU
    assert report.advice.startswith("90 steps") and "0 of 3" in report.advice
    assert report.body.seconds == pytest.approx(1.5 * 9 * (3 * 2 + 4))


def test_the_veto_is_the_policys_own_threshold() -> None:
    """Without spread inside a trial the threshold is known: -sigma / sqrt(n), sigma shrunk from the pool alone."""
    policy = load_policy("pocket")
    noise = shipped(policy)
    df0 = min(policy.shrink_df, noise.df)
    line = math.sqrt(df0 * noise.sigma_d**2 / (df0 + 1)) / math.sqrt(2)
    above, below = [-0.999 * line] * 8, [-1.001 * line] * 8
    report = panel({30: above, 60: below})
    assert [v.better_killed for v in report.vetoes] == [0, 3]
    assert [v.worse_killed for v in report.vetoes] == [0, 3]


def test_the_cheapest_length_that_spares_the_better_is_advised_with_its_doubt() -> None:
    assert panel({30: TRUTH, 60: TRUTH}).advice.startswith("30 steps")
    advice = panel({60: TRUTH}).advice
    assert f"at most {MAX_FALSE_KILL:.0%}" in advice and "interval 0% to 63%" in advice  # 1 - 0.05^(1/3)
    assert "29 better ones" in advice  # the least n with 1 - 0.05^(1/n) <= 0.1
    assert 1 - 0.05 ** (1 / 29) <= 0.1 < 1 - 0.05 ** (1 / 28)
    assert panel({30: TRUTH[::-1]}).advice.startswith("no length")


def test_no_better_configuration_no_advice() -> None:
    report = panel({60: TRUTH})
    none = [dataclasses.replace(v, better=0, better_killed=0) for v in report.vetoes]
    assert "no configuration" in recommend(report.body.lengths, none)


def test_early_rules_are_judged_one_by_one() -> None:
    # The better ones start badly: the early rule at 25% takes two of them, the one at 50% none.
    base = [[15.0, 5.0], [30.0, 4.0]]
    late = [3.9, 3.9, 3.9, 4.0, 4.0, 4.2, 4.2, 4.0]
    first = [5.3, 5.3, 5.1, 5.0, 5.0, 5.3, 5.0, 5.0]
    curves = [[[15.0, a], [30.0, b]] for a, b in zip(first, late, strict=True)]
    report = panel({60: TRUTH}, base=base, curves=curves,
                   policy={"early_fractions": (0.25, 0.5), "early_nats": (0.2, 0.1)})
    quarter, half = report.early[0]
    assert (quarter.kills.better_killed, quarter.kills.worse_killed) == (2, 1)
    assert (half.kills.better_killed, half.kills.worse_killed) == (0, 2)
    assert panel({60: TRUTH}, policy={"early_fractions": (), "early_nats": ()}).early == [[]]


# -- a whole panel ------------------------------------------------------------------------------------


def effect(request: RunRequest) -> float:
    """A gain of its own for every configuration, the same at every length; the dev slice is another level."""
    own = {k: v for k, v in request.knobs.items() if k != "iterations"}
    gain = 0.0 if own == plain() else 0.02 * unit("gain", sorted(own.items()))
    return (2.4 if request.split == "val" else 3.0) + 0.05 * unit("seed", request.seed) - gain


def plain() -> dict[str, Any]:
    return {k: v for k, v in get_track(TRACK).resolve({}).items() if k != "iterations"}


@pytest.fixture(autouse=True)
def fake_world(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeExecutor.reset()
    FakeExecutor.world = staticmethod(effect)
    monkeypatch.setattr(calibrate_module, "ensure_data", lambda ws, track, note: (Path("/nowhere"), "d" * 64))
    monkeypatch.setattr(calibrate_module, "require_own_code", lambda ws: None)


@pytest.fixture
def ws(checkout: Path) -> Workspace:
    return Workspace(root=checkout, main=checkout)


def go(ws: Workspace, lengths: list[int] | None = None, pairs: int = 2, confirm_pairs: int = 2) -> Any:
    return run_panel(ws, track=TRACK, name="", lengths=lengths, pairs=pairs, confirm_pairs=confirm_pairs,
                     view=SilentView(), ask=lambda cost: True, make_executor=FakeExecutor)


def written(ws: Workspace) -> list[PanelMeasured]:
    return [r.body for r in Ledger(ws.ledger).records(types=["panel.measured"])]  # type: ignore[misc]


def test_a_panel_over_a_world_without_noise(ws: Workspace) -> None:
    outcome = go(ws, lengths=[2, 3])
    (body,) = written(ws)
    assert outcome.ended == "measured" and outcome.body.body == body
    n = len(body.changes)
    assert len(FakeExecutor.calls) == (n + 1) * (2 * 2 + 2)
    track = get_track(TRACK)
    true = [0.02 * unit("gain", sorted(({**plain(), **c}).items())) for c in body.changes]
    assert body.confirm_gains == pytest.approx(true)
    assert [length.tau for length in body.lengths] == pytest.approx([1.0, 1.0])
    assert [length.steps for length in body.lengths] == [2, 3]
    by_stage: dict[tuple[str, int], set[int]] = {}
    for r in FakeExecutor.calls:
        by_stage.setdefault((r.stage, int(r.knobs["iterations"])), set()).add(r.seed)
        assert r.split == ("val" if r.stage == "confirm" else "dev")
        assert r.max_tokens == (track.val_tokens if r.stage == "confirm" else track.dev_tokens)
    assert set(by_stage) == {("breadth", 2), ("breadth", 3), ("confirm", track.confirm_steps)}
    assert by_stage["breadth", 2] == by_stage["breadth", 3]
    assert not by_stage["breadth", 2] & by_stage["confirm", track.confirm_steps]
    searched = {run_seed(1, stage, 0, k) for stage in ("breadth", "confirm") for k in range(50)}
    assert not searched & set().union(*by_stage.values())
    assert verify(ws.ledger).ok


@pytest.mark.parametrize("die", [1, 20, 60])
def test_killed_and_resumed_gives_the_same_record(ws: Workspace, tmp_path: Path, pristine: Path, die: int) -> None:
    git(tmp_path, "clone", "-q", str(pristine), "other")
    other = Workspace(root=tmp_path / "other", main=tmp_path / "other")
    go(other, lengths=[2, 3])
    FakeExecutor.calls.clear()
    FakeExecutor.die_before = die
    with pytest.raises(Killed):
        go(ws, lengths=[2, 3])
    FakeExecutor.die_before = None
    kept = {p.stem for p in (ws.state / calibrate_module.FIGURES_DIR).glob("*.json")}
    assert len(kept) >= die - get_track(TRACK).workers
    go(ws, lengths=[2, 3])
    again = Counter(r.run_id for r in FakeExecutor.calls)
    assert [r for r in kept if again[r] > 1] == []
    assert written(ws) == written(other)
    assert go(ws, lengths=[2, 3]).ended == "known" and len(written(ws)) == 1


def test_a_configuration_that_cannot_run_is_left_out(ws: Workspace) -> None:
    def nan(request: RunRequest) -> RunFailed | None:
        return RunFailed(request=request, kind="nan", detail="loss") if request.knobs["matrix_lr"] == 0.06 else None

    FakeExecutor.fails = staticmethod(nan)
    report = go(ws, lengths=[3]).body
    assert {"matrix_lr": 0.06} not in report.body.changes and len(report.body.changes) >= SIZE - 1
    assert report.left_out == ["matrix_lr=0.06: nan"]
    assert all(len(length.gains) == len(report.body.changes) for length in report.body.lengths)


def test_a_failing_incumbent_ends_it(ws: Workspace) -> None:
    FakeExecutor.fails = staticmethod(
        lambda r: RunFailed(request=r, kind="crash", detail="no") if r.owner == label({}) else None)
    with pytest.raises(InfraError):
        go(ws, lengths=[3])
    assert written(ws) == []


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, ws: Workspace) -> Iterator[Callable[..., Any]]:
    real = panel_module.run_panel
    monkeypatch.setattr(panel_module, "run_panel", lambda *a, **kw: real(*a, **kw, make_executor=FakeExecutor))
    app = typer.Typer()
    app.command()(cli_module.calibrate)
    app.command()(cli_module.panel)
    runner = CliRunner()
    yield lambda *args: runner.invoke(app, ["panel", "-w", str(ws.root), "--track", TRACK, *args])


def test_json_and_words(cli: Callable[..., Any]) -> None:
    done = cli("--lengths", "3", "--confirm-pairs", "2", "--json", "--yes")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["lengths"][0]["steps"] == 3 and data["vetoes"][0]["better"] > 0 and "advice" in data
    done = cli("--lengths", "3", "--confirm-pairs", "2", "--plain")
    assert done.exit_code == 0 and "Kendall" in done.stdout and "matrix_lr=0.06" in done.stdout
    assert "nothing was written" in done.stdout


@pytest.mark.parametrize(("args", "names", "helps"), [
    (["--lengths", "3,x"], "3,x", "30,60,90"),
    (["--lengths", "0"], "--lengths 0", "1 to 4"),
    (["--lengths", "3,5"], "--lengths 5", "1 to 4"),
    (["--pairs", "0"], "--pairs 0", "1 to"),
    (["--confirm-pairs", "99"], "--confirm-pairs 99", "1 to"),
])
def test_a_mistake_is_named(cli: Callable[..., Any], args: list[str], names: str, helps: str) -> None:
    done = cli(*args)
    assert done.exit_code == 2 and names in done.output and helps in done.output
    assert FakeExecutor.calls == []


def test_fewer_pairs_than_the_policy_judges(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def policy(track: str) -> Any:
        return dataclasses.replace(load_policy(track), breadth_pairs=3)

    monkeypatch.setattr(calibrate_module, "load_policy", policy)
    with pytest.raises(UserError, match=r"--pairs 2.* 3 pairs"):
        go(ws, lengths=[3])


def test_tracks_are_known_to_no_rule() -> None:
    """The list follows from knobs and incumbent alone: two tracks with the same of both have the same panel."""
    twin: Track = dataclasses.replace(POCKET, name="twin", confirm_steps=9999)
    assert configurations(twin, twin.resolve({})) == configurations(POCKET, POCKET.resolve({}))
