"""The ledger's second home under a git ref: real repositories, and nothing of the user's is touched."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ledger import mirror
from ledger.errors import LedgerCorrupt, LedgerError, LedgerForked
from ledger.mirror import BLOB_NAME, REF, publish_ref, reconcile
from ledger.records import Note
from ledger.store import Ledger
from tests.ledger.plain import forge_after, read_chain, read_file
from tests.ledger.samples import fill


def git(repo: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(repo), *args], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a commit, a staged change and an unstaged one; no git identity anywhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "no-home"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "EMAIL"):
        monkeypatch.delenv(name, raising=False)
    made = tmp_path / "repo"
    subprocess.run(["git", "init", "-q", "-b", "main", str(made)], check=True)
    (made / "a.txt").write_text("committed\n")
    (made / "ledger").mkdir()
    git(made, "add", "a.txt")
    git(made, "-c", "user.name=u", "-c", "user.email=u@h", "commit", "-q", "-m", "first")
    (made / "b.txt").write_text("staged\n")
    git(made, "add", "b.txt")
    (made / "a.txt").write_text("being edited\n")
    return made


@pytest.fixture
def ledger(repo: Path) -> Ledger:
    made = Ledger(repo / "ledger" / "autoresearch.jsonl")
    fill(made, 4)
    return made


def stored(repo: Path) -> bytes:
    command = ["git", "-C", str(repo), "cat-file", "blob", f"{REF}:{BLOB_NAME}"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def state(repo: Path) -> tuple[str, ...]:
    """Everything of the user's that must stay as it is."""
    index = (repo / ".git" / "index").read_bytes().hex()
    return (
        index,
        git(repo, "status", "--porcelain"),
        git(repo, "for-each-ref", "refs/heads"),
        git(repo, "symbolic-ref", "HEAD"),
        (repo / "a.txt").read_text(),
    )


def test_publish_stores_the_content_and_touches_nothing_else(repo: Path, ledger: Ledger) -> None:
    before = state(repo)
    first = publish_ref(repo, ledger.path)
    assert stored(repo) == ledger.path.read_bytes()
    assert publish_ref(repo, ledger.path) == first  # nothing new, no commit
    fill(ledger, 2)
    second = publish_ref(repo, ledger.path)
    assert stored(repo) == ledger.path.read_bytes()
    assert git(repo, "rev-list", REF).split() == [second, first]
    assert git(repo, "ls-tree", "-r", "--name-only", REF).split() == [BLOB_NAME]
    assert state(repo) == before
    assert git(repo, "log", "-1", "--format=%cn <%ce>", REF).strip() == "autoresearch <autoresearch@localhost>"
    seq, h = ledger.head()
    assert f"Ledger-Head: {seq}:{h} " in git(repo, "log", "-1", "--format=%B", REF)
    assert git(repo, "fsck", "--strict", "--no-dangling") == ""


def test_git_variables_of_a_hook_lead_nowhere(
    repo: Path, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    publish_ref(repo, ledger.path)
    for name in ("GIT_DIR", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name)
    assert stored(repo) == ledger.path.read_bytes()
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "index").exists()


def test_a_torn_tail_is_not_published(repo: Path, ledger: Ledger) -> None:
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'{"v":1')
    publish_ref(repo, ledger.path)
    assert stored(repo) == whole


def test_damage_is_never_published_over_a_good_history(repo: Path, ledger: Ledger) -> None:
    publish_ref(repo, ledger.path)
    good = stored(repo)
    fill(ledger, 1)
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b"note 2", b"note 3"))
    with pytest.raises(LedgerCorrupt):
        publish_ref(repo, ledger.path)
    with pytest.raises(LedgerCorrupt, match=r"refs/autoresearch/ledger holds a good history of 5 records"):
        reconcile(repo, ledger.path)
    assert stored(repo) == good


def test_reconcile_before_anything_exists(repo: Path) -> None:
    path = repo / "ledger" / "autoresearch.jsonl"
    assert reconcile(repo, path).startswith("new")
    assert publish_ref(repo, path) == ""
    assert not path.exists()
    fill(Ledger(path), 1)
    assert reconcile(repo, path).startswith("unpublished")


def test_reconcile_equal_and_ahead(repo: Path, ledger: Ledger) -> None:
    publish_ref(repo, ledger.path)
    before = ledger.path.read_bytes()
    assert reconcile(repo, ledger.path).startswith("equal")
    fill(ledger, 3)
    assert reconcile(repo, ledger.path).startswith("extends")
    assert ledger.path.read_bytes().startswith(before)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_file_that_was_reset_is_restored(repo: Path, ledger: Ledger, cut: int) -> None:
    publish_ref(repo, ledger.path)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:cut]))
    with pytest.raises(LedgerForked, match="Nothing was published"):
        publish_ref(repo, ledger.path)
    notice = reconcile(repo, ledger.path)
    assert notice.startswith("restored") and f"held {cut} of 5 records" in notice
    assert ledger.path.read_bytes() == whole
    ledger.append("note", Note(text="goes on"))
    assert reconcile(repo, ledger.path).startswith("extends")


