"""Techniques: one file each, found by looking into this folder.

A file ``NAME.py`` declares ``TECHNIQUE = Technique(name="NAME", ...)``; the knob ``NAME`` switches it on.
Files that start with an underscore are helpers. Order of application is the order of names.
"""

from __future__ import annotations

import importlib
import pkgutil

from trainer.knobs import REGISTRY
from trainer.model.sites import Technique


def _discover() -> tuple[Technique, ...]:
    found: list[Technique] = []
    for name in sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")):
        technique = getattr(importlib.import_module(f"{__name__}.{name}"), "TECHNIQUE", None)
        if not isinstance(technique, Technique) or technique.name != name:
            raise TypeError(f"trainer/techniques/{name}.py: must define TECHNIQUE = Technique(name={name!r}, ...)")
        if name not in REGISTRY:
            raise TypeError(f"trainer/techniques/{name}.py: no knob {name!r} is declared in trainer/knobs")
        found.append(technique)
    return tuple(found)


TECHNIQUES = _discover()
"""Every technique, sorted by name."""
