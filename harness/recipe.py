"""Recipes: ``trainer/recipes/<track>.toml`` holds the incumbent's knobs, only where they differ from the track."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping

from harness.errors import UserError
from harness.tracks import Track
from harness.workspace import recipe_path
from trainer.knobs import REGISTRY, KnobError, KnobValue

HEADER = """# Incumbent of track {track}: the knobs that differ from the track's plain baseline.
# Written by kept commits (`autoresearch ledger lineage`); edit it by hand only between searches.
"""


def parse_recipe(text: str | None, track: Track) -> dict[str, KnobValue]:
    """Knobs of a recipe file ("" or None: the plain baseline). Raises UserError naming file and knob."""
    path = recipe_path(track.name)
    try:
        values = REGISTRY.parse(tomllib.loads(text or ""))
    except (tomllib.TOMLDecodeError, KnobError) as e:
        raise UserError(f"{path}: {e}") from None
    locked = sorted(set(values) & track.locked)
    if locked:
        raise UserError(f"{path}: {', '.join(locked)} fixed by track {track.name}; remove it from the recipe")
    return values


def render_recipe(values: Mapping[str, KnobValue], track: Track) -> str:
    """The recipe's text: sorted, and without what equals the plain baseline."""
    plain = track.resolve({})
    lines = [f"{k} = {_toml(v)}" for k, v in sorted(values.items()) if plain[k] != v]
    return HEADER.format(track=track.name) + "".join(f"{line}\n" for line in lines)


def _toml(value: KnobValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)
    return repr(value)
