"""After a keep: is the gain there on seeds that its selection never saw? If not, the keep is taken back.

A selected figure flatters (winner's curse). So the kept configuration and its parent run once more, seed by
seed, on fresh seeds; that difference is the honest gain. The runs are not lost: those of the winner are the
new incumbent's control bank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from harness.bench import Bench
from harness.gate.policy import Policy
from harness.recipe import parse_recipe
from harness.stages import Incumbent, controls, ensure_controls
from harness.state import SearchState, TrialState
from harness.transaction import revert_keep
from harness.workspace import recipe_path
from ledger.measured import HonestMeasured
from ledger.records import Decided
from trainer.knobs import REGISTRY


def unsettled(bench: Bench) -> TrialState | None:
    """The last keep, if its honest gain is still to be measured; under today's fingerprint, whatever it was then."""
    return last_unsettled(bench.state, bench.policy)


def last_unsettled(state: SearchState, policy: Policy) -> TrialState | None:
    """The last keep, while its honest gain is not known. Earlier ones were settled before others were built on them."""
    if not state.kept or not policy.honest_pairs:
        return None
    trial = state.trials[state.kept[-1]]
    return trial if trial.stands and (trial.honest is None or trial.honest.decision == "extend") else None


def settle(bench: Bench, inc: Incumbent) -> None:
    """Measure the last keep on fresh seeds; take it back if its gain lies below its floor. Resumable."""
    trial = unsettled(bench)
    if trial is None or trial.proposed.config_hash != inc.config:
        return
    policy, parent = bench.policy, parent_of(bench, trial)
    for count in dict.fromkeys((policy.honest_pairs, policy.honest_pairs + policy.honest_extend)):
        ks = list(range(count))
        bench.view.status.doing = f"{trial.id}: measured again on {count} fresh seeds"
        ensure_controls(bench, inc, "confirm", ks)
        ensure_controls(bench, parent, "confirm", ks)
        mine, theirs = controls(bench, inc, "confirm"), controls(bench, parent, "confirm")
        last = count == policy.honest_pairs + policy.honest_extend
        body = judge(trial, [theirs[k].val_bpb for k in ks], [mine[k].val_bpb for k in ks],
                     bench.state.generation, last, bench.fingerprint)
        known = trial.honest
        if known is None or (known.ks, known.decision, known.fingerprint) != (ks, body.decision, bench.fingerprint):
            bench.write("honest.measured", body, trial.id)
        if body.decision != "extend":
            return


def parent_of(bench: Bench, trial: TrialState) -> Incumbent:
    """The configuration that the keep was judged against, at its commit."""
    commit = trial.proposed.parent_commit
    knobs = bench.track.resolve(parse_recipe(bench.repo.show(commit, recipe_path(bench.track.name)), bench.track))
    return Incumbent(commit, knobs, REGISTRY.config_hash(knobs))


def judge(
    trial: TrialState, parent: list[float], kept: list[float], generation: int, last: bool, fingerprint: str,
) -> HonestMeasured:
    """The honest record from fresh val_bpb of both, seed by seed."""
    assert trial.decided and trial.done
    return HonestMeasured(
        sha=trial.done.sha, generation=generation, parent_config=trial.proposed.parent_config,
        config_hash=trial.proposed.config_hash, ks=list(range(len(kept))), fingerprint=fingerprint, last=last,
        **honest_figures(trial.decided, parent, kept, last))


def honest_figures(decided: Decided, parent: Sequence[float], kept: Sequence[float], last: bool) -> dict[str, Any]:
    """Differences, gain, standard error, claim, floor and decision: a pure function, so that verify can repeat it.

    ``last``: no more seeds will be added. The gain stands when it is not below the floor.
    """
    differences = [a - b for a, b in zip(parent, kept, strict=True)]
    gain, floor = fmean(differences), honest_floor(decided)
    return {
        "differences": differences, "gain": gain, "floor": floor, "claimed": -(decided.delta_bpb or 0.0),
        "se": stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0,
        "decision": "stand" if gain >= floor else ("revert" if last else "extend"),
    }


def honest_floor(decided: Decided) -> float:
    """The least honest gain with which a keep stands, bpb.

    Kept for its gain: what its bytes and time were charged, so that its utility is not below zero. Kept for being
    simpler: the loss that the policy allowed it. For being cheaper or faster: no more than that, nor than its credit.
    """
    charges = -(decided.delta_bpb or 0.0) - decided.looks[-1].mean  # negative: a credit
    if decided.reason == "kept.gain":
        return max(0.0, charges)
    margin = -float(decided.policy["noninferiority_bpb"])
    return margin if decided.reason == "kept.simpler" else max(margin, charges)


def take_back(bench: Bench, trial: TrialState) -> None:
    """Revert the commit of a keep whose honest gain is below its floor."""
    bench.publish()
    bench.crash_point("before:revert")
    revert_keep(bench.repo, bench.ledger, bench.track, bench.search, bench.branch, trial)
