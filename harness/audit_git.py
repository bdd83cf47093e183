"""A ledger held against git: its copy under the ref, the kept commits and their trailers, the parents' recipes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from harness.errors import InfraError, UserError
from harness.gitrepo import TRAILER_HEAD, TRAILER_REVERTS, TRAILER_TRIAL, Repo
from harness.recipe import parse_recipe
from harness.tracks import Track, declared_track, fingerprint
from harness.transaction import PIN
from harness.workspace import recipe_path
from ledger.decode import Record
from ledger.measured import TrialReverted
from ledger.mirror import BLOB_NAME, REF
from ledger.problems import Problem, problem_at
from ledger.records import CommitDone, CommitIntent, SearchStarted, TrialProposed
from ledger.verify import Check
from trainer.knobs import REGISTRY, KnobError, KnobValue

BRANCHES = "refs/heads/search/"
GIT_TIMEOUT_S = 120.0
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def commits(repo: Repo) -> Check:
    """A check over git: each committed keep exists and its trailers name the record that decided it."""

    def check(records: list[Record]) -> list[Problem]:
        by_seq = {r.seq: r for r in records}
        found = []
        for record in records:
            if isinstance(record.body, TrialReverted):
                found += _revert(repo, record, record.body)
            if not isinstance(record.body, CommitDone):
                continue
            sha = record.body.sha
            if repo.rev(sha) is None:
                found.append(problem_at(record, "commit", f"commit {sha[:12]} is not in this repository", "warning"))
                continue
            trailers = repo.trailers(sha)
            seq, _, h = trailers.get(TRAILER_HEAD, "").partition(":")
            witness = by_seq.get(int(seq)) if seq.isdigit() else None
            if trailers.get(TRAILER_TRIAL) != record.trial:
                found.append(problem_at(record, "commit", f"commit {sha[:12]} names trial "
                                        f"{trailers.get(TRAILER_TRIAL)!r}, the ledger {record.trial!r}"))
            elif witness is None or witness.h != h:
                found.append(problem_at(record, "commit", f"commit {sha[:12]} witnesses {TRAILER_HEAD} {seq}:{h[:12]}, "
                                        "which is not in this ledger: it was rewritten or cut"))
        return found

    return check


def _revert(repo: Repo, record: Record, body: TrialReverted) -> list[Problem]:
    """The commit that took a keep back exists, and says which."""
    if repo.rev(body.sha) is None:
        return [problem_at(record, "commit", f"revert {body.sha[:12]} is not in this repository", "warning")]
    named = repo.trailers(body.sha).get(TRAILER_REVERTS)
    return [] if named == record.trial else [problem_at(
        record, "commit", f"commit {body.sha[:12]} reverts trial {named!r}, the ledger says {record.trial!r}")]


def mirrored(repo: Repo, ledger_path: Path, ref: str = REF) -> Check:
    """The file equals or extends the copy under ``ref``; a file that ends earlier is cut, one that differs is forked.

    Without the ref there is nothing to compare.
    """
    tip = repo.rev(ref)
    if tip is None:
        return lambda records: []

    def check(records: list[Record]) -> list[Problem]:
        if repo.show(tip, BLOB_NAME) is None:
            return [Problem(rule="mirror", reason=f"{ref} holds no {BLOB_NAME}: something else wrote it")]
        return compare(ledger_path.read_bytes(), _git(repo, "cat-file", "blob", f"{tip}:{BLOB_NAME}"), ref)

    return check


def compare(data: bytes, stored: bytes, ref: str = REF) -> list[Problem]:
    """Whether the file's ``data`` holds all whole lines of ``stored``, from the first byte on."""
    if data.startswith(stored) or data + b"\n" == stored:  # a lost last newline is mended by the next append
        return []
    offset = 0
    for number, (here, there) in enumerate(zip_longest(data.splitlines(True), stored.splitlines(True)), 1):
        if here is None or (there is not None and here != there and there.startswith(here)):
            missing = stored.count(b"\n", offset)
            return [Problem(rule="mirror", line=number, offset=offset,
                            reason=f"{missing} record{'s' if missing != 1 else ''} that {ref} holds "
                                   f"{'are' if missing != 1 else 'is'} missing: `autoresearch search` restores them")]
        if here != there:
            return [Problem(rule="mirror", line=number, offset=offset,
                            reason=f"line {number}, at byte {offset}, is not what {ref} holds: the file was rewritten "
                                   f"or replaced. See the other history with `git show {ref}:{BLOB_NAME}`")]
        offset += len(here)
    return []


