"""Dependencies point one way, and only the trainer may need torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("agent", "harness", "ledger", "trainer")
AGENT_MAY = ("trainer.knobs", "trainer.contract", "ledger")
TORCH_OK = ("torch", "numpy", "sentencepiece", "zstandard")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, inside functions too; ``from a import b`` gives a and a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append((node.lineno, str(node.module)))
    return found


def modules(room: str) -> list[Path]:
    """Every module of a room."""
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, room
    return files


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes or below it."""
    return any(name == p or name.startswith(p + ".") for p in prefixes)


@pytest.mark.parametrize("room", ["trainer", "ledger"])
def test_lower_rooms_import_no_sibling(room: str) -> None:
    others = tuple(r for r in ROOMS if r != room)
    bad = [f"{p}:{n} imports {m}" for p in modules(room) for n, m in imports(p) if under(m, others)]
    assert bad == []


def test_agent_reads_declarations_only() -> None:
    bad = [f"{p}:{n} imports {m}" for p in modules("agent") for n, m in imports(p)
           if under(m, ("harness",)) or (under(m, ("trainer", "ledger")) and not under(m, AGENT_MAY))]
    assert bad == []


def test_only_the_trainer_imports_torch() -> None:
    bad = [f"{p}:{n}" for room in ("agent", "harness", "ledger") for p in modules(room)
           for n, m in imports(p) if under(m, ("torch",))]
    assert bad == []


def test_the_trainer_needs_few_packages() -> None:
    std = sys.stdlib_module_names
    bad = [f"{p}:{n} imports {m}" for p in modules("trainer") for n, m in imports(p)
           if m.partition(".")[0] not in std and not under(m, ("trainer", *TORCH_OK))]
    assert bad == []


def test_shipped_code_imports_no_test_tools() -> None:
    bad = [f"{p}:{n} imports {m}" for room in ROOMS for p in modules(room) for n, m in imports(p)
           if under(m, ("pytest", "hypothesis", "tests"))]
    assert bad == []


def test_packages_are_listed() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {str(p.parent.relative_to(ROOT)).replace("/", ".") for r in ROOMS for p in (ROOT / r).rglob("__init__.py")}
    assert listed == there


@pytest.mark.parametrize("module", ["harness.cli", "harness.search", "harness.data", "harness.stages"])
def test_the_command_line_never_loads_torch(module: str) -> None:
    code = f"import {module}, sys; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_help_imports_little() -> None:
    heavy = ("torch", "openai", "duckdb", "scipy", "git", "numpy", "sentencepiece", "matplotlib")
    code = f"import harness.cli, sys; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
