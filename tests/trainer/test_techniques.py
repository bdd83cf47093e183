"""One contract for every technique: off is absent, on is trainable, and nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer import model_reference as ref
from trainer.knobs import REGISTRY, KnobValue
from trainer.model.gpt import GPT, build_model
from trainer.model.sites import BOS_ID, ModelShape, Place, Plan, StepView, Technique
from trainer.optim.groups import Optimizers
from trainer.techniques import TECHNIQUES, ema_decay, mlp_neg_slope, smear_gate
from trainer.train import Trainer

ON: dict[str, KnobValue] = {"mlp_neg_slope": 0.5, "muon_wd": 0.1, "ema_decay": 0.5}
"""A telling value of each knob that is not a switch."""
each = pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)


class Batches:
    """The reference's made-up batches, as a loader."""

    def __init__(self, knobs: dict[str, Any]) -> None:
        self.knobs, self.at = knobs, 0

    def next(self) -> Any:
        x, y = ref.made_up_batch(self.knobs, self.at)
        self.at += 1
        return x.numpy().copy(), y.numpy().copy()

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def knobs_with(*on: Technique, **change: Any) -> dict[str, Any]:
    values = {t.name: ON.get(t.name, True) for t in on}
    return REGISTRY.resolve(ref.SMALL, values, change)


def trainer(*on: Technique, **change: Any) -> Trainer:
    knobs = knobs_with(*on, **change)
    return Trainer(knobs, 1, Batches(knobs), torch.device("cpu"))


def started(knobs: dict[str, Any]) -> GPT:
    model = build_model(knobs)
    model.init_weights(1)
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


