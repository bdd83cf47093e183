"""``autoresearch train``: one run by hand through the same executor and the same referee."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from harness.data import ensure_data
from harness.errors import InfraError, UserError
from harness.executor import LocalExecutor, RunFailed, RunRequest
from harness.gitrepo import open_repo
from harness.recipe import parse_recipe
from harness.tracks import STAGES, get_track
from harness.views import LiveView, PlainView, make_view
from harness.workspace import Workspace, recipe_path, require_own_code
from ledger.lock import SearchLock
from trainer.knobs import KnobValue


def run_once(
    ws: Workspace, where: str, sets: Mapping[str, KnobValue], seed: int, *, quiet: bool, plain: bool
) -> dict[str, Any]:
    """Train, export and score the checkout's recipe with ``sets`` on TRACK/STAGE; returns the figures.

    Raises UserError on a bad track, stage or knob, InfraError when the run fails.
    """
    name, _, stage = where.partition("/")
    track = get_track(name)
    stage = stage or "confirm"
    if stage not in STAGES:
        raise UserError(f"--track {where}: no stage {stage!r}; valid: {', '.join(f'{name}/{s}' for s in STAGES)}")
    require_own_code(ws)
    repo = open_repo(ws.root)
    head = repo.rev("HEAD")
    assert head
    knobs = track.resolve(parse_recipe(repo.show(head, recipe_path(name)), track), sets)
    knobs["iterations"] = track.steps(stage)
    view = PlainView() if plain or quiet else make_view()
    if quiet:
        view.note = lambda text: None  # type: ignore[method-assign]
    if repo.dirty_paths():
        view.note("note: uncommitted changes are not part of this run; it is made from the last commit")
    with SearchLock(ws.state / "manual.lock"):
        data_dir, _ = ensure_data(ws, track, view.note)
        executor = LocalExecutor(repo=repo, track=track, data_dir=data_dir, runs=ws.state / "runs-manual",
                                 slots=ws.state / "slots-manual", pinned=head)
        request = RunRequest(
            run_id=f"manual-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}", owner="train", stage=stage, k=0, seed=seed,
            knobs=knobs, commit=head, split="val" if stage == "confirm" else "dev",
            max_tokens=track.val_tokens if stage == "confirm" else track.dev_tokens,
        )
        sink = (lambda r, e: None) if quiet else view.run_event
        try:
            if isinstance(view, LiveView):
                view.status.search, view.status.track = "train", where
                with view:
                    outcome = executor.submit(request, sink).result()
            else:
                outcome = executor.submit(request, sink).result()
        finally:
            executor.stop()
            executor.close()
    if isinstance(outcome, RunFailed):
        raise InfraError(f"the run failed ({outcome.kind}): {outcome.detail}\n{outcome.log_tail.strip()[-1500:]}")
    return msgspec.to_builtins(outcome.figures)
