"""The knowledge base: pages for people, with toml blocks and evidence that a program can read.

``load`` gives typed records and refuses a base whose blocks are broken. ``lint`` lists every defect,
citations and figures in the prose included. Torch-free.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from agent._blocks import parse_evidence, parse_line, parse_regimes, toml_blocks
from agent._figures import check_page
from agent._kbtypes import Evidence, Knowledge, KnowledgeError, Line, Move, Page, Problem, Regime

LINES_PAGE = "research_tracks.md"
REGIMES_PAGE = "README.md"
EVIDENCE_FILE = "evidence.jsonl"

__all__ = [
    "Evidence", "Knowledge", "KnowledgeError", "Line", "Move", "Page", "Problem", "Regime", "lint", "load",
]


def load(kb_dir: Path) -> Knowledge:
    """Read the knowledge base in ``kb_dir``. Raises KnowledgeError naming file, block and field."""
    knowledge, problems = _read(kb_dir)
    if problems:
        more = f" (and {len(problems) - 1} more: run `autoresearch kb lint`)" if len(problems) > 1 else ""
        raise KnowledgeError(f"{kb_dir / problems[0].file}: {_tail(problems[0])}{more}")
    return knowledge


def lint(kb_dir: Path) -> list[Problem]:
    """Every defect of the knowledge base, blocks first, then citations and figures; empty when clean."""
    knowledge, problems = _read(kb_dir)
    for page in knowledge.pages.values():
        problems += check_page(page, knowledge.evidence)
    return problems


def _tail(problem: Problem) -> str:
    return str(problem).removeprefix(problem.file + ": ")


def _read(kb_dir: Path) -> tuple[Knowledge, list[Problem]]:
    problems: list[Problem] = []
    pages = {p.name: _page(p, problems) for p in sorted(kb_dir.glob("*.md"))}
    for name in (LINES_PAGE, REGIMES_PAGE):
        if name not in pages:
            message = f"is missing in {kb_dir}: not a knowledge base, or an incomplete one"
            problems.append(Problem(name, "", "", message))
    lines: dict[str, Line] = {}
    regimes: dict[str, Regime] = {}
    for page in pages.values():
        for label, table in toml_blocks(page.name, page.text, problems):
            if page.name == REGIMES_PAGE and isinstance(table.get("regimes"), dict):
                regimes.update(parse_regimes(page.name, label, table, problems))
                continue
            line = parse_line(page.name, label, table, problems)
            if line.id in lines:
                message = f"appears twice (again in the block at {label})"
                problems.append(Problem(page.name, line.id, "id", message))
            lines[line.id] = line
    evidence = _evidence(kb_dir / EVIDENCE_FILE, problems)
    _check_references(lines, evidence, regimes, problems)
    return Knowledge(pages, lines, evidence, regimes), problems


def _page(path: Path, problems: list[Problem]) -> Page:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        problems.append(Problem(path.name, "", "", f"is not UTF-8: {e}"))
        text = data.decode("utf-8", errors="replace")
    return Page(path.name, text, hashlib.sha256(data).hexdigest())


def _evidence(path: Path, problems: list[Problem]) -> dict[str, Evidence]:
    if not path.is_file():
        problems.append(Problem(path.name, "", "", f"is missing in {path.parent}"))
        return {}
    return parse_evidence(path.name, path.read_text(encoding="utf-8", errors="replace"), problems)


def _check_references(
    lines: dict[str, Line], evidence: dict[str, Evidence], regimes: dict[str, Regime], problems: list[Problem]
) -> None:
    """Ids that blocks and records point at exist."""
    for line in lines.values():
        cited = [("evidence", e) for e in line.evidence]
        cited += [(f"moves[{i}].evidence", e) for i, m in enumerate(line.moves) for e in m.evidence]
        for field, name in cited:
            if name not in evidence:
                message = f"cites {name!r}, which is not in {EVIDENCE_FILE}"
                problems.append(Problem(line.page, line.id, field, message))
    for record in evidence.values():
        if record.base and record.base not in evidence:
            problems.append(Problem(EVIDENCE_FILE, record.id, "base", f"= {record.base!r} is not a record"))
        if record.regime not in regimes:
            message = f"= {record.regime!r} is not declared in {REGIMES_PAGE}"
            problems.append(Problem(EVIDENCE_FILE, record.id, "regime", message))