@each
def test_off_is_the_plain_model_bitwise(technique: Technique, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the technique in the registry but off, and with no registry at all: the same bits."""
    off = trainer()
    monkeypatch.setattr("trainer.model.gpt.TECHNIQUES", ())
    monkeypatch.setattr("trainer.train.TECHNIQUES", ())
    plain = trainer()
    assert same(off.model.state_dict(), plain.model.state_dict())
    for _ in range(2):
        assert torch.equal(off.step(0.0), plain.step(0.0))
    assert same(off.final_weights(), plain.final_weights())
    assert not technique.is_on(knobs_with())


@each
def test_on_leaves_every_other_start_alone(technique: Technique) -> None:
    plain, on = started(knobs_with()).state_dict(), started(knobs_with(technique)).state_dict()
    assert all(torch.equal(on[name], plain[name]) for name in plain)
    assert all(technique.name in name for name in set(on) - set(plain))


@each
def test_on_trains_and_reaches_every_new_parameter(technique: Technique) -> None:
    on = trainer(technique)
    reached: set[str] = set()
    before = {n: p.detach().clone() for n, p in on.named.items()}
    for _ in range(4):  # zero-initialised factors let each other's gradient through one step later
        assert torch.isfinite(on.step(0.0))
        reached |= {n for n, p in on.named.items() if not torch.equal(p, before[n])}
    assert reached == set(on.named)
    assert all(torch.isfinite(w).all() for w in on.final_weights().values())
    assert on.final_weights().keys() == on.model.state_dict().keys()


@each
def test_on_makes_a_difference(technique: Technique) -> None:
    plain, on = trainer(), trainer(technique)
    for _ in range(4):
        plain.step(0.0)
        on.step(0.0)
    shared = plain.final_weights()
    assert any(not torch.equal(on.final_weights()[n], shared[n]) for n in shared)


@each
def test_on_sees_no_later_position(technique: Technique) -> None:
    model = trained(technique)
    ids, _ = ref.made_up_batch(ref.SMALL, 0)
    other = ids.clone()
    other[:, 9:] = BOS_ID
    with torch.no_grad():
        assert torch.equal(model.logits(ids)[:, :9], model.logits(other)[:, :9])


@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if t.hooks or t.slots], ids=lambda t: t.name)
def test_on_is_one_graph(technique: Technique) -> None:
    torch._dynamo.reset()
    model = trained(technique)
    ids, targets = ref.made_up_batch(ref.SMALL, 0)
    want = model(ids, targets)
    have = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)(ids, targets)
    torch.testing.assert_close(have, want, rtol=1e-6, atol=0)


@each
def test_training_state_continues_bitwise(technique: Technique) -> None:
    whole, half = trainer(technique), trainer(technique)
    for _ in range(2):
        whole.step(0.0)
    state = whole.training_state()
    half.load_training_state(state)
    for _ in range(2):
        assert torch.equal(whole.step(0.0), half.step(0.0))
    assert same(whole.final_weights(), half.final_weights())


@pytest.mark.parametrize("tied", [True, False])
def test_all_at_once(tied: bool) -> None:
    on = trainer(*TECHNIQUES, tie_embeddings=tied)
    assert all(torch.isfinite(on.step(0.0)) for _ in range(3))


def trained(*on: Technique) -> GPT:
    """A model with every parameter away from its start."""
    t = trainer(*on)
    for _ in range(3):
        t.step(0.0)
    return t.model


def test_two_fillers_of_one_slot_are_refused() -> None:
    twin = Technique(name="resid_norm", slots=mlp_neg_slope.TECHNIQUE.slots)
    knobs = knobs_with(mlp_neg_slope.TECHNIQUE, resid_norm=True)
    plan = Plan([mlp_neg_slope.TECHNIQUE, twin], knobs, ModelShape.from_knobs(knobs))
    with pytest.raises(ValueError, match="mlp_neg_slope and resid_norm"):
        plan.slot("mlp_activation", lambda place: torch.nn.Identity())


def test_a_builder_may_leave_layers_out() -> None:
    def last_only(place: Place) -> torch.nn.Module | None:
        return torch.nn.Identity() if place.layer == place.shape.num_layers - 1 else None

    knobs = knobs_with(resid_norm=True)
    plan = Plan([Technique(name="resid_norm", hooks={"residual": last_only})], knobs, ModelShape.from_knobs(knobs))
    assert [len(plan.site("residual", layer)) for layer in range(3)] == [0, 0, 1]


def test_smear_gate_is_its_formula_and_stops_at_documents() -> None:
    gate = smear_gate.SmearGate(12)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 6, 16, generator=g), torch.randn(12, generator=g)
    with torch.no_grad():
        gate.weight.copy_(w)
        gate.lam.fill_(0.7)
    ids = torch.tensor([[5, 6, BOS_ID, 7, 8, 9], [BOS_ID, BOS_ID, 5, 5, 5, 5]])
    context: Any = type("Ids", (), {"ids": ids})()
    have = gate(x, context)
    for b in range(2):
        for t in range(6):
            want = x[b, t]
            if t and ids[b, t] != BOS_ID:
                want = want + 0.7 * torch.sigmoid(w @ x[b, t, :12]) * x[b, t - 1]
            torch.testing.assert_close(have[b, t], want)


def test_gates_ask_for_full_precision_in_the_artifact() -> None:
    on = trainer(*TECHNIQUES)
    gates = {n for n in on.named if "_gate." in n}
    assert len(gates) == 2 + 3  # smear_gate's two, attn_out_gate's one a layer
    assert gates <= set(on.control_names())
    assert "blocks.0.attn_scale" in on.control_names() and "tok_emb.weight" not in on.control_names()


def test_attn_out_gate_of_zero_is_one_and_saturates_at_two() -> None:
    knobs = knobs_with(attn_out_gate=True)
    model, plain = started(knobs), started(knobs_with())
    ids, _ = ref.made_up_batch(ref.SMALL, 0)
    assert torch.equal(model.logits(ids), plain.logits(ids))
    gate: Any = model.get_submodule("blocks.0.attn.at_attn_out.attn_out_gate")
    context: Any = type("H", (), {"h": torch.ones(1, 1, 12)})()
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([-100.0, 0.0, 0.1, 100.0])[:, None].expand(4, 12))
    have = gate(torch.ones(1, 1, 4, 1), context).flatten()
    want = torch.tensor([0.0, 1.0, 2 / (1 + torch.e**-1.2), 2.0])
    torch.testing.assert_close(have, want)


def test_leaky_relu_squared() -> None:
    act = mlp_neg_slope.LeakyReluSquared(0.5)
    torch.testing.assert_close(act(torch.tensor([-2.0, 0.0, 3.0])), torch.tensor([1.0, 0.0, 9.0]))


def test_weight_decay_shrinks_matrices_by_rate_times_decay() -> None:
    knobs = knobs_with()
    model = started(knobs)
    optimizers = Optimizers(model, knobs)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    hook = next(t for t in TECHNIQUES if t.name == "muon_wd").train
    assert hook is not None
    view = StepView(0, 0.0, optimizers.rates(0.5), optimizers.groups, dict(model.named_parameters()))
    hook(knobs_with(muon_wd=2.0)).before_update(view)
    matrices = {id(p) for p in optimizers.groups["matrix"]}
    factor = 1 - 0.5 * float(knobs["matrix_lr"]) * 2.0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (factor if id(p) in matrices else 1.0))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_average_is_the_normalised_exponential_one(decay: float) -> None:
    hook, p = ema_decay.WeightAverage(decay), torch.nn.Parameter(torch.full((3,), 100.0))
    view = StepView(0, 0.0, {}, {}, {"p": p})
    values = [1.0, -2.0, 5.0, 4.0]
    for i, value in enumerate(values):
        with torch.no_grad():
            p.fill_(value)
        hook.after_update(view)
        seen = values[: i + 1]
        share = [decay ** (i - j) for j in range(i + 1)]
        want = sum(a * b for a, b in zip(seen, share, strict=True)) / sum(share)
        average = hook.weights_end({"p": p.detach(), "other": torch.ones(1)})
        torch.testing.assert_close(average["p"], torch.full((3,), want), rtol=1e-4, atol=1e-5)
        assert average["other"].item() == 1.0