def test_a_file_that_was_cleaned_away_is_restored(repo: Path, ledger: Ledger) -> None:
    publish_ref(repo, ledger.path)
    whole = ledger.path.read_bytes()
    ledger.path.unlink()
    assert "was missing" in reconcile(repo, ledger.path)
    assert ledger.path.read_bytes() == whole
    assert reconcile(repo, ledger.path).startswith("equal")


def test_a_fork_is_refused_with_instructions_and_changes_nothing(repo: Path, ledger: Ledger) -> None:
    publish_ref(repo, ledger.path)
    first = ledger.path.read_bytes()
    lines = first.splitlines(keepends=True)
    common = b"".join(lines[:3])
    for extra in (1, 5):  # the fork is shorter, then longer than the ref
        forked = common
        for index in range(extra):
            forked += forge_after(forked, body={"text": f"another history {index}"})
        ledger.path.write_bytes(forked)
        with pytest.raises(LedgerForked, match=r"share 3 records.*git show .*git update-ref -d"):
            reconcile(repo, ledger.path)
        with pytest.raises(LedgerForked):
            publish_ref(repo, ledger.path)
        assert ledger.path.read_bytes() == forked and stored(repo) == first


def test_the_instructions_of_a_fork_work(repo: Path, ledger: Ledger) -> None:
    publish_ref(repo, ledger.path)
    first = ledger.path.read_bytes()
    forked = b"".join(first.splitlines(keepends=True)[:3])
    forked += forge_after(forked, body={"text": "mine"})
    ledger.path.write_bytes(forked)
    git(repo, "update-ref", f"{REF}-old", REF)
    git(repo, "update-ref", "-d", REF)
    assert reconcile(repo, ledger.path).startswith("unpublished")
    publish_ref(repo, ledger.path)
    assert stored(repo) == forked
    git(repo, "update-ref", REF, f"{REF}-old")
    ledger.path.rename(ledger.path.with_name("aside"))
    assert reconcile(repo, ledger.path).startswith("restored")
    assert ledger.path.read_bytes() == first


def test_a_torn_tail_ahead_of_the_ref_is_mended(repo: Path, ledger: Ledger) -> None:
    publish_ref(repo, ledger.path)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'{"v":1,"se')
    notice = reconcile(repo, ledger.path)
    assert notice.startswith("equal") and "10 torn bytes" in notice
    assert [r["type"] for r in read_file(ledger.path)][-1] == "ledger.repair"
    assert ledger.path.read_bytes().startswith(whole)
    assert reconcile(repo, ledger.path).startswith("extends")


def test_a_tail_torn_inside_published_records_comes_back_whole(repo: Path, ledger: Ledger) -> None:
    publish_ref(repo, ledger.path)
    whole = ledger.path.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 30, len(whole) // 2):
        ledger.path.write_bytes(whole[:cut])
        assert reconcile(repo, ledger.path).startswith("restored")
        assert ledger.path.read_bytes() == whole
        assert not list(ledger.path.parent.glob("*.torn-*"))  # nothing was in the tail that is not back


def test_strange_bytes_after_a_reset_are_kept(repo: Path, ledger: Ledger) -> None:
    publish_ref(repo, ledger.path)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"v":1,"stray')
    assert reconcile(repo, ledger.path).startswith("restored")
    assert ledger.path.read_bytes() == whole
    Ledger(ledger.path).append("note", Note(text="x"))
    records = read_chain(ledger.path.read_bytes())
    assert [r["type"] for r in records[-2:]] == ["ledger.repair", "note"]
    assert bytes.fromhex(records[-2]["body"]["torn_hex"]) == b'{"v":1,"stray'


def test_many_publications_are_packed_and_all_stay_readable(
    repo: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "PACK_AFTER", 4)
    before = state(repo)
    contents: dict[str, bytes] = {}
    for _ in range(9):
        fill(ledger, 3)
        contents[publish_ref(repo, ledger.path)] = ledger.path.read_bytes()
    counted = dict(line.split(": ") for line in git(repo, "count-objects", "-v").splitlines())
    assert int(counted["packs"]) == 2 and int(counted["in-pack"]) == 24
    for commit, content in contents.items():
        assert git(repo, "cat-file", "blob", f"{commit}:{BLOB_NAME}").encode() == content
    assert git(repo, "rev-list", REF).split() == list(contents)[::-1]
    assert git(repo, "fsck", "--strict", "--no-dangling") == "" and state(repo) == before


def test_a_worktree_publishes_to_the_same_ref(repo: Path, ledger: Ledger, tmp_path: Path) -> None:
    git(repo, "worktree", "add", "-q", "--detach", str(tmp_path / "tree"))
    publish_ref(tmp_path / "tree", ledger.path)
    assert stored(repo) == ledger.path.read_bytes()


def test_a_ref_that_somebody_else_wrote(repo: Path, ledger: Ledger) -> None:
    git(repo, "update-ref", REF, "HEAD")
    with pytest.raises(LedgerError, match="no Ledger-Head trailer"):
        publish_ref(repo, ledger.path)


def test_not_a_repository_and_no_git(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(LedgerError, match="not a git repository"):
        publish_ref(tmp_path / "plain", ledger.path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LedgerError, match="no `git` on PATH"):
        publish_ref(tmp_path / "plain", ledger.path)
