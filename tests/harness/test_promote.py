"""Promotion over a made-up world: figures recomputed independently, kills, stops, refusals."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

import harness.promote as promote_module
from harness.bench import Bench, Stopped
from harness.cli.promote import transfer_dict, words
from harness.errors import InfraError, UserError
from harness.executor import RunFailed, RunRequest
from harness.promote import Subject, Transfer, find_subject, interval, place, promote, seeds_of, turns, verdict
from harness.tracks import get_track, run_seed
from harness.workspace import Workspace, recipe_path
from ledger.decode import Record
from ledger.measured import TrackDerived, TransferMeasured
from ledger.mirror import REF
from ledger.queries import transfers
from ledger.records import Writer
from ledger.store import Ledger
from ledger.verify import verify
from tests.conftest import IDENTITY, git
from tests.harness.fakes import FakeExecutor, Killed, SilentView
from tests.harness.test_cli import cli
from tests.ledger.samples import EVERY, decided, proposed, run_trial, search_started

SOURCE, TARGET, SEARCH = "nano", "pocket-2x", "night"
RECIPE = {"muon_momentum": 0.9, "warmdown_frac": 0.5}
CHANGE = {"matrix_lr": 0.02}


class Disk(FakeExecutor):
    """Keeps finished runs as LocalExecutor does: one whose folder holds an equal run does not train again."""

    finished: ClassVar[dict[str, RunRequest]] = {}
    trained: ClassVar[list[str]] = []

    def submit(self, request: RunRequest, sink: Any) -> Any:
        future = super().submit(request, sink)
        if not isinstance(future.result(), RunFailed) and Disk.finished.get(request.run_id) != request:
            Disk.finished[request.run_id] = request
            Disk.trained.append(request.run_id)
        return future


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeExecutor.reset()
    Disk.finished, Disk.trained = {}, []
    # A subclass has its own of what it is told to do last: take back what an earlier test told it.
    for name in ("world", "fails", "calls", "die_before"):
        if name in Disk.__dict__:
            delattr(Disk, name)
    monkeypatch.setattr(promote_module, "ensure_data", lambda ws, track, note: (Path("/nowhere"), "d" * 64))
    monkeypatch.setattr(promote_module, "require_own_code", lambda ws: None)


@pytest.fixture(scope="module")
def night(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose ledger holds search "night" on nano: a keep (its branch has it), a rejection, an open trial."""
    checkout = tmp_path_factory.mktemp("night") / "checkout"
    git(checkout.parent, "clone", "-q", str(pristine), str(checkout))
    start = commit_recipe(checkout, RECIPE)
    git(checkout, "branch", f"search/{SEARCH}")
    git(checkout, "checkout", "-q", f"search/{SEARCH}")
    kept = commit_recipe(checkout, {"warmdown_frac": 0.5, **CHANGE})
    git(checkout, "checkout", "-q", "main")
    ledger = Ledger(checkout / "ledger" / "autoresearch.jsonl")
    ledger.append("search.started", search_started(track=SOURCE, incumbent_commit=start, seed=5), search=SEARCH)
    run_trial(ledger, "night-0001", 1, decided("keep", 2.24, 2.25), sha=kept, parent=start, change=CHANGE,
              previous={"matrix_lr": 0.04})
    run_trial(ledger, "night-0002", 2, decided("reject", 2.26, 2.25), parent=kept, change={"beta2": 0.99})
    ledger.append("trial.proposed", proposed(3, kept), search=SEARCH, trial="night-0003")
    return checkout


@pytest.fixture
def ws(night: Path) -> Iterator[Workspace]:
    """:func:`night`, put back afterwards: a copy for every test would be a thousand files each."""
    here = Workspace(root=night, main=night)
    before = here.ledger.read_bytes()
    yield here
    git(night, "checkout", "-q", "--", ".")
    git(night, "update-ref", "-d", REF)
    shutil.rmtree(here.state, ignore_errors=True)
    here.ledger.write_bytes(before)