def configurations(repo: Repo) -> Check:
    """Proposed configurations, computed again from the parent's recipe in git and the proposed change.

    Only where today's trainer code and plain baseline are those of the proposal: else a difference may be honest.
    """
    head = repo.rev("HEAD")

    def check(records: list[Record]) -> list[Problem]:
        trees = {"": ""}  # commit -> code tree
        recipes = _recipes(repo, records)

        def tree(commit: str) -> str:
            if commit not in trees:
                trees[commit] = repo.code_tree(commit)
            return trees[commit]

        found: list[Problem] = []
        started: dict[str, SearchStarted] = {}
        parents: dict[tuple[str, str], dict[str, KnobValue] | None] = {}
        for record in records:
            body = record.body
            if isinstance(body, SearchStarted):
                started[record.search] = body
                if body.incumbent_commit in recipes and tree(body.incumbent_commit) != body.code_tree:
                    found.append(problem_at(record, "search", f"code_tree {body.code_tree[:12]} is not the trainer of "
                                            f"{body.incumbent_commit[:12]} ({tree(body.incumbent_commit)[:12]})"))
            elif isinstance(body, TrialProposed) and body.kind == "knobs" and body.config_hash:
                start = started.get(record.search)
                track = _track(start)
                if (start is None or track is None or body.parent_commit not in recipes
                        or start.code_tree != tree(head or "") or not _same_defaults(start, track)):
                    continue
                key = (track.name, body.parent_commit)
                if key not in parents:
                    parents[key] = _resolved(track, recipes[body.parent_commit].get(track.name))
                found += _same_config(record, body, parents[key])
        return found

    return check


def _same_config(record: Record, body: TrialProposed, parent: dict[str, KnobValue] | None) -> list[Problem]:
    if parent is None:
        return []
    found = []
    if REGISTRY.config_hash(parent) != body.parent_config:
        found.append(problem_at(record, "config", f"parent_config {body.parent_config[:12]} is not the recipe of "
                                f"{body.parent_commit[:12]} ({REGISTRY.config_hash(parent)[:12]})"))
    try:
        again = REGISTRY.config_hash(REGISTRY.resolve(parent, body.change))
    except KnobError as e:
        return [*found, problem_at(record, "config", f"the change cannot have been judged: {e}")]
    if again != body.config_hash:
        found.append(problem_at(record, "config", f"config_hash {body.config_hash[:12]} is not that of the recorded "
                                f"change on {body.parent_commit[:12]} ({again[:12]})"))
    return found


def _track(start: SearchStarted | None) -> Track | None:
    try:
        return declared_track(start.track) if start else None
    except UserError:
        return None


def _same_defaults(start: SearchStarted, track: Track) -> bool:
    """Whether knobs, their defaults and the track's plain baseline are those of the search's day."""
    today = _defaults(track.name)
    return start.fingerprint_parts.get("defaults", today) == today


@cache
def _defaults(track: str) -> str:
    return fingerprint(declared_track(track), "", "")[1]["defaults"]


def _resolved(track: Track, recipe: str | None) -> dict[str, KnobValue] | None:
    try:
        return track.resolve(parse_recipe(recipe, track))
    except UserError:  # a knob of that day which this version does not have, or locks
        return None


def _recipes(repo: Repo, records: Iterable[Record]) -> dict[str, dict[str, str]]:
    """Commit -> track -> text of its recipe, for every parent and incumbent that this repository has."""
    wanted: dict[str, set[str]] = {}
    track: dict[str, str] = {}
    for record in records:
        if isinstance(record.body, SearchStarted):
            known = _track(record.body)
            track[record.search] = known.name if known else ""
            wanted.setdefault(record.body.incumbent_commit, set())
        elif isinstance(record.body, TrialProposed) and track.get(record.search):
            wanted.setdefault(record.body.parent_commit, set()).add(track[record.search])
    names: list[tuple[str, str]] = []
    for commit, tracks in wanted.items():
        if _SHA.fullmatch(commit):
            names += [(commit, ""), *((commit, t) for t in sorted(tracks))]
    asked = "".join(f"{c}:{recipe_path(t)}\n" if t else f"{c}\n" for c, t in names)
    out = _git(repo, "cat-file", "--batch", stdin=asked.encode())
    found: dict[str, dict[str, str]] = {}
    at = 0
    for commit, name in names:
        end = out.index(b"\n", at)
        words = out[at:end].split(b" ")
        at = end + 1
        if len(words) != 3:  # "<name> missing"
            continue
        size = int(words[2])
        if name and commit in found:
            found[commit][name] = out[at:at + size].decode("utf-8", "replace")
        elif not name and words[1] == b"commit":
            found[commit] = {}
        at += size + 1
    return found


