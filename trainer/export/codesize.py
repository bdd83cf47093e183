"""Bytes of code: what a self-contained script of the active trainer would weigh. Torch-free.

Counted, in this order:

1. the modules of ``trainer`` reached by import statements (anywhere in a file, lazy ones too) from
   ``trainer.train`` and ``trainer.referee``, plus the file of every technique that the knobs switch on
   (techniques are found by folder listing, so no import statement names them);
2. less what such a script would not carry: knob declarations (it holds resolved values), the
   harness's contract and fingerprints, this counter, corpus and tokenizer builders (:data:`EXCLUDED`);
3. each module minified: parsed, doc strings, bare string statements and ``from __future__`` lines
   dropped, unparsed with one space of indentation (comments go by themselves);
4. modules in sorted order, each behind a one-line name marker, then the active knobs as JSON;
5. LZMA (preset 9 extreme, .lzma format) and base85, inside a fixed stub that unpacks and runs it.

The figure is deterministic for one Python minor version; it stands for the record submissions'
practice of packed scripts, and is meant to compare trees, not to be exact to the byte.
"""

from __future__ import annotations

import ast
import base64
import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.knobs import REGISTRY
from trainer.tree import package_root

ROOTS = ("trainer.train", "trainer.referee")
EXCLUDED = (
    "trainer.knobs", "trainer.contract", "trainer.tree", "trainer.export.codesize", "trainer.__main__",
    "trainer.data.build", "trainer.data.corpus", "trainer.data.splits", "trainer.data.tokenizer",
    "trainer.data.check", "trainer.data.fetch",
)
"""Modules, or packages with all they hold, that do not count."""

STUB = "import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({!r})))\n"
_TECHNIQUES = "trainer.techniques"


class CodeSizeError(ValueError):
    """A trainer tree that cannot be measured; the message names the file."""


def code_bytes(knobs: Mapping[str, Any] | None = None, root: Path | None = None) -> int:
    """Bytes of the packed script for the settings ``knobs`` (default: the plain baseline).

    ``root``: the trainer package to measure, by default the imported one. Raises CodeSizeError for a
    missing root module or a file that is not Python, KnobError for bad knobs.
    """
    return len(packed_script(knobs, root).encode())


def packed_script(knobs: Mapping[str, Any] | None = None, root: Path | None = None) -> str:
    """The text whose length :func:`code_bytes` is."""
    base = (root or package_root()).resolve()
    active = REGISTRY.active(REGISTRY.resolve(knobs or {}))
    parts = [f"#{name}\n{_minified(base, name)}\n" for name in active_modules(knobs, base)]
    parts.append("K=" + json.dumps(active, sort_keys=True, separators=(",", ":")) + "\n")
    packed = lzma.compress("".join(parts).encode(), format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    return STUB.format(base64.b85encode(packed).decode())


def active_modules(knobs: Mapping[str, Any] | None = None, root: Path | None = None) -> list[str]:
    """Dotted names of the modules that count, sorted."""
    base = (root or package_root()).resolve()
    active = REGISTRY.active(REGISTRY.resolve(knobs or {}))
    on = [f"{_TECHNIQUES}.{name}" for name in active if _file(base, f"{_TECHNIQUES}.{name}") is not None]
    todo, seen = [*ROOTS, *on], set[str]()
    while todo:
        name = todo.pop()
        if name in seen or _excluded(name):
            continue
        seen.add(name)
        todo.extend(_imports(base, name))
    return sorted(seen)


def _excluded(name: str) -> bool:
    return any(name == e or name.startswith(e + ".") for e in EXCLUDED)


def _file(base: Path, name: str) -> Path | None:
    """Source file of a dotted module name inside the package folder ``base``, or None."""
    stem = base.joinpath(*name.split(".")[1:])
    module = [] if stem == base else [stem.with_name(f"{stem.name}.py")]
    return next((p for p in (*module, stem / "__init__.py") if p.is_file()), None)


def _tree(base: Path, name: str) -> ast.Module:
    path = _file(base, name)
    if path is None:
        raise CodeSizeError(f"{base}: module {name} is missing; expected its source below this folder")
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as e:
        raise CodeSizeError(f"{path}: not valid Python: {e}") from e


def _imports(base: Path, name: str) -> set[str]:
    """Modules of the package that ``name`` imports, with the packages around them."""
    path = _file(base, name)
    package = name if path is not None and path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(_tree(base, name)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            start = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            targets = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "trainer":
                pieces = target.split(".")
                found.update(".".join(pieces[:i]) for i in range(1, len(pieces) + 1))
    return {n for n in found if _file(base, n) is not None}


class _Strip(ast.NodeTransformer):
    """Drops doc strings and other bare constants, and ``from __future__`` imports."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if node.module == "__future__" else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list) and not body and not isinstance(node, ast.Module):
            body.append(ast.Pass())
        return node


def _minified(base: Path, name: str) -> str:
    lines = ast.unparse(ast.fix_missing_locations(_Strip().visit(_tree(base, name)))).splitlines()
    return "\n".join(_narrow(line) for line in lines if line.strip())


def _narrow(line: str) -> str:
    """Four spaces of indentation become one."""
    text = line.lstrip(" ")
    return " " * ((len(line) - len(text)) // 4) + text