def commit_recipe(folder: Path, values: dict[str, Any]) -> str:
    path = folder / recipe_path(SOURCE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{k} = {v}\n" for k, v in values.items()))
    git(folder, "add", "-A", "-f", str(path))
    git(folder, "commit", "-q", "-m", "recipe", **IDENTITY)
    return git(folder, "rev-parse", "HEAD")


def go(ws: Workspace, what: str = "night-0001", to: str = TARGET, **options: Any) -> Transfer:
    return promote(ws, what, to, options.pop("view", SilentView()), make_executor=Disk, **{"pairs": 3, **options})


def records(ws: Workspace, kind: str) -> list[Record]:
    return list(Ledger(ws.ledger).records(types=[kind]))


def expected(knobs: dict[str, Any], seeds: Sequence[int]) -> list[float]:
    """What the world gives for these knobs, asked without the code under test."""
    track = get_track(TARGET)
    steps = {**track.resolve(knobs), "iterations": 240}
    return [Disk.world(RunRequest(run_id="", owner="", stage="confirm", k=0, seed=s, knobs=steps, commit=""))
            for s in seeds]


def test_the_figures_are_those_of_paired_runs_there(ws: Workspace) -> None:
    found = go(ws, pairs=5)
    seeds = [run_seed(5, f"transfer:{TARGET}:night-0001", 0, k) for k in range(5)]
    gains = [b - c for b, c in zip(expected(RECIPE, seeds), expected(RECIPE | CHANGE, seeds), strict=True)]
    mean = sum(gains) / 5
    se = math.sqrt(sum((g - mean) ** 2 for g in gains) / 4 / 5)
    low, high = scipy.stats.t.interval(0.9, 4, loc=mean, scale=se)
    (record,) = records(ws, "transfer.measured")
    r = record.body
    assert isinstance(r, TransferMeasured) and r == found.record
    assert (record.search, record.trial) == (SEARCH, "night-0001")
    assert r.differences == pytest.approx(gains) and r.ks == [0, 1, 2, 3, 4]
    assert (r.gain, r.se, r.low, r.high) == pytest.approx((mean, se, low, high))
    assert (r.verdict, r.source_gain, r.change) == ("transfers", pytest.approx(0.01), CHANGE)
    assert (r.source_track, r.track) == (SOURCE, TARGET) and r.fingerprint != r.source_fingerprint
    assert r.delta_bytes == 0 and r.delta_step_pct == 0.0 and r.seconds == pytest.approx(10 * 1.5)
    assert verify(ws.ledger).ok


def test_the_sides_take_turns_on_shared_fresh_seeds_under_the_targets_protocol(ws: Workspace) -> None:
    go(ws, pairs=4)
    calls = Disk.calls
    assert [c.owner == "base" for c in calls] == [True, False, False, True] * 2
    track = get_track(TARGET)
    for c in calls:
        assert (c.split, c.max_tokens, c.knobs["iterations"]) == ("val", track.val_tokens, track.confirm_steps)
        assert c.knobs["muon_momentum"] == 0.9 and c.knobs["model_dim"] == track.start["model_dim"]
    seeds = {k: {c.seed for c in calls if c.k == k} for k in range(4)}
    assert all(len(s) == 1 for s in seeds.values()) and len(set.union(*seeds.values())) == 4
    used = {run_seed(5, stage, g, k) for stage in ("breadth", "confirm", "preflight") for g in range(9)
            for k in range(40)}
    assert not used & set.union(*seeds.values())


@pytest.mark.parametrize("at", range(6))
def test_killed_before_any_run_it_goes_on_without_repeating_one(ws: Workspace, at: int) -> None:
    before = ws.ledger.read_bytes()
    Disk.die_before = at
    with pytest.raises(Killed):
        go(ws)
    done = list(Disk.trained)
    assert len(done) == at
    new = ws.ledger.read_bytes().removeprefix(before).splitlines()
    assert len(new) == 1 and b'"type":"track.derived"' in new[0]
    Disk.die_before = None
    found = go(ws)
    assert len(Disk.trained) == len(set(Disk.trained)) == 6 and Disk.trained[:at] == done
    assert found.record.differences == pytest.approx(
        [b - c for b, c in zip(expected(RECIPE, found.seeds), expected(RECIPE | CHANGE, found.seeds), strict=True)])
    assert len(records(ws, "transfer.measured")) == len(records(ws, "track.derived")) == 1


def test_measured_once_is_not_measured_again_and_more_pairs_extend_it(ws: Workspace) -> None:
    first = go(ws, pairs=2)
    again = go(ws, pairs=2)
    assert again.known and again.record == first.record and len(Disk.calls) == 4
    longer = go(ws, pairs=5)
    assert longer.record.differences[:2] == first.record.differences and len(Disk.trained) == 10
    assert go(ws, pairs=3).record == longer.record
    found = list(Ledger(ws.ledger).records())
    assert len([r for r in found if r.type == "transfer.measured"]) == 2
    assert transfers(found) == {"night-0001": [longer.record]}


def test_transfers_are_listed_by_subject_and_kept_apart_by_track() -> None:
    def record(i: int, **changes: Any) -> Any:
        body = structs.replace(EVERY["transfer.measured"], **changes)
        return structs.replace(sample, seq=i, type="transfer.measured", body=body)

    sample = Record(v=1, seq=0, id="", type="note", ts="", writer=Writer(host="", pid=0, boot=""), search="", trial="",
                    body=EVERY["note"], prev="", h="")
    items = [record(0), record(1, track="gpu-proxy"), record(2, subject="stack of night"), record(3, gain=0.5),
             sample]
    found = transfers(items)
    assert list(found) == ["t1", "stack of night"]
    assert [(t.track, t.gain) for t in found["t1"]] == [("pocket-2x", 0.5), ("gpu-proxy", 0.011)]


@pytest.mark.parametrize("presses", [1, 2])
def test_an_interrupt_stops_cleanly_and_the_same_command_goes_on(
    ws: Workspace, presses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    benches: list[Bench] = []
    monkeypatch.setattr(promote_module, "Bench", lambda **fields: benches.append(Bench(**fields)) or benches[-1])

    def fails(request: RunRequest) -> RunFailed | None:
        if len(benches) > 1 or request.k != 1:
            return None
        for _ in range(presses):
            benches[0].on_signal(2, None)
        stopped = RunFailed(request=request, kind="stopped", detail="stopped by the user")
        return stopped if presses == 2 else None

    Disk.fails = staticmethod(fails)
    with pytest.raises(Stopped):
        go(ws)
    assert len(Disk.trained) == (4 if presses == 1 else 2)
    assert records(ws, "transfer.measured") == []
    go(ws)
    assert len(Disk.trained) == 6 and len(records(ws, "transfer.measured")) == 1


@pytest.mark.parametrize(("side", "kind"), [("base", "infra"), ("night-0001", "nan")])
def test_a_run_that_fails_is_named_and_nothing_is_recorded(ws: Workspace, side: str, kind: Any) -> None:
    Disk.fails = staticmethod(
        lambda r: RunFailed(request=r, kind=kind, detail="it broke", log_tail="the log") if r.owner == side else None)
    with pytest.raises(InfraError, match=rf"{'base' if side == 'base' else 'candidate'}'s run .*it broke\nthe log"):
        go(ws)
    assert records(ws, "transfer.measured") == []


def test_a_stack_is_all_that_the_search_kept(ws: Workspace) -> None:
    """The keep set matrix_lr, and by hand its commit took muon_momentum out of the recipe: both are the change."""
    found = go(ws, "stack:night")
    plain = get_track(SOURCE).resolve({})["muon_momentum"]
    assert found.record.subject == "stack of night"
    assert found.record.change == {**CHANGE, "muon_momentum": plain}
    assert {c.knobs["muon_momentum"] for c in Disk.calls if c.owner == "base"} == {0.9}
    assert {c.knobs["muon_momentum"] for c in Disk.calls if c.owner != "base"} == {plain}
    (record,) = records(ws, "transfer.measured")
    assert (record.search, record.trial) == (SEARCH, "")
    assert found.record.source_gain is None, "no controls of base and tip under one fingerprint"


def test_a_rejected_trial_can_be_promoted_too(ws: Workspace) -> None:
    found = go(ws, "night-0002", pairs=2)
    assert found.record.source_gain == pytest.approx(-0.01)
    assert set(found.record.change) == {"beta2"} and {c.knobs["matrix_lr"] for c in Disk.calls} == {0.02}


@pytest.mark.parametrize(("what", "to", "says"), [
    ("night-0009", TARGET, r"night-0009: no such trial; decided last: night-0001, night-0002"),
    ("night-0003", TARGET, r"night-0003: not decided yet"),
    ("stack:day", TARGET, r"stack:day: no such search; valid: night"),
    ("night-0001", SOURCE, r"--to nano: .*another"),
    ("night-0001", "moon", r"--to moon: no such track; valid: nano"),
    ("night-0001", "record-8x", r"--to record-8x: .*multi-GPU runs are not built yet"),
])
def test_a_mistake_is_named_and_nothing_is_written(ws: Workspace, what: str, to: str, says: str) -> None:
    before = ws.ledger.read_bytes()
    with pytest.raises(UserError, match=says):
        go(ws, what, to)
    assert ws.ledger.read_bytes() == before and Disk.calls == [] and not ws.search_lock.exists()


def test_a_dirty_checkout_is_refused(ws: Workspace) -> None:
    (ws.root / "Makefile").write_text("mine\n")
    with pytest.raises(UserError, match=r"Makefile.*[Cc]ommit or stash"):
        go(ws)


def subject(ws: Workspace, what: str = "night-0001") -> Subject:
    return find_subject(promote_module.open_repo(ws.root), Ledger(ws.ledger), what)


def test_knobs_that_the_target_fixes_are_left_out_or_refused(ws: Workspace) -> None:
    target = get_track(TARGET)
    one = subject(ws)
    fixes = dataclasses.replace(target, fixed={**target.fixed, "muon_momentum": 0.97})
    placed = place(one, fixes)
    assert placed.left_out == ("muon_momentum",)
    assert placed.base["muon_momentum"] == placed.candidate["muon_momentum"] == 0.97
    assert {k for k in placed.base if placed.base[k] != placed.candidate[k]} == set(CHANGE)
    with pytest.raises(UserError, match=r"knob matrix_lr: fixed by track pocket-2x"):
        place(one, dataclasses.replace(target, fixed={**target.fixed, "matrix_lr": 0.03}))
    with pytest.raises(UserError, match=r"nothing to measure on track pocket-2x.*matrix_lr = 0.02"):
        place(one, dataclasses.replace(target, start={**target.start, "matrix_lr": 0.02}))
    with pytest.raises(UserError, match=r"cannot be set on track pocket-2x: num_heads = 3"):
        place(dataclasses.replace(one, change={"num_heads": 3}), target)


def test_what_is_shown_names_every_figure_and_every_caveat(ws: Workspace) -> None:
    found = go(ws, pairs=2)
    text = "\n".join(words(dataclasses.replace(
        found, cap_bytes=100, placed=dataclasses.replace(found.placed, left_out=("beta2",)))))
    r = found.record
    for part in (f"{r.gain:+.4f}", f"{r.low:+.4f}", f"{r.high:+.4f}", r.verdict, "+0.0100", "matrix_lr: 0.04 -> 0.02",
                 "fixes them: beta2", "over the cap"):
        assert part in text
    shown = transfer_dict(found)
    assert shown["differences"] == r.differences and [x["seed"] for x in shown["runs"]["base"]] == shown["seeds"]
    again = go(ws, pairs=2)
    assert transfer_dict(again)["measured_now"] is False and "nothing was run" in "\n".join(words(again))


def test_on_the_command_line_mistakes_exit_2_and_leave_nothing(checkout: Path) -> None:
    for args, says in ((["pocket-0001", "--to", "pocket-2x"], "no ledger yet"), (["t", "--to", "x"], "--to x"),
                       (["t", "--to", "pocket-2x", "--pairs", "1"], "--pairs"), (["t"], "--to")):
        done = cli(checkout, "promote", *args)
        assert done.returncode == 2 and says in done.stderr + done.stdout and "Traceback" not in done.stderr
    assert git(checkout, "status", "--porcelain", "--ignored") == ""


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=12, unique=True))
def test_the_verdict_agrees_with_a_t_test(ten_thousandths: list[int]) -> None:
    values = [v * 1e-4 for v in ten_thousandths]
    mean, _, low, high = interval(values)
    test: Any = scipy.stats.ttest_1samp(values, 0.0, alternative="greater")
    up = float(test.pvalue)
    assert low <= mean <= high
    if abs(up - 0.05) > 1e-6 and abs(up - 0.95) > 1e-6:
        assert verdict(low, high) == ("transfers" if up < 0.05 else "reverses" if up > 0.95 else "unclear")


@given(st.integers(2, 40))
def test_every_run_has_its_turn_once_and_neither_side_is_always_first(pairs: int) -> None:
    order = turns(pairs)
    assert sorted(order) == sorted((k, s) for k in range(pairs) for s in ("base", "candidate"))
    first = [side for (k, side), (before, _) in zip(order, [(-1, ""), *order], strict=False) if k != before]
    assert len(first) == pairs and abs(first.count("base") - first.count("candidate")) <= 1


def test_promotions_share_no_seed(ws: Workspace) -> None:
    lists = [seeds_of(subject(ws, what), get_track(track), 20) for what in ("night-0001", "night-0002", "stack:night")
             for track in ("pocket", "pocket-2x")]
    assert len({s for group in lists for s in group}) == 120


def test_the_target_tracks_derivation_is_written_once(ws: Workspace) -> None:
    go(ws, pairs=2)
    go(ws, "night-0002", pairs=2)
    (record,) = records(ws, "track.derived")
    assert isinstance(record.body, TrackDerived) and record.body.protocol == get_track(TARGET).protocol_hash
    go(ws, to="pocket", pairs=2)
    assert len(records(ws, "track.derived")) == 1
