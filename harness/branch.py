"""The search branch at start: found or made, healed after a kill, of one story with the ledger, running this code."""

from __future__ import annotations

from harness.errors import UserError
from harness.gitrepo import TRAILER_REVERTS, ZERO, Repo
from harness.state import SearchState
from harness.tracks import Track
from harness.views import View
from ledger.store import Ledger


def search_branch(repo: Repo, name: str, state: SearchState, track: Track, view: View) -> str:
    """Full ref of the search's branch, made at HEAD for a new search. Raises UserError."""
    if state.started and state.started[0].track != track.name:
        raise UserError(f"--name {name}: that search belongs to track {state.started[0].track}, not {track.name}; "
                        "a search is bound to one track: choose another --name")
    ref = f"refs/heads/search/{name}"
    if repo.rev(ref) is None:
        head = repo.rev("HEAD")
        assert head
        last = last_commit(state)
        if last and not repo.is_ancestor(last[0], head):
            raise UserError(
                f"branch search/{name} is gone, but the ledger has its commits (last {last[1]}); bring it back with "
                f"`git branch search/{name} {last[0]}`, or use another --name")
        repo.set_ref(ref, head, old=ZERO)
        view.note(f"new branch search/{name} at {head[:12]}")
    return ref


def same_history(repo: Repo, ledger: Ledger, state: SearchState, branch: str) -> None:
    """Branch and ledger tell one story: every kept commit has its record, every recorded keep is in the branch."""
    short = branch.removeprefix("refs/heads/")
    elsewhere = repo.checked_out_elsewhere(branch)
    if elsewhere:
        raise UserError(f"{short} is checked out in the worktree {elsewhere}, whose files would fall behind its "
                        f"commits; check another branch out there (`git -C {elsewhere} switch --detach`), then search "
                        "again")
    known = {f"{r.seq}:{r.h}" for r in ledger.records(types=["decided", "honest.measured"])}
    # What lies before the search's first start is not its own: a clone may carry keeps without their ledger.
    base = state.started[0].incumbent_commit if state.started else "HEAD"
    span = f"{base}..{branch}"
    for sha, trial, head in [*repo.witnesses(span), *repo.witnesses(span, TRAILER_REVERTS)]:
        if head not in known:
            raise UserError(f"{short} holds commit {sha[:12]} (trial {trial}), which was decided in ledger record "
                            f"{head[:24]}..., but this ledger has no such record: it was cut or replaced. Restore it "
                            "(`git show refs/autoresearch/ledger:autoresearch.jsonl` may hold it), or use another "
                            "--name from a branch without that commit")
    tip = repo.rev(branch)
    last = last_commit(state)
    if tip and last and not repo.is_ancestor(last[0], tip):
        raise UserError(f"{short} no longer contains its last commit {last[0][:12]} ({last[1]}): it was moved back. "
                        f"`git branch -f {short} {last[0][:12]}` brings it back; to go on from another commit, start "
                        "another search with --name")


def last_commit(state: SearchState) -> tuple[str, str] | None:
    """(commit, what it is) that the search made last: its last keep, or what took that back."""
    if not state.kept:
        return None
    trial = state.trials[state.kept[-1]]
    assert trial.done
    return (trial.reverted.sha, f"revert of trial {trial.id}") if trial.reverted else (trial.done.sha,
                                                                                       f"trial {trial.id}")


def heal_checkout(repo: Repo, state: SearchState, branch: str) -> None:
    """A kill between the ref's move and the files' leaves the checked-out branch looking edited: bring it along."""
    for trial in state.trials.values():
        if trial.intent and trial.done and repo.rev(branch) == trial.done.sha:
            repo.bring_along(branch, trial.intent.parent, trial.intent.sha)
        if trial.revert_intent and trial.reverted and repo.rev(branch) == trial.reverted.sha:
            repo.bring_along(branch, trial.revert_intent.parent, trial.reverted.sha)


def refuse_dirty(repo: Repo) -> None:
    """Raise UserError when tracked files differ from HEAD (the ledger aside)."""
    dirty = repo.dirty_paths()
    if dirty:
        shown = ", ".join(dirty[:5]) + (f" and {len(dirty) - 5} more" if len(dirty) > 5 else "")
        raise UserError(f"the checkout has uncommitted changes ({shown}): what runs must be what is committed. "
                        "Commit or stash them, then search again")


def catch_up(repo: Repo, branch: str, view: View) -> None:
    """The search branch must run the code of this checkout: fast-forward it, or say what to merge."""
    tip, head = repo.rev(branch), repo.rev("HEAD")
    assert tip and head
    if repo.code_tree(tip) == repo.code_tree(head):
        return
    short = branch.removeprefix("refs/heads/")
    if repo.is_ancestor(tip, head):
        repo.set_ref(branch, head, old=tip)
        view.note(f"{short} fast-forwarded to your HEAD {head[:12]} (its keeps are in it, the trainer has moved on)")
        return
    raise UserError(f"{short} and your HEAD hold different trainer code. Bring its keeps into your branch with "
                    f"`git merge {short}` (the search then goes on from there), or start afresh with --name")
