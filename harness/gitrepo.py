"""Git by plumbing: trees, deterministic commits, compare-and-swap of refs, worktrees. No user index is touched."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import git
import psutil

from harness.errors import InfraError, UserError
from harness.workspace import LEDGER_FILE, RECIPES_DIR

IDENTITY = {
    "GIT_AUTHOR_NAME": "autoresearch",
    "GIT_AUTHOR_EMAIL": "autoresearch@localhost",
    "GIT_COMMITTER_NAME": "autoresearch",
    "GIT_COMMITTER_EMAIL": "autoresearch@localhost",
}
"""Kept commits carry an identity of their own, so that a machine without one works and bits don't depend on it."""

_FSYNC = ["-c", "core.fsync=all", "-c", "core.fsyncMethod=fsync", "-c", "gc.auto=0"]
ZERO = "0" * 40
TRAILER_TRIAL, TRAILER_HEAD = "Trial", "Ledger-Head"  # of kept commits
TRAILER_REVERTS = "Reverts-Trial"  # of commits that take a keep back, which have no Trial


@dataclass(frozen=True)
class CommitPlan:
    """A commit that can be rebuilt bit for bit: same fields, same sha."""

    tree: str
    parent: str
    message: str
    date: str  # "<unix seconds> +0000"


class Repo:
    """Plumbing on one checkout. Methods raise InfraError when git itself fails."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repo = git.Repo(root)

    def _git(self, *args: str, env: Mapping[str, str] | None = None, stdin: bytes | None = None) -> str:
        command = ["git", *_FSYNC, *args]
        try:
            with tempfile.TemporaryFile() as stream:
                if stdin is not None:
                    stream.write(stdin)
                    stream.seek(0)
                return str(self.repo.git.execute(command, env={**os.environ, **(env or {})}, istream=stream))
        except git.GitCommandError as e:
            raise InfraError(f"git {' '.join(args[:3])}: {str(e.stderr).strip() or e}") from e

    def rev(self, name: str) -> str | None:
        """The commit a name points at, or None."""
        try:
            return self._git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        except InfraError:
            return None

    def head_branch(self) -> str:
        """Full ref name of the checked-out branch, "" when detached."""
        try:
            return self._git("symbolic-ref", "--quiet", "HEAD")
        except InfraError:
            return ""

    def is_ancestor(self, a: str, b: str) -> bool:
        """Whether commit ``a`` is ``b`` or reachable from it."""
        try:
            self._git("merge-base", "--is-ancestor", a, b)
            return True
        except InfraError:
            return False

    def code_tree(self, commit: str) -> str:
        """One hash over trainer/ without its recipes: equal hashes run equal code."""
        listing = self._git("ls-tree", "-r", commit, "--", "trainer")
        lines = [x for x in listing.splitlines() if f"\t{RECIPES_DIR}/" not in x]
        return self._git("hash-object", "--stdin", stdin="\n".join(lines).encode())

    def show(self, commit: str, path: str) -> str | None:
        """Text of a file in a commit, or None."""
        if not self._git("ls-tree", commit, "--", path):
            return None
        return self.repo.git.execute(["git", "cat-file", "blob", f"{commit}:{path}"], strip_newline_in_stdout=False)

    def trailers(self, commit: str) -> dict[str, str]:
        """Trailers of a commit message (the last one of a name wins)."""
        out = self._git("log", "-1", "--format=%(trailers:only=true,unfold=true)", commit)
        pairs = (line.partition(": ") for line in out.splitlines())
        return {key: value for key, sep, value in pairs if sep}

    def dirty_paths(self) -> list[str]:
        """Tracked files that differ from HEAD in index or work tree, the ledger aside."""
        out = self._git("status", "--porcelain=v1", "-z", "--untracked-files=no", "--no-renames")
        return [line[3:] for line in out.split("\0") if line and line[3:] != LEDGER_FILE]

    def build_tree(self, base: str, files: Mapping[str, str], removes: Sequence[str] = ()) -> str:
        """The tree of commit ``base`` with whole files replaced or removed, written through a private index."""
        folder = tempfile.mkdtemp(prefix="autoresearch-index-")
        try:
            env = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self._git("read-tree", base, env=env)
            for path, text in sorted(files.items()):
                blob = self._git("hash-object", "-w", "--stdin", stdin=text.encode())
                self._git("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", env=env)
            for path in removes:
                self._git("update-index", "--force-remove", "--", path, env=env)
            return self._git("write-tree", env=env)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def build_commit(self, plan: CommitPlan) -> str:
        """Write the commit object (no ref moves, no signing, fixed identity) and return its sha."""
        env = {**IDENTITY, "GIT_AUTHOR_DATE": plan.date, "GIT_COMMITTER_DATE": plan.date}
        return self._git("-c", "commit.gpgSign=false", "-c", "i18n.commitEncoding=UTF-8", "commit-tree", plan.tree,
                         "-p", plan.parent, "-F", "-", env=env, stdin=plan.message.encode())

    def set_ref(self, ref: str, new: str, old: str | None = None) -> bool:
        """Point ``ref`` at ``new``; with ``old``, only if it still points there (ZERO: must not exist)."""
        args = ["update-ref", "-m", "autoresearch", ref, new]
        if old is not None:
            args.append(old)
        try:
            self._git(*args)
            return True
        except InfraError:
            if old is not None and self.rev(ref) != (None if old == ZERO else old):
                return False
            raise

    def bring_along(self, ref: str, old: str, new: str) -> list[str]:
        """After ``ref`` moved old -> new: if it is checked out, update just the files that differ and
        that still are exactly ``old``'s in index and work tree (or already ``new``'s). Returns them."""
        if self.head_branch() != ref:
            return []
        moved = []
        listing = self._git("diff-tree", "-r", "--no-renames", "--name-only", "-z", old, new)
        for path in filter(None, listing.split("\0")):
            target = self.root / path
            now = target.read_text(encoding="utf-8") if target.is_file() else None
            before, after = self.show(old, path), self.show(new, path)
            if now not in (before, after):
                continue
            if after is None:
                target.unlink(missing_ok=True)
                self._git("update-index", "--force-remove", "--", path)
            else:
                if now != after:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    tmp = target.with_name(target.name + ".autoresearch-tmp")
                    tmp.write_text(after, encoding="utf-8")
                    tmp.replace(target)
                self._git("update-index", "--add", "--", path)
            moved.append(path)
        return moved

    def _owns(self, folder: Path) -> bool:
        """Whether ``folder`` is a worktree of this very repository (a copied checkout's slots are the original's)."""
        try:
            link = (folder / ".git").read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        except OSError:
            return False
        return Path(link).parent == Path(self.repo.common_dir).resolve() / "worktrees"

    def checked_out_elsewhere(self, ref: str) -> str:
        """The folder of another worktree that has ``ref`` checked out, "" if none has."""
        place = ""
        for line in self._git("worktree", "list", "--porcelain").splitlines():
            key, _, value = line.partition(" ")
            if key == "worktree":
                place = value
            elif key == "branch" and value == ref and Path(place).resolve() != self.root.resolve():
                return place
        return ""

    def clear_stale_locks(self, branch: str) -> list[str]:
        """Remove lock files that a killed git of ours left: of our own refs, and of the index where our branch is
        checked out. Only while no git process works in this repository; the caller holds the search lock."""
        common = Path(self.repo.common_dir).resolve()
        found = [*(common / "refs" / "autoresearch").rglob("*.lock"), common / f"{branch}.lock"]
        if self.head_branch() == branch:
            found.append(Path(self.repo.git_dir).resolve() / "index.lock")
        stale = [p for p in found if p.is_file()]
        if stale and not _git_at_work(self.root.resolve()):
            for path in stale:
                path.unlink(missing_ok=True)
            return [str(p.relative_to(common)) if p.is_relative_to(common) else p.name for p in stale]
        return []

    def witnesses(self, revisions: str, of: str = TRAILER_TRIAL) -> list[tuple[str, str, str]]:
        """(commit, trial, "seq:h") of every kept commit (``of``: or revert) in ``revisions`` ("a..b"), newest first.

        Replaced objects are looked through; of a trailer given twice the last counts.
        """
        trailer = "%(trailers:key={},valueonly,unfold,separator=%x1f)".format
        out = self._git("--no-replace-objects", "-c", "log.showSignature=false", "log",
                        f"--format=%H%x09{trailer(of)}%x09{trailer(TRAILER_HEAD)}", revisions, "--")
        rows = ([part.split("\x1f")[-1].strip() for part in line.split("\t")] for line in out.split("\n"))
        return [(row[0], row[1], row[2]) for row in rows if len(row) == 3 and row[1] and row[2]]

    def commit_file(self, path: str, message: str) -> str:
        """Commit one file as it is on disk, in the person's name if git knows it; "" when nothing changed.

        Other staged changes stay staged and are not part of the commit.
        """
        self._git("add", "--", path)
        if not self._git("diff", "--cached", "--name-only", "--", path):
            return ""
        known = {k: v for k, v in IDENTITY.items() if not self._has_identity()}
        self._git("-c", "commit.gpgSign=false", "commit", "--quiet", "--only", "-m", message, "--", path, env=known)
        return self.rev("HEAD") or ""

    def _has_identity(self) -> bool:
        try:
            self._git("var", "GIT_COMMITTER_IDENT")
            return True
        except InfraError:
            return False

    def worktree(self, folder: Path, commit: str) -> None:
        """Make ``folder`` a clean, detached worktree at ``commit``, whatever state a kill left it in."""
        if self._owns(folder):
            with contextlib.suppress(git.GitCommandError, git.InvalidGitRepositoryError, git.NoSuchPathError):
                slot = git.Repo(folder).git
                slot.execute(["git", "checkout", "--quiet", "--force", "--detach", commit])
                slot.execute(["git", "clean", "-ffdxq"])
                return
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._git("worktree", "prune")
        self._git("worktree", "add", "--quiet", "--force", "--detach", str(folder), commit)


def _git_at_work(root: Path) -> bool:
    """Whether some git process runs in ``root`` or below it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.name().startswith("git") and Path(process.cwd()).is_relative_to(root):
                return True
    return False


def open_repo(root: Path) -> Repo:
    """The repository at ``root``; raises UserError when it has no commit yet."""
    repo = Repo(root)
    if repo.rev("HEAD") is None:
        raise UserError(f"{root}: the repository has no commit yet; commit once, then search")
    return repo
