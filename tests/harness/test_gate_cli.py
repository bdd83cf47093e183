"""``autoresearch gate``: what it prints agrees with the gate, mistakes end with exit code 2, nothing is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from harness.cli import app
from harness.gate.policy import POLICY_FILE, Policy, Prior, load_policy
from tests.conftest import git

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "ledger" / "autoresearch.jsonl"
needs_ledger = pytest.mark.skipif(not LEDGER.is_file(), reason="no ledger in this checkout")


def gate(*args: str) -> Result:
    return CliRunner().invoke(app, ["gate", *args], env={"COLUMNS": "200", "NO_COLOR": "1"})


def data(*args: str) -> Any:
    done = gate(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def here(*args: str) -> tuple[str, ...]:
    return *args, "--workspace", str(ROOT)


def test_show_has_every_field_and_its_origin() -> None:
    shown = data("show", "--track", "pocket")
    policy, rows = load_policy("pocket"), {r["field"]: r for r in shown["fields"]}
    names = [f.name for f in dataclasses.fields(Policy) if f.name not in ("track", "prior")]
    assert list(rows) == names + [f"prior.{f.name}" for f in dataclasses.fields(Prior)]
    assert shown["hash"] == policy.hash
    for name in names:
        value = getattr(policy, name)
        assert rows[name]["value"] == (list(value) if isinstance(value, tuple) else value) and rows[name]["meaning"]
    text = POLICY_FILE.read_text(encoding="utf-8")
    own = text.split("\n[pocket]\n")[1].split("\n[")[0]
    default = text.split("\n[default]\n")[1].split("\n[")[0]
    for name in names:
        want = next((f"[{where}]" for where, part in (("pocket", own), ("default", default))
                     if f"\n{name} =" in "\n" + part), "built in")
        assert rows[name]["from"] == want, name


def test_show_in_words() -> None:
    done = gate("show", "-t", "gpu-proxy")
    policy = load_policy("gpu-proxy")
    assert done.exit_code == 0 and policy.hash[:12] in done.output
    assert "[" + ", ".join(map(str, policy.looks)) + "]" in done.output
    assert "built in" in done.output and "[default]" in done.output


def test_a_derived_track_is_judged_by_its_bases_section() -> None:
    assert data("show", "-t", "pocket-2x")["section"] == "pocket"


@pytest.mark.parametrize("track", ["pocket", "gpu-proxy", "h100-1x"])
def test_simulate_with_the_shipped_noise(track: str) -> None:
    out = data(*here("simulate", "-t", track, "--shipped", "--trials", "4000"))
    policy = load_policy(track)
    assert out["noise"] == "shipped" and out["policy_hash"] == policy.hash and out["design"] is None
    assert out["target_gain"] == pytest.approx(2 * out["sigma"])
    assert out["rates"]["spread"]["null"]["p_keep"] <= 3 * policy.alpha
    assert len(out["goals"]) == 4 and out["now"]["looks"] == list(policy.looks)
    assert out["now"]["power"] == pytest.approx(out["rates"]["typical"]["powers"][1]["p_keep"], abs=0.05)


def test_simulate_says_on_what_it_rests() -> None:
    done = gate(*here("simulate", "--shipped", "--trials", "2000"))
    assert done.exit_code == 0 and "the policy's shipped noise" in done.output
    assert done.output.count("met ") + done.output.count("NOT MET") >= 4


@needs_ledger
def test_simulate_uses_the_ledger_where_it_has_enough() -> None:
    from harness.gate.design import ENOUGH_TRIALS
    from harness.gate.replay import measured
    from ledger.store import Ledger

    decided, calibration = measured(Ledger(LEDGER).records(), "pocket")
    confirmed = sum(d.stage == "confirm" for d in decided)
    out = data(*here("simulate", "--trials", "2000"))
    enough = confirmed >= ENOUGH_TRIALS or calibration is not None
    assert out["noise"] == ("ledger" if enough else "shipped")
    assert (out["own_effects"] is not None) == (confirmed >= ENOUGH_TRIALS)


def test_simulate_without_a_ledger(checkout: Path) -> None:
    out = data("simulate", "--trials", "2000", "-w", str(checkout))
    assert out["noise"] == "shipped" and out["noise_trials"] == 0


def test_design_marks_today_and_prints_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.gate import design as designs

    monkeypatch.setattr(designs.Grid, "policies", lambda self, today: iter(
        [today, dataclasses.replace(today, looks=(2, 4, 5, 6, 7, 8), alpha=0.02)]))
    out = data(*here("simulate", "--shipped", "--design", "--trials", "2000", "--target", "0.012"))
    assert sum(c["today"] for c in out["design"]) == 1
    done = gate(*here("simulate", "--shipped", "--design", "--trials", "2000"))
    assert "today" in done.output and "2 4 5 6 7 8" in done.output and "meets every target" in done.output


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "rates.png"
    done = gate(*here("simulate", "--shipped", "--trials", "1000", "--plot", str(file)))
    assert done.exit_code == 0 and str(file) in done.output
    assert file.read_bytes().startswith(b"\x89PNG")


@needs_ledger
def test_replay_under_another_file_and_nothing_is_written(tmp_path: Path) -> None:
    before = LEDGER.read_bytes()
    status = git(ROOT, "status", "--porcelain", "ledger")
    hard = tmp_path / "hard.toml"
    hard.write_text("[default]\nmateriality_bpb = 5.0\n[default.prior]\nsigma_d = 0.004\nsigma_run = 0.01\n")
    rows = data(*here("replay", "--policy", str(hard)))
    assert rows and not any(r["verdict"] == "keep" for r in rows)
    assert {r["noise"] for r in rows} <= {"re-pooled", "none"}
    done = gate(*here("replay", "--policy", str(hard)))
    assert done.exit_code == 0 and "under hard.toml" in done.output
    assert done.output.count("note: ") == 2 and "pooled again" in done.output
    assert LEDGER.read_bytes() == before
    assert git(ROOT, "status", "--porcelain", "ledger") == status


@needs_ledger
def test_replay_filters() -> None:
    everything = data(*here("replay"))
    tracks = {r["search"] for r in everything}
    one = sorted(tracks)[0]
    assert data(*here("replay", "--search", one)) == [r for r in everything if r["search"] == one]


MISTAKES = [
    (["show", "-t", "pokcet"], "pokcet", "pocket"),
    (["simulate", "-t", "pokcet"], "pokcet", "pocket"),
    (["simulate", "--target", "-1"], "--target", "above 0"),
    (["simulate", "--target", "nan"], "--target", "above 0"),
    (["simulate", "--trials", "5"], "--trials", "1000"),
    (["simulate", "--seed", "-1"], "--seed", "from 0"),
    (["simulate", "--plot", "x.doc"], "x.doc", ".png"),
    (["simulate", "--plot", "nothere/x.png"], "nothere", "no such folder"),
    (["replay", "--policy", "nothere.toml"], "nothere.toml", "name another file"),
    (["replay", "--track", "pokcet"], "pokcet", "pocket"),
    (["replay", "--search", "nope"], "--search nope", "ledger show"),
    (["explain", "nope-0001"], "nope-0001", "ledger show"),
]


@needs_ledger
@pytest.mark.parametrize(("args", "names", "helps"), MISTAKES, ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_mistakes(args: list[str], names: str, helps: str) -> None:
    done = gate(*(args if args[0] == "show" else here(*args)))
    shown = done.output + (done.stderr or "")
    assert done.exit_code == 2, shown
    assert names in shown and helps in shown
    assert done.exception is None or isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("text", ["[default]\nalpah = 1\n", "not toml", "[default]\nlooks = [1]\n"])
def test_a_bad_policy_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    done = gate(*here("replay", "--policy", str(file)))
    assert done.exit_code == 2 and "bad.toml" in done.output + (done.stderr or "")


def test_replay_without_a_ledger(checkout: Path) -> None:
    done = gate("replay", "-w", str(checkout))
    assert done.exit_code == 2 and "no ledger yet" in done.output + (done.stderr or "")
    assert git(checkout, "status", "--porcelain", "--ignored") == ""


@pytest.mark.parametrize("command", ["explain", "show", "simulate", "replay"])
def test_help_has_an_example(command: str) -> None:
    done = gate(command, "--help")
    assert done.exit_code == 0 and "Example: autoresearch gate" in done.output
