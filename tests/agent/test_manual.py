"""A person's own proposal: what is accepted, and what each mistake is told."""

from __future__ import annotations

import pytest

from agent.proposers.manual import ManualError, manual_proposal, parse_settings
from tests.agent.support import LOCKED, POCKET
from trainer.knobs import REGISTRY, KnobError

INCUMBENT = REGISTRY.resolve(POCKET)


def test_a_proposal_carries_the_persons_words_and_typed_values() -> None:
    proposal = manual_proposal(
        ["BETA2=0.99", "smear_gate=on", "num_layers=5"], "  smoother  ", incumbent=INCUMBENT, locked=LOCKED,
        predicted={"val_bpb": -0.01},
    )
    assert proposal.change == {"beta2": 0.99, "smear_gate": True}  # num_layers is 5 already
    assert (proposal.line, proposal.move, proposal.hypothesis) == ("manual", "manual", "smoother")
    assert "0.00500" in proposal.falsified_by and proposal.kind == "knobs"


@pytest.mark.parametrize(("settings", "why", "words"), [
    (["beta2=0.99"], "  ", "--why is empty"),
    ([], "x", "nothing to try"),
    (["beta2"], "x", "expected NAME=VALUE"),
    (["beta2="], "x", "expected NAME=VALUE"),
    (["beta2=0.99", "beta2=0.98"], "x", "beta2 is set twice"),
    (["beta2=0.95"], "x", "already has exactly this"),
    (["train_seq_len=256"], "x", "train_seq_len is fixed by the track"),
    (["head_lr=0.01"], "x", "not active in this configuration"),
])
def test_mistakes_are_named(settings: list[str], why: str, words: str) -> None:
    with pytest.raises(ManualError, match=words):
        manual_proposal(settings, why, incumbent=INCUMBENT, locked=LOCKED)


@pytest.mark.parametrize(("text", "words"), [("beta3=1", "did you mean"), ("beta2=two", "expected a number")])
def test_bad_knobs_are_named_by_the_registry(text: str, words: str) -> None:
    with pytest.raises(KnobError, match=words):
        parse_settings([text])


def test_an_impossible_combination_is_refused() -> None:
    with pytest.raises(KnobError, match="num_heads = 3"):
        manual_proposal(["num_heads=3"], "x", incumbent=INCUMBENT)
