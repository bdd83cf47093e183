"""Tracks, recipes and seeds: precedence, locks, and what makes two numbers comparable."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import harness.tracks as tracks_module
from harness.cli.track import track_dict
from harness.errors import UserError
from harness.gate.policy import tracks as policy_sections
from harness.recipe import parse_recipe, render_recipe
from harness.tracks import (
    PARTS,
    TRACKS_FILE,
    Track,
    data_problem,
    declared_track,
    device_problem,
    differences,
    environment,
    fingerprint,
    get_track,
    load_tracks,
    protocol_changes,
    read_track,
    record_derivation,
    require_same,
    run_seed,
)
from harness.workspace import Workspace
from ledger.measured import TrackDerived
from ledger.store import Ledger
from tests.conftest import ROOT
from trainer.knobs import REGISTRY

RAW = tomllib.loads(TRACKS_FILE.read_text())
DERIVED = [name for name, body in RAW.items() if "base" in body]
POCKET = get_track("pocket")
FREE = [k for k in REGISTRY if k.name not in POCKET.locked and k.ladder]


@st.composite
def settings_(draw: Any) -> dict[str, Any]:
    """Some free knobs at values of their ladders (each alone valid)."""
    chosen = draw(st.lists(st.sampled_from([k for k in FREE if k.role != "model"]), unique_by=lambda k: k.name))
    return {k.name: draw(st.sampled_from(k.ladder)) for k in chosen}


def test_unknown_track_names_the_valid_ones() -> None:
    with pytest.raises(UserError, match=r"pokcet.*nano.*pocket"):
        get_track("pokcet")


@pytest.mark.parametrize("name", list(load_tracks()))
def test_locked_knobs_may_not_be_changed(name: str) -> None:
    track = declared_track(name)
    for knob in track.locked:
        with pytest.raises(UserError, match=knob):
            track.resolve({}, {knob: REGISTRY.get(knob).default})
        with pytest.raises(UserError, match=knob):
            parse_recipe(f"{knob} = {tomlish(REGISTRY.get(knob).default)}", track)


def tomlish(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def test_precedence_is_defaults_track_recipe_change() -> None:
    assert REGISTRY.defaults()["model_dim"] == 512
    assert POCKET.resolve({})["model_dim"] == 128
    assert POCKET.resolve({"model_dim": 144})["model_dim"] == 144
    assert POCKET.resolve({"model_dim": 144}, {"model_dim": 160})["model_dim"] == 160


@given(settings_())
def test_a_recipe_survives_its_file(values: dict[str, Any]) -> None:
    text = render_recipe(values, POCKET)
    assert POCKET.resolve(parse_recipe(text, POCKET)) == POCKET.resolve(values)
    plain = POCKET.resolve({})
    assert all(plain[k] != v for k, v in tomllib.loads(text).items())


def test_a_broken_recipe_names_file_and_knob() -> None:
    for text, word in (("beta2 = 2", "beta2"), ("bta2 = 0.9", "bta2"), ("beta2 =", "recipes/pocket.toml")):
        with pytest.raises(UserError, match=word):
            parse_recipe(text, POCKET)


FREE_FIELDS = (  # what may change from night to night without making numbers incomparable
    "title", "base", "why", "workers", "run_timeout_s", "hang_timeout_s", "step_time_limit_s", "memory_limit_bytes",
    "timing_steps", "converged_ratio", "converged_cap_bytes", "worker_price_per_hour",
)


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {**value, "beta2": 0.5}
    return value + "x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Track) if f.name not in ("device", "gpus")])
def test_the_fingerprint_moves_with_the_protocol_and_with_nothing_else(field: str) -> None:
    other = dataclasses.replace(POCKET, **{field: changed(getattr(POCKET, field))})
    assert (fingerprint(other, "d", "e")[0] == fingerprint(POCKET, "d", "e")[0]) == (field in FREE_FIELDS)
    assert (other.protocol_hash == POCKET.protocol_hash) == (field in FREE_FIELDS)


def test_the_fingerprint_moves_with_data_scoring_device_and_world_size() -> None:
    base = fingerprint(POCKET, "d", "e")[0]
    assert fingerprint(POCKET, "d", "e")[0] == base
    assert fingerprint(POCKET, "D", "e")[0] != base
    assert fingerprint(POCKET, "d", "E")[0] != base
    assert fingerprint(dataclasses.replace(POCKET, device="cuda"), "d", "e")[0] != base
    eight = dataclasses.replace(POCKET, gpus=8)
    # How many cards share a run is part of the machine, not of the protocol.
    assert eight.protocol_hash == POCKET.protocol_hash and fingerprint(eight, "d", "e")[0] != base


def test_pocket_is_still_the_protocol_that_the_published_ledger_was_measured_under() -> None:
    """A new field of Track that enters the protocol would silently end every comparison with what was measured."""
    starts = [json.loads(line)["body"] for line in (ROOT / "ledger/autoresearch.jsonl").read_text().splitlines()
              if '"type":"search.started"' in line]
    recorded = {s["fingerprint_parts"]["track"] for s in starts if s["track"] == "pocket"}
    assert POCKET.protocol_hash in recorded


@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_track_differs_from_its_base_in_what_it_sets_and_in_nothing_else(name: str) -> None:
    own = {k: v for k, v in RAW[name].items() if k not in ("base", "why", "title")}
    base, track = declared_track(RAW[name]["base"]), declared_track(name)
    before, after = base.protocol(), track.protocol()
    assert {k for k in after if before[k] != after[k]} == {"name", *own}
    assert protocol_changes(base, track) == {k: f"{before[k]} -> {v}" for k, v in own.items()}
    assert track.policy_track == (name if name in policy_sections() else base.policy_track)
    assert track.why and track.resolve({}) == base.resolve({})


NUMBERS = ("breadth_steps", "confirm_steps", "val_tokens", "dev_tokens", "cap_bytes", "threads")


@given(st.dictionaries(st.sampled_from(NUMBERS), st.integers(1, 10**6)),
       st.dictionaries(st.sampled_from(["beta2", "min_lr"]), st.sampled_from([0.25, 0.75])))
def test_any_derived_track_changes_exactly_what_it_says(fields: dict[str, int], fixed: dict[str, float]) -> None:
    raw = {**RAW, "mine": {"base": "pocket", "title": "t", "why": "w", "fixed": fixed, **fields}}
    track = read_track("mine", raw)
    expected = {k: f"{RAW['pocket'][k]} -> {v}" for k, v in fields.items() if RAW["pocket"][k] != v}
    expected |= {f"fixed.{k}": f"unset -> {v}" for k, v in fixed.items()}
    assert protocol_changes(POCKET, track) == expected
    assert track.fixed == {**POCKET.fixed, **fixed} and track.start == POCKET.start
    assert (track.policy_track, track.locked) == ("pocket", POCKET.locked | set(fixed))


def test_a_chain_of_derived_tracks_inherits_down_the_line() -> None:
    raw = {**RAW, "a": {"base": "pocket-2x", "title": "t", "why": "w", "cap_bytes": 7}}
    track = read_track("a", raw)
    assert (track.cap_bytes, track.confirm_steps, track.why) == (7, RAW["pocket-2x"]["confirm_steps"], "w")


@pytest.mark.parametrize(("body", "says"), [
    ({"base": "moon", "title": "t", "why": "w"}, r"\[x\]: base = 'moon'"),
    ({"base": "x", "title": "t", "why": "w"}, r"\[x\]: base = 'x'"),
    ({"base": "pocket", "title": "t"}, r"\[x\]: a derived track says"),
    ({"base": "pocket", "title": "t", "why": "w", "confirm_step": 3}, r"\[x\]: .*confirm_step"),
    ({"base": "pocket", "title": "t", "why": "w", "confirm_steps": 0}, r"\[x\]: confirm_steps = 0; .* from 1 up"),
    ({"base": "pocket", "title": "t", "why": "w", "cap_bytes": 1.5}, r"\[x\]: cap_bytes = 1.5"),
    ({"base": "pocket", "title": "t", "why": "w", "run_timeout_s": float("nan")}, r"\[x\]: run_timeout_s = nan"),
    ({"base": "pocket", "title": "t", "why": "w", "worker_price_per_hour": -1}, r"\[x\]: worker_price_per_hour = -1"),
    ({"base": "pocket", "title": "t", "why": "w", "device": "tpu"}, r"\[x\]: device = 'tpu'; valid: cpu, cuda"),
    ({"base": "nano", "title": "t", "why": "w", "converged_ratio": 0.9}, r"\[x\]: converged_ratio and"),
    ({"base": "pocket", "title": "t", "why": "w", "fixed": {"beta9": 1}}, "beta9"),
])
def test_a_wrong_declaration_names_track_field_and_what_is_valid(body: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_track("x", {**RAW, "x": body})


def test_tracks_that_derive_from_each_other_are_refused() -> None:
    raw = {**RAW, "a": {"base": "b", "title": "t", "why": "w"}, "b": {"base": "a", "title": "t", "why": "w"}}
    with pytest.raises(UserError, match=r"\[b\]: base = 'a'"):
        read_track("a", raw)


def test_a_derivation_is_recorded_once_for_each_protocol(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    record_derivation(ledger, POCKET)
    assert not (tmp_path / "ledger.jsonl").exists()
    track = declared_track("pocket-2x")
    other = dataclasses.replace(track, confirm_steps=241)
    for each in (track, track, other, track, other):
        record_derivation(ledger, each)
    bodies = [r.body for r in ledger.records(types=["track.derived"])]
    assert [(b.track, b.base, b.protocol) for b in bodies if isinstance(b, TrackDerived)] == [
        ("pocket-2x", "pocket", track.protocol_hash), ("pocket-2x", "pocket", other.protocol_hash)]
    assert isinstance(bodies[1], TrackDerived) and bodies[1].changes["confirm_steps"] == "120 -> 241"
    assert bodies[1].base_protocol == POCKET.protocol_hash and bodies[1].why == track.why


# -- what this machine lacks ---------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up machine with one GPU, its driver, and a CUDA build of torch."""
    for folder in ("dev", "driver"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    monkeypatch.setattr(tracks_module, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(tracks_module, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(tracks_module, "_torch_is_cpu_only", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_a_gpu_track_runs_only_where_a_gpu_can_be_used(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track = declared_track("gpu-proxy")
    assert device_problem(track) == "" and get_track("gpu-proxy") is track
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert "CUDA_VISIBLE_DEVICES" in device_problem(track)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert device_problem(track) == ""
    monkeypatch.setattr(tracks_module, "_torch_is_cpu_only", lambda: True)
    assert "CPU build" in device_problem(track)
    (machine / "dev" / "nvidia0").unlink()
    (machine / "dev" / "nvidiactl").touch()  # the control device alone is no GPU
    assert "--gpus all" in device_problem(track)
    (machine / "driver").rmdir()
    with pytest.raises(UserError, match=r"--to gpu-proxy: needs a CUDA GPU.*no NVIDIA driver.*pocket"):
        get_track("gpu-proxy", "--to")
    assert all(device_problem(t) == "" for t in load_tracks().values() if t.device == "cpu")


def test_a_run_on_several_gpus_is_not_built_yet(machine: Path) -> None:
    with pytest.raises(UserError, match=r"--track record-8x: .*multi-GPU runs are not built yet.*h100-1x"):
        get_track("record-8x")


@pytest.mark.parametrize(("text", "cpu_only"), [
    ("cuda: Optional[str] = None\n", True), ("cuda = None\n", True), ("cuda: Optional[str] = '13.0'\n", False),
    ("hip: Optional[str] = None\n", False)])
def test_a_cpu_build_of_torch_is_told_from_its_version_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cpu_only: bool
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2'\n{text}")
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(tracks_module.importlib.util, "find_spec", lambda name: spec)
    assert tracks_module._torch_is_cpu_only() == cpu_only


def test_missing_data_comes_with_the_commands_that_make_it(tmp_path: Path) -> None:
    track = declared_track("gpu-proxy")
    says = data_problem(track, tmp_path)
    assert str(tmp_path / track.data) in says
    assert re.search(r"`autoresearch data build --from \S+ --tokenizer \S*1024\S* --val-docs 50000 --out", says)
    (tmp_path / track.data).mkdir()
    assert data_problem(track, tmp_path) == "" == data_problem(POCKET, tmp_path)


def test_a_track_as_json_is_whole(tmp_path: Path, machine: Path) -> None:
    here = Workspace(root=ROOT, main=tmp_path)
    for name, track in load_tracks().items():
        row = json.loads(json.dumps(track_dict(here, track)))
        assert {**row["protocol"], **row["limits"]}.keys() == (
            {f.name for f in dataclasses.fields(Track)} - {"name", "title", "base", "why"})
        assert row["parts"]["track"] == track.protocol_hash and set(row["parts"]) == set(PARTS)
        assert bool(row["missing"]) == (name not in ("nano", "pocket", "pocket-2x"))
        assert bool(row["parts"]["environment"]) == (name != "record-8x") and row["parts"]["data"] == ""


# -- what differs --------------------------------------------------------------------------------

HASHES = st.sampled_from(["a" * 64, "b" * 64, "c" * 64])


@given(st.fixed_dictionaries(dict.fromkeys(PARTS, HASHES)), st.fixed_dictionaries(dict.fromkeys(PARTS, HASHES)))
def test_every_part_that_differs_is_named_and_no_other(a: dict[str, str], b: dict[str, str]) -> None:
    lines = differences(a, b)
    assert lines == [f"{words}: {a[p][:8]}.. -> {b[p][:8]}.." for p, words in PARTS.items() if a[p] != b[p]]
    if not lines:
        require_same(a, b, "x")
        return
    with pytest.raises(UserError, match=r"^night: .*fingerprint") as refused:
        require_same(a, b, "night")
    assert all(line in str(refused.value) for line in lines)


def test_the_environment_is_compared_by_what_was_recorded() -> None:
    now = environment(POCKET)
    cpu = now["cpu"].split(", ")
    then = {**now, "torch": "2.13.9", "gpu": "NVIDIA H200", "cpu": ", ".join(["family 1", *cpu[1:]])}
    parts = [{"environment": x} for x in ("1" * 64, "2" * 64)]
    assert differences(parts[0], parts[1], (then, now)) == [
        f"cpu family 1 -> {cpu[0]}", "gpu NVIDIA H200 -> none", f"torch 2.13.9 -> {now['torch']}"]
    # Hashes differ, but nothing recorded says why: it must not look as if nothing did.
    assert differences(parts[0], parts[1], (now, now)) == [f"{PARTS['environment']}: 11111111.. -> 22222222.."]
    assert differences(parts[0], parts[0], (then, now)) == []


def test_protocols_are_compared_field_by_field_as_far_as_they_are_known() -> None:
    two = declared_track("pocket-2x")
    a, b, old = {"track": POCKET.protocol_hash}, {"track": two.protocol_hash}, {"track": "0" * 64}
    assert differences(a, b) == ["track pocket -> pocket-2x", "breadth_steps 60 -> 120", "confirm_steps 120 -> 240"]
    (line,) = differences(old, b)
    assert "00000000.." in line and "pocket-2x as declared today" in line
    once = TrackDerived(track="pocket-2x", base="pocket", changes={"confirm_steps": "120 -> 200"}, base_protocol="",
                        protocol="0" * 64, why="")
    (line,) = differences(old, b, derived=[once])
    assert "pocket-2x as once derived from pocket by confirm_steps 120 -> 200" in line


@given(st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 50))
def test_seeds_depend_on_everything_and_fit_63_bits(search: int, generation: int, k: int) -> None:
    seed = run_seed(search, "confirm", generation, k)
    assert 0 <= seed < 2**63
    others = {run_seed(search + 1, "confirm", generation, k), run_seed(search, "breadth", generation, k),
              run_seed(search, "confirm", generation + 1, k), run_seed(search, "confirm", generation, k + 1)}
    assert len(others) == 4 and seed not in others
