"""Documents rendered from declarations: ``python -m harness.generate [--check]``.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; the words around it are
written by people and left alone. ``--check`` says what is out of date and exits 1.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path

from harness.gate.policy import POLICY_FILE, Policy, Prior, load_policy
from harness.tracks import Track, declared_track, load_tracks
from harness.workspace import CODE_ROOT
from trainer import contract
from trainer.knobs import REGISTRY

PART = re.compile(r"(<!-- generated: (?P<name>[a-z0-9:._-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
DOCUMENTS = ("docs/contracts.md", "docs/knobs.md")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)]) + "\n"


def class_fields(path: Path, name: str) -> str:
    """The fields of a class: name, type and default from its syntax, meaning from the comment on its line."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    rows = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            comment = lines[(item.end_lineno or item.lineno) - 1].partition("  # ")[2]
            default = ast.unparse(item.value) if item.value else ""
            rows.append([f"`{item.target.id}`", f"`{ast.unparse(item.annotation)}`", f"`{default}`" if default else "",
                         comment])
    doc = ast.get_docstring(node) or ""
    return f"{doc}\n\n{table(['field', 'type', 'default', 'meaning'], rows)}"


def events() -> str:
    """The trainer's event stream."""
    return table(["kind", "fields"], [[f"`{k}`", v] for k, v in contract.EVENT_KINDS.items()])


def failures() -> str:
    """Kinds of failure that a process may report."""
    return "`" + "`, `".join(typing.get_args(contract.FailureKind)) + "`\n"


def records() -> str:
    """Every ledger event with the fields of its body."""
    from ledger.records import BODIES

    parts = []
    for event, body in BODIES.items():
        parts.append(f"#### `{event}`\n\n{class_fields(Path(inspect.getfile(body)), body.__name__)}")
    return "\n".join(parts)


def policy() -> str:
    """The gate's policy fields: meaning, valid values, and each track's value."""
    names = [n for n in load_tracks() if n != "nano"]
    loaded = {"default": load_policy("default", POLICY_FILE)} | {
        n: load_policy(declared_track(n).policy_track, POLICY_FILE) for n in names}
    rows = []
    for cls, prefix in ((Policy, ""), (Prior, "prior.")):
        for f in dataclasses.fields(cls):
            if "doc" not in f.metadata or f.name in ("prior", "track"):
                continue
            values = [getattr(p.prior if prefix else p, f.name) for p in loaded.values()]
            if "valid" in f.metadata:
                rows.append([f"`{prefix}{f.name}`", *map(_short, values), f.metadata["doc"], f.metadata["valid"]])
    return table(["field", *loaded, "meaning", "valid"], rows)


def _short(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def tracks() -> str:
    """Every track's protocol."""
    fields = [f.name for f in dataclasses.fields(Track) if f.name not in ("name", "fixed", "start")]
    loaded = load_tracks()
    rows = [[f"`{name}`", *(str(getattr(t, name)) for t in loaded.values())] for name in fields]
    for part in ("fixed", "start"):
        rows.append([part, *(", ".join(f"{k}={v}" for k, v in getattr(t, part).items()) for t in loaded.values())])
    return table(["", *loaded], rows)


def knobs() -> str:
    """Every knob."""
    rows = [[f"`{k.name}`", f"`{k.default}`", k.valid, k.unit, k.doc, k.role, k.phase,
             ", ".join(map(str, k.ladder)), k.source] for k in REGISTRY]
    return table(["knob", "default", "valid", "unit", "meaning", "role", "phase", "worth trying", "evidence"], rows)


PARTS: dict[str, Callable[[], str]] = {
    "runspec": lambda: class_fields(CODE_ROOT / "trainer/contract.py", "RunSpec"),
    "runresult": lambda: class_fields(CODE_ROOT / "trainer/contract.py", "RunResult"),
    "scorespec": lambda: class_fields(CODE_ROOT / "trainer/contract.py", "ScoreSpec"),
    "scoreresult": lambda: class_fields(CODE_ROOT / "trainer/contract.py", "ScoreResult"),
    "proposal": lambda: class_fields(CODE_ROOT / "agent/contract.py", "Proposal"),
    "context": lambda: class_fields(CODE_ROOT / "agent/contract.py", "Context"),
    "events": events,
    "failures": failures,
    "records": records,
    "policy": policy,
    "tracks": tracks,
    "knobs": knobs,
}


def render(text: str) -> str:
    """Fill every generated part of a document. Raises KeyError on a part nobody renders."""
    return PART.sub(lambda m: f"{m[1]}{PARTS[m['name']]()}{m[3]}", text)


def main(argv: list[str]) -> int:
    """Write, or with ``--check`` compare."""
    stale = []
    for name in DOCUMENTS:
        path = CODE_ROOT / name
        text = path.read_text(encoding="utf-8")
        new = render(text)
        if new != text:
            stale.append(name)
            if "--check" not in argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in argv:
        print(f"out of date: {', '.join(stale)}; run `make generate`", file=sys.stderr)
        return 1
    print(f"generated: {', '.join(stale)}" if stale else "generated files are up to date")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
