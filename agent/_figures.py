"""Citations in pages: every id exists, and every figure beside a citation is the record's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal

from agent._kbtypes import Evidence, Page, Problem

_ID = r"[a-z][a-z0-9]*\.[a-z0-9_]+"
CITATION = re.compile(rf"\[({_ID}(?:,\s*{_ID})*)\](?!\()")
FIGURE = re.compile(r"(?<![\w.,])[-+\u2212]?(?:\d\.\d{3,}|\d{1,3}(?:,\d{3})+)(?![\w%]|[.,]\d)")
FENCED = re.compile(r"^```.*?^```[ \t]*$", re.MULTILINE | re.DOTALL)


def cited_ids(text: str) -> list[str]:
    """Evidence ids cited in ``text``, in order: ``[seed3.a]`` or ``[seed3.a, seed3.b]``."""
    return [part.strip() for match in CITATION.finditer(text) for part in match.group(1).split(",")]


def passages(text: str) -> Iterator[tuple[int, str]]:
    """(first line number, text) of each table row, list item or paragraph, fenced blocks left out."""
    bare = FENCED.sub(lambda m: "\n" * m.group().count("\n"), text)
    start, held = 1, []
    for number, row in enumerate(bare.splitlines(), start=1):
        opens = row.lstrip().startswith(("|", "- ", "* ", "#")) or re.match(r"\s*\d+\. ", row)
        if held and (opens or not row.strip()):
            yield start, "\n".join(held)
            held = []
        if row.strip():
            start = start if held else number
            held.append(row)
    if held:
        yield start, "\n".join(held)


def _known(record: Evidence) -> Iterator[Decimal]:
    yield from (Decimal(repr(v)) for v in record.metrics.values())
    if record.delta_bpb is not None:
        yield Decimal(repr(record.delta_bpb))
    for value in record.change.values():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield Decimal(repr(value))


def _matches(figure: str, known: set[Decimal]) -> bool:
    """Whether ``figure`` is one of ``known``, exactly or rounded as shown; the sign is optional."""
    shown = Decimal(figure.replace(",", "").replace("\u2212", "-").lstrip("+"))
    places = Decimal(1).scaleb(shown.as_tuple().exponent)  # type: ignore[arg-type]
    signed = figure[0] in "+-\u2212"
    for value in known:
        for form in (value,) if signed else (value, -value):
            if form.quantize(places) == shown:
                return True
    return False


def check_page(page: Page, evidence: Mapping[str, Evidence]) -> list[Problem]:
    """Problems of one page's prose: unknown citations, uncited figures, figures that no record holds."""
    problems: list[Problem] = []
    for number, text in passages(page.text):
        where = f"line {number}"
        ids = cited_ids(text)
        for missing in (i for i in ids if i not in evidence):
            problems.append(Problem(page.name, where, missing, "is cited but is not in evidence.jsonl"))
        known = {d for i in ids if i in evidence for d in _known(evidence[i])}
        for figure in FIGURE.findall(CITATION.sub("", text)):
            if figure.replace(",", "") == "16000000":
                continue  # the challenge's cap is a rule, not a measurement
            if not ids:
                problems.append(Problem(page.name, where, figure, "is a figure without a citation"))
            elif not _matches(figure, known):
                message = f"is not in the records cited ({', '.join(ids)})"
                problems.append(Problem(page.name, where, figure, message))
    return problems
