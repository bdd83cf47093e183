"""Tracks, recipes and seeds: precedence, locks, and what makes two numbers comparable."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UserError
from harness.recipe import parse_recipe, render_recipe
from harness.tracks import fingerprint, get_track, load_tracks, run_seed
from trainer.knobs import REGISTRY

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
    track = get_track(name)
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


def test_the_fingerprint_moves_with_what_changes_numbers_and_only_then() -> None:
    base = fingerprint(POCKET, "d", "e")[0]
    assert fingerprint(POCKET, "d", "e")[0] == base
    assert fingerprint(POCKET, "D", "e")[0] != base
    assert fingerprint(POCKET, "d", "E")[0] != base
    for field, value in (("confirm_steps", 121), ("val_tokens", 1), ("threads", 2), ("cap_bytes", 1)):
        assert fingerprint(dataclasses.replace(POCKET, **{field: value}), "d", "e")[0] != base, field
    for field, value in (("run_timeout_s", 1.0), ("workers", 7), ("title", "x")):
        assert fingerprint(dataclasses.replace(POCKET, **{field: value}), "d", "e")[0] == base, field


@given(st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 50))
def test_seeds_depend_on_everything_and_fit_63_bits(search: int, generation: int, k: int) -> None:
    seed = run_seed(search, "confirm", generation, k)
    assert 0 <= seed < 2**63
    others = {run_seed(search + 1, "confirm", generation, k), run_seed(search, "breadth", generation, k),
              run_seed(search, "confirm", generation + 1, k), run_seed(search, "confirm", generation, k + 1)}
    assert len(others) == 4 and seed not in others
