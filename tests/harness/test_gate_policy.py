"""The policy file: what it says, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.gate.policy import Policy, PolicyError, Prior, from_dict, hash_of, load_policy, tracks
from harness.tracks import load_tracks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("track", ["default", "pocket", "nano", "gpu-proxy", "h100-1x", "record-8x"])
def test_shipped_policies_load_and_survive_json(track: str) -> None:
    policy = load_policy(track)
    again = from_dict(json.loads(json.dumps(policy.to_dict(), allow_nan=False)))
    assert again == policy and again.hash == policy.hash == hash_of(json.loads(json.dumps(policy.to_dict())))


def test_every_section_of_the_file_is_a_known_track_or_default() -> None:
    assert set(tracks()) == {"pocket", "nano", "gpu-proxy", "h100-1x", "record-8x"}


def test_every_track_is_judged_by_a_section_of_its_own_or_of_its_base() -> None:
    sections = set(tracks())
    for name, track in load_tracks().items():
        policy = load_policy(track.policy_track)
        assert track.policy_track in sections and policy.track == track.policy_track
        assert policy.for_tests_only == track.meaningless
        assert track.meaningless or policy.honest_pairs >= 2, f"{name}: a keep is measured again"
    assert set(load_tracks()) >= sections


def test_track_overrides_default_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "gate.toml"
    path.write_text("[default]\nalpha = 0.02\nprice_mb = 1\n[default.prior]\nsigma_d = 0.1\nsigma_run = 0.2\n"
                    "[mine]\nalpha = 0.03\n[mine.prior]\nsigma_d = 0.15\n")
    mine, other = load_policy("mine", path), load_policy("other", path)
    assert (mine.alpha, mine.price_mb, mine.prior.sigma_d, mine.prior.sigma_run) == (0.03, 1.0, 0.15, 0.2)
    assert (other.alpha, other.track) == (0.02, "other")


@pytest.mark.parametrize(("text", "words"), [
    ("[pocket]\nalpah = 0.01\n", ("alpah", "0.01", "valid fields", "alpha")),
    ("[pocket]\nalpha = 0.7\n", ("alpha", "0.7", "valid", "0.5")),
    ("[pocket]\nalpha = true\n", ("alpha", "True", "valid")),
    ("[pocket]\nalpha = nan\n", ("alpha", "nan", "valid")),
    ("[pocket]\nlooks = [1, 2]\n", ("looks", "[1, 2]", "valid")),
    ("[pocket]\nlooks = [4, 2]\n", ("looks", "[4, 2]", "valid")),
    ("[pocket]\nlooks = []\n", ("looks", "[]", "valid")),
    ("[pocket]\ncontrols = 2.5\n", ("controls", "2.5", "whole number")),
    ("[pocket]\nspending = 'fast'\n", ("spending", "fast", "obrien-fleming")),
    ("[pocket.prior]\nsigma_d = -1.0\n", ("prior.sigma_d", "-1.0", "valid")),
    ("[pocket.prior]\nsigma_d = 0.03\n", ("sigma_d", "0.03", "sigma_run", "valid")),
    ("[pocket]\nprior = 3\n", ("prior", "3", "valid", "sigma_d")),
    ("[pocket]\ntrack = 'x'\n", ("track", "x", "remove")),
    ("alpha = 0.1\n", ("alpha", "0.1", "section")),
    ("[pocket\n", ("TOML",)),
])
def test_errors_name_file_field_value_and_what_is_valid(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(PolicyError) as e:
        load_policy("pocket", path)
    assert str(path) in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="restore"):
        load_policy("pocket", tmp_path / "none.toml")


@pytest.mark.parametrize("cls", [Policy, Prior])
def test_every_field_is_documented_and_its_default_is_valid(cls: type[Policy] | type[Prior]) -> None:
    for f in dataclasses.fields(cls):
        assert len(f.metadata["doc"]) > 10, f.name
        if "test" in f.metadata:
            assert f.metadata["test"](f.default), f.name


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Policy) if isinstance(f.default, float)])
def test_the_hash_sees_every_number(field: str) -> None:
    policy = Policy()
    assert dataclasses.replace(policy, **{field: getattr(policy, field) / 2 + 0.01}).hash != policy.hash


def test_the_prior_implies_the_correlation() -> None:
    """a = u + v, b = u + w, var u = 3, var v = var w = 1: rho = 3/4, var(a-b) = 2."""
    assert Prior(sigma_d=2**0.5, sigma_run=2.0, source="x").correlation == pytest.approx(0.75)


def test_the_command_line_does_not_load_numpy_or_scipy() -> None:
    code = ("import sys, harness.gate, harness.gate.explain, harness.gate.verdict; harness.gate.load_policy('pocket'); "
            "print([m for m in ('numpy', 'scipy', 'torch') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
