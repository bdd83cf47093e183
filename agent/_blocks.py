"""Reads toml blocks and evidence lines into typed records; every defect becomes a Problem."""

from __future__ import annotations

import json
import math
import re
import string
import tomllib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from agent._kbtypes import (
    MOVE_KINDS,
    SPACINGS,
    STATUSES,
    TEMPLATE_FIELDS,
    VERDICTS,
    Evidence,
    Line,
    Move,
    Problem,
    Regime,
)
from trainer.knobs import REGISTRY, KnobError

FENCE = re.compile(r"^```toml[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
ID = re.compile(r"[a-z0-9][a-z0-9_]*(\.[a-z0-9_]+)?")
WORDS: dict[type, str] = {
    str: "text", float: "a finite number", list: "a list", dict: "a table", bool: "true or false",
}
Report = Callable[[str, str], None]  # (field, message)
PAYLOADS = {"knobs": dict, "ladder": str, "scale": dict, "reshape": list, "combine": bool, "simplify": bool}
MOVE_FIELDS = {*PAYLOADS, "toward", "spacing", "bpb", "bytes_frac", "time_frac", "why", "evidence"}
LINE_FIELDS = {"id", "title", "status", "priority", "hypothesis", "regime", "evidence", "moves", "needs"}
EVIDENCE_FIELDS = {"id", "base", "change", "regime", "metrics", "delta_bpb", "verdict", "source", "note"}


def toml_blocks(name: str, text: str, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (label, table) of every fenced toml block of a page; label is "line N" of its first line."""
    opened = len(re.findall(r"^```toml", text, re.MULTILINE))
    matches = list(FENCE.finditer(text))
    if opened != len(matches):
        message = f"{opened} toml fences are opened, {len(matches)} are closed by ```"
        problems.append(Problem(name, "", "", message))
    for match in matches:
        label = f"line {text.count(chr(10), 0, match.start(1)) + 1}"
        try:
            yield label, tomllib.loads(match.group(1))
        except tomllib.TOMLDecodeError as e:
            problems.append(Problem(name, f"block at {label}", "", f"not valid TOML: {e}"))


def _take(table: Mapping[str, Any], key: str, kind: type, report: Report, default: Any = None) -> Any:
    """``table[key]`` if it has the type, else ``default`` (None: the key is required)."""
    if key not in table:
        if default is None:
            report(key, "is missing")
            return kind()
        return default
    value = table[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is float and not math.isfinite(value)):
        report(key, f"= {table[key]!r}: expected {WORDS[kind]}")
        return kind() if default is None else default
    return value


def _texts(table: Mapping[str, Any], key: str, report: Report) -> tuple[str, ...]:
    items = _take(table, key, list, report, [])
    for item in items:
        if not isinstance(item, str):
            report(key, f"holds {item!r}: expected text")
    return tuple(i for i in items if isinstance(i, str))


def _unknown(table: Mapping[str, Any], known: set[str], report: Report) -> None:
    for key in sorted(set(table) - known):
        report(key, f"is not a field; known: {', '.join(sorted(known))}")


def parse_line(page: str, label: str, table: Mapping[str, Any], problems: list[Problem]) -> Line:
    """One research line from its block. Defects go to ``problems``."""
    name = str(table.get("id") or f"block at {label}")

    def report(field: str, message: str) -> None:
        problems.append(Problem(page, name, field, message))

    _unknown(table, LINE_FIELDS, report)
    line_id = _take(table, "id", str, report)
    if line_id and not ID.fullmatch(line_id):
        report("id", f"= {line_id!r}: use lower-case letters, digits and _")
    status = _take(table, "status", str, report)
    if status not in STATUSES:
        report("status", f"= {status!r}: expected one of {', '.join(STATUSES)}")
    priority = _take(table, "priority", float, report)
    if not 0 <= priority <= 1:
        report("priority", f"= {priority:g}: expected a number from 0 to 1")
    hypothesis = _take(table, "hypothesis", str, report)
    _check_template(hypothesis, report)
    moves = []
    for i, entry in enumerate(_take(table, "moves", list, report, [])):
        if not isinstance(entry, dict):
            report(f"moves[{i}]", f"= {entry!r}: expected a table")
            continue
        moves.append(_parse_move(i, entry, status in ("active", "parked", "integrated"), report))
    needs = _texts(table, "needs", report)
    if status == "active" and not moves:
        report("moves", "an active line needs at least one move")
    if status == "deferred" and (moves or not needs):
        report("needs", "a deferred line lists what it needs, and has no moves yet")
    for need in needs:
        if need in REGISTRY:
            report("needs", f"names {need!r}, a knob that exists by now: make the line active or parked")
    return Line(
        id=line_id, title=_take(table, "title", str, report), status=status, priority=priority,
        hypothesis=hypothesis, regime=_take(table, "regime", str, report),
        evidence=_texts(table, "evidence", report), moves=tuple(moves), needs=needs, page=page,
    )


def _check_template(text: str, report: Report) -> None:
    try:
        fields = {f for _, f, _, _ in string.Formatter().parse(text) if f is not None}
    except ValueError as e:
        report("hypothesis", f"is not a valid template: {e}")
        return
    for field in sorted(fields - TEMPLATE_FIELDS):
        report("hypothesis", f"uses {{{field}}}; known: {', '.join(sorted(TEMPLATE_FIELDS))}")


def _parse_move(index: int, table: Mapping[str, Any], check_knobs: bool, outer: Report) -> Move:
    def report(field: str, message: str) -> None:
        outer(f"moves[{index}].{field}", message)

    _unknown(table, MOVE_FIELDS, report)
    kinds = [k for k in MOVE_KINDS if k in table]
    if len(kinds) != 1:
        report("kind", f"sets {', '.join(kinds) or 'none'} of {', '.join(MOVE_KINDS)}: expected exactly one")
    kind = kinds[0] if kinds else "combine"
    payload = _take(table, kind, PAYLOADS[kind], report)
    toward = _take(table, "toward", str, report, "")
    if toward not in ("", "up", "down"):
        report("toward", f"= {toward!r}: expected up or down")
    spacing = _take(table, "spacing", str, report, "linear")
    if spacing not in SPACINGS:
        report("spacing", f"= {spacing!r}: expected one of {', '.join(SPACINGS)}")
    move = Move(
        kind=kind, knobs=payload if kind == "knobs" else {}, ladder=payload if kind == "ladder" else "",
        toward=toward, spacing=spacing, factors=payload if kind == "scale" else {},
        vary=tuple(map(str, payload)) if kind == "reshape" else (),
        bpb=_take(table, "bpb", float, report), bytes_frac=_take(table, "bytes_frac", float, report, 0.0),
        time_frac=_take(table, "time_frac", float, report, 0.0), why=_take(table, "why", str, report),
        evidence=_texts(table, "evidence", report),
    )
    if check_knobs:
        _check_knobs(move, report)
    return move


def _check_knobs(move: Move, report: Report) -> None:
    """Knobs exist, values are in range, ladders have rungs, factors are positive numbers."""
    for name in move.names:
        if name not in REGISTRY:
            try:
                REGISTRY.get(name)
                report(move.kind, f"names {name!r}: write it in lower case")
            except KnobError as e:
                report(move.kind, str(e))
    for name, value in move.knobs.items():
        if name in REGISTRY:
            try:
                REGISTRY.get(name).parse(value)
            except KnobError as e:
                report("knobs", str(e))
    if move.ladder in REGISTRY and not REGISTRY.get(move.ladder).ladder:
        report("ladder", f"knob {move.ladder} declares no ladder of values: use knobs or scale")
    for name, factor in move.factors.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor <= 0:
            report("scale", f"{name} = {factor!r}: expected a factor above 0")
        elif name in REGISTRY and REGISTRY.get(name).kind is not float:
            report("scale", f"{name} is not a real number: scale works on real-valued knobs")
    allowed = ("num_layers", "model_dim", "mlp_mult")
    for name in move.vary:
        if name not in allowed:
            report("reshape", f"names {name!r}: expected some of {', '.join(allowed)}")


def parse_regimes(
    page: str, label: str, table: Mapping[str, Any], problems: list[Problem]
) -> dict[str, Regime]:
    """The ``[regimes]`` table: id -> {says, weight}."""
    out: dict[str, Regime] = {}
    for name, entry in table["regimes"].items():
        def report(field: str, message: str, name: str = name) -> None:
            where = f"regimes.{name}.{field}".rstrip(".")
            problems.append(Problem(page, f"block at {label}", where, message))

        if not isinstance(entry, dict):
            report("", f"= {entry!r}: expected a table with says and weight")
            continue
        weight = _take(entry, "weight", float, report)
        if not 0 <= weight <= 1:
            report("weight", f"= {weight:g}: expected a number from 0 to 1")
        out[name] = Regime(id=name, says=_take(entry, "says", str, report), weight=weight)
    return out


def parse_evidence(name: str, text: str, problems: list[Problem]) -> dict[str, Evidence]:
    """evidence.jsonl: one JSON object a line."""
    out: dict[str, Evidence] = {}
    for number, row in enumerate(text.splitlines(), start=1):
        try:
            table = json.loads(row)
        except ValueError as e:
            problems.append(Problem(name, f"line {number}", "", f"not valid JSON: {e}"))
            continue
        if not isinstance(table, dict):
            problems.append(Problem(name, f"line {number}", "", "expected a JSON object"))
            continue
        block = str(table.get("id") or f"line {number}")

        def report(field: str, message: str, block: str = block) -> None:
            problems.append(Problem(name, block, field, message))

        _unknown(table, EVIDENCE_FIELDS, report)
        record = _evidence(table, report)
        if record.id in out:
            report("id", f"appears twice (again in line {number})")
        out[record.id] = record
    return out


def _evidence(table: Mapping[str, Any], report: Report) -> Evidence:
    metrics = _take(table, "metrics", dict, report)
    numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    for key in sorted(set(metrics) - set(numbers)):
        report(f"metrics.{key}", f"= {metrics[key]!r}: expected a finite number")
    verdict = _take(table, "verdict", str, report)
    if verdict not in VERDICTS:
        report("verdict", f"= {verdict!r}: expected one of {', '.join(VERDICTS)}")
    record_id = _take(table, "id", str, report)
    if not re.fullmatch(r"[a-z0-9]+\.[a-z0-9_]+", record_id):
        report("id", f"= {record_id!r}: expected <source>.<name> in lower case")
    has_delta = "delta_bpb" in table and table["delta_bpb"] is not None
    return Evidence(
        id=record_id, base=_take(table, "base", str, report, ""), change=_take(table, "change", dict, report),
        regime=_take(table, "regime", str, report), metrics=numbers,
        delta_bpb=_take(table, "delta_bpb", float, report) if has_delta else None,
        verdict=verdict, source=_take(table, "source", str, report),
        note=_take(table, "note", str, report, ""),
    )