class _Witness(NamedTuple):
    """A commit that carries both trailers, and the branch it was first met on."""

    sha: str
    branch: str
    trial: str
    seq: str
    h: str


def witnessed(repo: Repo) -> Check:
    """Every kept commit on a search branch or in HEAD's history is in the ledger: its verdict and its intent.

    Two things are honest and only warned of: a keep copied by hand (rebased, cherry-picked) outside search branches,
    and keeps that came with the clone, from another ledger, before this one's first search.
    """
    lines = _git(repo, "for-each-ref", "--format=%(refname) %(objectname)", BRANCHES, PIN.rstrip("/")).decode()
    refs = dict(line.split(" ") for line in lines.splitlines())
    tips = {name.removeprefix("refs/heads/"): sha for name, sha in refs.items() if name.startswith(BRANCHES)}
    pins = {sha for name, sha in refs.items() if name.startswith(PIN)}
    head = repo.rev("HEAD")

    def check(records: list[Record]) -> list[Problem]:
        known = _walk(repo, {**tips, **({"HEAD": head} if head else {})})
        by_seq = {r.seq: r for r in records}
        intended = {(r.trial, r.body.sha) for r in records if isinstance(r.body, CommitIntent)}
        owners = {trial for trial, _ in intended}
        lacking: list[_Witness] = []
        found = []
        for w in known:
            record = by_seq.get(int(w.seq)) if w.seq.isdecimal() else None
            if record is None or record.h != w.h or record.trial != w.trial:
                lacking.append(w)
            elif (w.trial, w.sha) not in intended:
                copy = w.branch == "HEAD" and w.trial in owners
                why = "a copy of this keep, made by hand" if copy else "this ledger never intended that commit"
                found.append(problem_at(record, "commit", f"commit {w.sha[:12]} on {w.branch}: {why}",
                                        "warning" if copy else "error"))
        return found + _lacking(repo, lacking, records, pins)

    return check


def _lacking(repo: Repo, lacking: list[_Witness], records: list[Record], pins: set[str]) -> list[Problem]:
    if not lacking:
        return []
    base = next((r.body.incumbent_commit for r in records if isinstance(r.body, SearchStarted)), "")
    there = _SHA.fullmatch(base) and repo.rev(base)
    older = set(_git(repo, "rev-list", base).decode().split()) if there else set()
    foreign = [w for w in lacking if w.sha in older and w.sha not in pins]  # pins do not travel with a clone
    found = [Problem(rule="commit", trial=w.trial,
                     reason=f"commit {w.sha[:12]} on {w.branch} witnesses record {w.seq}:{w.h[:12]} which this ledger "
                            "lacks: it was rewritten or cut")
             for w in lacking if w not in foreign]
    if foreign:
        found.append(Problem(rule="commit", severity="warning",
                             reason=f"{len(foreign)} kept commits are older than this ledger's first search and were "
                                    f"judged in another ledger (first {foreign[0].sha[:12]}, {foreign[0].trial})"))
    return found


def _walk(repo: Repo, tips: Mapping[str, str]) -> list[_Witness]:
    """The commits with both trailers that are reachable from each tip, each once."""
    found: dict[str, _Witness] = {}
    for branch, tip in tips.items():
        for sha, trial, head in repo.witnesses(tip):
            seq, _, h = head.partition(":")
            found.setdefault(sha, _Witness(sha, branch, trial, seq, h))
    return list(found.values())


def _git(repo: Repo, *args: str, stdin: bytes = b"") -> bytes:
    """What git prints, byte for byte; replaced objects are looked through. Raises InfraError."""
    try:
        done = subprocess.run(["git", "-C", str(repo.root), "--no-replace-objects", *args], input=stdin,
                              capture_output=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise InfraError(f"git {args[0]} in {repo.root}: {e}") from e
    if done.returncode:
        raise InfraError(f"git {' '.join(args[:3])}: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout
