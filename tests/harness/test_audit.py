"""A ledger rewritten by a hand that mends every hash: what ``ledger verify`` still sees."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import harness.search as search_module
from harness.audit import checks
from harness.audit_git import compare
from harness.gitrepo import Repo
from harness.search import SearchOptions, run_search
from harness.workspace import LEDGER_FILE, Workspace
from ledger.problems import Problem
from ledger.verify import verify
from tests.conftest import IDENTITY, git
from tests.harness.fakes import FakeExecutor, SilentView, unit

TRACK = "nano"
REF = "refs/autoresearch/ledger"
Edit = Callable[[dict[str, Any]], None]


def search(folder: Path, trials: int, name: str = "") -> None:
    run_search(Workspace(root=folder, main=folder), SearchOptions(track=TRACK, trials=trials, name=name), SilentView(),
               make_executor=FakeExecutor)


@pytest.fixture(scope="module")
def made_up() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "ensure_data", lambda ws, track, note: (Path("/nowhere"), "d" * 64))
        patch.setattr(search_module, "require_own_code", lambda ws: None)
        FakeExecutor.reset()
        yield
        FakeExecutor.reset()


@pytest.fixture(scope="module")
def finished(made_up: None, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout after a search of eight trials, some of them kept."""
    folder = tmp_path_factory.mktemp("audit") / "checkout"
    git(folder.parent, "clone", "-q", str(pristine), str(folder))
    search(folder, 8)
    types = [json.loads(line)["type"] for line in lines_of(folder)]
    assert types.count("commit.done") >= 2 and types.count("decided") == 8
    return folder


@pytest.fixture
def world(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished checkout for one test."""
    return Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))


def lines_of(folder: Path) -> list[bytes]:
    return (folder / LEDGER_FILE).read_bytes().splitlines()


def problems(folder: Path) -> list[Problem]:
    path = folder / LEDGER_FILE
    return verify(path, checks(Repo(folder), path)).problems


def rechain(lines: list[bytes]) -> bytes:
    """Seal every line anew: h = SHA-256 of the bytes before its key, prev = the h of the line before."""
    out, prev = b"", b"0" * 64
    for line in lines:
        prefix = line[: line.rindex(b',"h":"')]
        assert prefix[:-65].endswith(b'"prev":"')
        prefix = prefix[:-65] + prev + b'"'
        prev = hashlib.sha256(prefix).hexdigest().encode()
        out += prefix + b',"h":"' + prev + b'"}\n'
    return out


def tamper(folder: Path, pick: Callable[[dict[str, Any]], bool], edit: Edit) -> int:
    """Edit the first record that ``pick`` takes, mend all hashes; the 1-based line is returned."""
    lines = lines_of(folder)
    at = next(i for i, line in enumerate(lines) if pick(json.loads(line)))
    record = json.loads(lines[at])
    edit(record["body"])
    lines[at] = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    (folder / LEDGER_FILE).write_bytes(rechain(lines))
    assert verify(folder / LEDGER_FILE).ok, "the chain alone must not see it"
    return at + 1


def of(kind: str, **fields: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda r: r["type"] == kind and all(r["body"].get(k) == v for k, v in fields.items())


def better(body: dict[str, Any]) -> None:
    body["run"]["val_bpb"] -= 0.01


def peak(body: dict[str, Any]) -> None:
    body["candidate"][0]["peak_memory_bytes"] += 1  # a figure that no verdict is made from


def another_change(body: dict[str, Any]) -> None:
    body["change"] = {"seed_of_nothing": 1}


def larger(body: dict[str, Any]) -> None:
    body["measured_bpb"] -= 0.01


def test_the_rechainer_agrees_with_an_untouched_ledger(finished: Path) -> None:
    assert rechain(lines_of(finished)) == (finished / LEDGER_FILE).read_bytes()


def test_an_untouched_ledger_has_no_problem(finished: Path) -> None:
    assert problems(finished) == []


def test_a_clone_without_the_ref_has_no_problem(world: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(world), str(clone))
    (clone / LEDGER_FILE).parent.mkdir(exist_ok=True)
    shutil.copyfile(world / LEDGER_FILE, clone / LEDGER_FILE)
    assert "autoresearch/ledger" not in git(clone, "for-each-ref")
    assert problems(clone) == []


def test_keeps_merged_into_main_have_no_problem(world: Path) -> None:
    git(world, "commit", "-q", "--allow-empty", "-m", "a person's own", **IDENTITY)
    git(world, "merge", "-q", "--no-ff", "-m", "keeps", f"search/{TRACK}", **IDENTITY)
    assert problems(world) == []
    git(world, "branch", "-q", "-D", f"search/{TRACK}")
    assert problems(world) == []


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], bool], Edit, str]] = {
    "confirm.ended": (of("confirm.ended"), better, "figures"),
    "control.ended confirm": (of("control.ended", stage="confirm"), better, "figures"),
    "decided figure": (of("decided", verdict="keep"), peak, "figures"),
    "decided run id": (of("decided"), lambda b: b["candidate"][0].update(run_id="x"), "figures"),
    "decided run k": (of("decided"), lambda b: b["control"][0].update(k=77), "figures"),
    "noise.measured": (of("noise.measured"), lambda b: b["values"].reverse(), "figures"),
    "finding": (lambda r: r["type"] == "finding" and r["body"]["measured_bpb"] is not None, larger, "finding"),
    "unknown knob": (of("trial.proposed"), another_change, "config"),
    "config hash": (of("trial.proposed"), lambda b: b.update(config_hash="0" * 64), "config"),
    "parent config": (of("trial.proposed"), lambda b: b.update(parent_config="0" * 64), "config"),
    "intent config": (of("commit.intent"), lambda b: b.update(config_hash="0" * 64), "commit"),
    "code tree": (of("search.started"), lambda b: b.update(code_tree="0" * 40), "search"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_an_edited_field_is_seen_though_every_hash_is_right(world: Path, name: str) -> None:
    """By the rule that is meant to see it, and by the copy under the ref, at the very line."""
    pick, edit, rule = TAMPERED[name]
    line = tamper(world, pick, edit)
    found = [p for p in problems(world) if p.severity == "error"]
    assert rule in {p.rule for p in found}, found
    before = b"".join(x + b"\n" for x in lines_of(world)[: line - 1])
    assert [(p.line, p.offset) for p in found if p.rule == "mirror"] == [(line, len(before))]
    git(world, "update-ref", "-d", REF)
    assert {p.rule for p in problems(world)} == {p.rule for p in found} - {"mirror"}


def test_a_changed_value_of_a_knob_is_seen(world: Path) -> None:
    def numeric(r: dict[str, Any]) -> bool:
        return r["type"] == "trial.proposed" and "matrix_lr" in r["body"]["change"]

    line = tamper(world, numeric, lambda b: b["change"].update(matrix_lr=b["change"]["matrix_lr"] * 1.01))
    assert [p.line for p in problems(world) if p.rule == "config"] == [line]


def test_a_changed_knob_after_the_trainer_has_moved_on_is_not_held_against_the_ledger(world: Path) -> None:
    """Other code may have other defaults: an honest ledger must not be called rewritten for that."""
    tamper(world, of("trial.proposed"), lambda b: b.update(config_hash="0" * 64))
    (world / "trainer" / "new.py").write_text("x = 1\n")
    git(world, "add", "-A")
    git(world, "commit", "-q", "-m", "trainer moves on", **IDENTITY)
    assert "config" not in {p.rule for p in problems(world)}


def test_a_cut_ledger_is_seen_by_ref_and_by_branch(world: Path) -> None:
    path = world / LEDGER_FILE
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(lines[:-8]))
    found = problems(world)
    assert [p.severity for p in found if p.rule == "mirror"] == ["error"]
    assert f"8 records that {REF} holds are missing: `autoresearch search` restores them" in str(found)
    git(world, "update-ref", "-d", REF)
    last_keep = max(i for i, line in enumerate(lines) if json.loads(line)["type"] == "decided"
                    and json.loads(line)["body"]["verdict"] == "keep")
    path.write_bytes(b"".join(lines[:last_keep]))
    (problem,) = problems(world)
    tip = git(world, "rev-parse", f"search/{TRACK}")
    assert problem.severity == "error" and tip[:12] in problem.reason and f"record {last_keep}:" in problem.reason
    path.write_bytes(b"".join(lines[: last_keep + 1]))  # the verdict is there, the intent is not
    assert any(p.severity == "error" and "never intended" in p.reason for p in problems(world))


def test_a_ledger_replaced_by_one_that_never_kept_is_seen(world: Path, pristine: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(pristine), str(other))
    FakeExecutor.world = staticmethod(lambda request: 2.4 + 0.02 * unit("seed", request.seed))
    try:
        search(other, 2)
    finally:
        FakeExecutor.reset()
    assert problems(other) == []
    shutil.copyfile(other / LEDGER_FILE, world / LEDGER_FILE)
    assert "mirror" in {p.rule for p in problems(world)}
    git(world, "update-ref", "-d", REF)
    kept = git(world, "log", "--format=%H", "--grep=^Ledger-Head: ", f"search/{TRACK}").splitlines()
    found = problems(world)
    assert len(kept) >= 2 and all(any(sha[:12] in p.reason for p in found) for sha in kept)
    assert {(p.rule, p.severity) for p in found} == {("commit", "error")}


def test_a_new_ledger_in_a_clone_of_merged_keeps_is_only_told_of_them(world: Path, tmp_path: Path) -> None:
    """A demo, say: the keeps were judged elsewhere. In the repository that made them the same is an error."""
    git(world, "merge", "-q", f"search/{TRACK}", **IDENTITY)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(world), str(clone))
    search(clone, 1)
    (problem,) = problems(clone)
    assert problem.severity == "warning" and "another ledger" in problem.reason
    git(world, "update-ref", "-d", REF)
    (world / LEDGER_FILE).unlink()
    search(world, 1, "again")
    assert {p.severity for p in problems(world)} == {"error"}


def test_a_copied_keep_on_main_is_a_warning_on_a_search_branch_an_error(world: Path) -> None:
    first = git(world, "rev-list", "--reverse", f"main..search/{TRACK}").splitlines()[0]
    git(world, "commit", "-q", "--allow-empty", "-m", "own", **IDENTITY)
    git(world, "cherry-pick", first, **IDENTITY)
    assert [p.severity for p in problems(world)] == ["warning"]
    git(world, "branch", "search/other")
    assert "error" in [p.severity for p in problems(world)]


@pytest.mark.parametrize(("data", "stored", "where"), [
    (b"a\nb\n", b"a\nb\n", None), (b"a\nb\nc\n", b"a\nb\n", None), (b"a\nb\nto", b"a\nb\n", None),
    (b"a\nb", b"a\nb\n", None), (b"a\nb\n", b"", None),
    (b"a\n", b"a\nbb\nc\n", (2, 2, "2 records that")), (b"a\nb", b"a\nbb\nc\n", (2, 2, "2 records that")),
    (b"a\nbb\n", b"a\nbb\nc\n", (3, 5, "1 record that")), (b"", b"a\n", (1, 0, "1 record that")),
    (b"a\nx\nc\n", b"a\nbb\nc\n", (2, 2, "rewritten")), (b"x\n", b"a\nb\n", (1, 0, "rewritten")),
])
def test_compare(data: bytes, stored: bytes, where: tuple[int, int, str] | None) -> None:
    found = compare(data, stored)
    if where is None:
        assert found == []
    else:
        (problem,) = found
        assert (problem.line, problem.offset) == where[:2] and where[2] in problem.reason
