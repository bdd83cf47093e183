"""What a knob is, and what can be asked of a set of them. Torch-free.

A knob is declared once, in a module of this package, with :class:`Knob`. Everything else that
speaks of it (validation, help, prompts, search space, ``docs/knobs.md``) is rendered from there.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

KnobValue = bool | int | float | str
Phase = Literal["init", "data", "train", "averaging", "export", "eval"]
PHASES: tuple[Phase, ...] = ("init", "data", "train", "averaging", "export", "eval")


class KnobError(ValueError):
    """A knob name or value that is not valid; the message says what is."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One declared knob.

    ``kind``: the Python type. ``low``/``high``: valid range, inclusive. ``choices``: valid literals.
    ``ladder``: values worth trying, in order (the search space). ``requires``: ``(knob, predicate
    as text)`` pairs; the knob is *inactive* unless every named knob currently satisfies its test,
    and an inactive knob takes no part in the configuration hash. ``phase``: when it first acts.
    ``role``: "shape" fixes what is compared (tracks own it), "model" is needed to rebuild the model
    from an artifact, "train" acts in training only, "export"/"eval" after it.
    """

    name: str
    kind: type
    default: KnobValue
    doc: str
    role: Literal["shape", "model", "train", "export", "eval"]
    phase: Phase
    low: float | None = None
    high: float | None = None
    choices: tuple[KnobValue, ...] = ()
    ladder: tuple[KnobValue, ...] = ()
    unit: str = ""
    source: str = ""
    cost: str = "none"
    requires: tuple[tuple[str, Literal["==", "!=", ">"], KnobValue], ...] = ()

    def parse(self, value: Any) -> KnobValue:
        """Return ``value`` (maybe text from a command line) as this knob's type, or raise KnobError."""
        parsed = self._coerce(value)
        if isinstance(parsed, float) and not math.isfinite(parsed):
            raise self._error(value, "a finite number")
        if self.choices and parsed not in self.choices:
            raise self._error(value, "one of " + ", ".join(map(str, self.choices)))
        if self.low is not None and not isinstance(parsed, (bool, str)) and parsed < self.low:
            raise self._error(value, self.valid)
        if self.high is not None and not isinstance(parsed, (bool, str)) and parsed > self.high:
            raise self._error(value, self.valid)
        return parsed

    def _coerce(self, value: Any) -> KnobValue:
        if self.kind is bool:
            if isinstance(value, bool):
                return value
            if str(value).strip().lower() in ("1", "true", "on", "yes"):
                return True
            if str(value).strip().lower() in ("0", "false", "off", "no"):
                return False
            raise self._error(value, "true or false")
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise self._error(value, self.valid)
        if self.kind is str:
            return str(value)
        try:
            number = float(value)
            if self.kind is float:
                return number
            if not math.isfinite(number) or number != int(number):
                raise ValueError
            return int(value) if isinstance(value, (int, str)) and "." not in str(value) else int(number)
        except (ValueError, OverflowError):
            raise self._error(value, self.valid) from None

    @property
    def valid(self) -> str:
        """The valid values, in words."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.kind is bool:
            return "true or false"
        word = {int: "a whole number", float: "a number", str: "text"}[self.kind]
        if self.low is None and self.high is None:
            return word
        if self.high is None:
            return f"{word} >= {self.low:g}"
        if self.low is None:
            return f"{word} <= {self.high:g}"
        return f"{word} from {self.low:g} to {self.high:g}"

    def _error(self, value: Any, want: str) -> KnobError:
        return KnobError(f"knob {self.name} = {value!r}: expected {want} (see `autoresearch knobs {self.name}`)")


class Registry:
    """Every declared knob, by name. Built once in ``trainer.knobs``."""

    def __init__(self, knobs: Iterable[Knob]) -> None:
        self._knobs: dict[str, Knob] = {}
        for knob in knobs:
            if knob.name in self._knobs:
                raise ValueError(f"knob {knob.name} is declared twice")
            if knob.parse(knob.default) != knob.default:
                raise ValueError(f"knob {knob.name}: its default {knob.default!r} is not valid")
            for step in knob.ladder:
                knob.parse(step)
            self._knobs[knob.name] = knob
        for knob in self._knobs.values():
            for other, _, _ in knob.requires:
                if other not in self._knobs:
                    raise ValueError(f"knob {knob.name} requires unknown knob {other}")

    def __iter__(self) -> Any:
        return iter(self._knobs.values())

    def __len__(self) -> int:
        return len(self._knobs)

    def __contains__(self, name: str) -> bool:
        return name in self._knobs

    def get(self, name: str) -> Knob:
        """The knob called ``name`` (the challenge's upper-case form is accepted), or KnobError."""
        knob = self._knobs.get(name) or (self._knobs.get(name.lower()) if name.isupper() else None)
        if knob is None:
            near = difflib.get_close_matches(name.lower(), self._knobs, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise KnobError(f"unknown knob {name!r}{hint} (`autoresearch knobs` lists them all)")
        return knob

    def defaults(self) -> dict[str, KnobValue]:
        """Every knob at its default."""
        return {k.name: k.default for k in self}

    def parse(self, values: Mapping[str, Any]) -> dict[str, KnobValue]:
        """Check names and values of a partial setting."""
        out: dict[str, KnobValue] = {}
        for name, value in values.items():
            knob = self.get(name)
            if knob.name in out:
                raise KnobError(f"knob {knob.name} is set twice")
            out[knob.name] = knob.parse(value)
        return out

    def resolve(self, *layers: Mapping[str, Any]) -> dict[str, KnobValue]:
        """Defaults overlaid by each layer in turn (track, recipe, --set): every knob has a value."""
        resolved = self.defaults()
        for layer in layers:
            resolved.update(self.parse(layer))
        for check in CHECKS:
            check(resolved)
        return resolved

    def is_active(self, name: str, resolved: Mapping[str, KnobValue]) -> bool:
        """Whether the knob can have any effect in ``resolved``, by its ``requires``."""
        tests: dict[str, Callable[[Any, Any], bool]] = {
            "==": lambda a, b: a == b, "!=": lambda a, b: a != b, ">": lambda a, b: a > b,
        }
        return all(
            tests[op](resolved[other], want) and self.is_active(other, resolved)
            for other, op, want in self._knobs[name].requires
        )

    def active(self, resolved: Mapping[str, KnobValue]) -> dict[str, KnobValue]:
        """The non-default knobs that can have an effect: what a configuration *is*."""
        return {
            k.name: resolved[k.name] for k in self
            if resolved[k.name] != k.default and self.is_active(k.name, resolved)
        }

    def config_hash(self, resolved: Mapping[str, KnobValue]) -> str:
        """SHA-256 over :meth:`active`: a knob added later leaves old hashes alone."""
        text = json.dumps(self.active(resolved), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


CHECKS: list[Callable[[Mapping[str, Any]], None]] = []
"""Rules across knobs: each takes the resolved settings and raises KnobError."""


def check(rule: Callable[[Mapping[str, Any]], None]) -> Callable[[Mapping[str, Any]], None]:
    """Register a rule across knobs (decorator)."""
    CHECKS.append(rule)
    return rule
