"""Parameter counts against the challenge's figure, a hand-written inventory, and laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sizes import count_parameters, iso_byte_shapes, predict_bytes, predict_step_time
from tests.agent.support import POCKET
from trainer.knobs import REGISTRY


def inventory(k: dict) -> dict[str, int]:
    """Every tensor of the challenge's model by name and element count, listed one by one (independent)."""
    d, heads = k["model_dim"], k["num_heads"]
    head = d // heads
    out = {"tok_emb.weight": k["vocab_size"] * d}
    encoders = k["num_layers"] // 2
    decoders = k["num_layers"] - encoders
    out["skip_weights"] = min(encoders, decoders) * d
    for n in range(k["num_layers"]):
        b = f"blocks.{n}."
        out |= {b + "attn_scale": d, b + "mlp_scale": d, b + "resid_mix": 2 * d, b + "attn.q_gain": heads}
        out |= {b + "attn.c_q": d * d, b + "attn.proj": d * d}
        out |= {b + "attn.c_k": d * head * k["num_kv_heads"], b + "attn.c_v": d * head * k["num_kv_heads"]}
        out |= {b + "mlp.fc": d * d * k["mlp_mult"], b + "mlp.proj": d * d * k["mlp_mult"]}
        if k["attn_out_gate"]:
            out[b + "gate"] = heads * 12
    if not k["tie_embeddings"]:
        out["lm_head"] = k["vocab_size"] * d
    if k["smear_gate"]:
        out["smear"] = 12 + 1
    return out


def test_the_challenge_default_has_17059912_parameters() -> None:
    assert count_parameters(REGISTRY.defaults()).total == 17_059_912


shapes = st.builds(
    lambda layers, heads, group, width, mult, tied, gate, smear: {
        "num_layers": layers, "num_heads": heads * group, "num_kv_heads": heads,
        "model_dim": 2 * width * heads * group, "mlp_mult": mult, "tie_embeddings": tied,
        "attn_out_gate": gate, "smear_gate": smear,
    },
    st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(8, 20), st.integers(1, 4),
    st.booleans(), st.booleans(), st.booleans(),
)


@given(shapes)
def test_the_count_agrees_with_a_tensor_by_tensor_inventory(shape: dict) -> None:
    knobs = REGISTRY.resolve(shape)
    assert count_parameters(knobs).total == sum(inventory(knobs).values())


@pytest.mark.parametrize("gates", [{}, {"attn_out_gate": True, "smear_gate": True}])
def test_the_count_agrees_with_the_model_itself(gates: dict) -> None:
    gpt = pytest.importorskip("trainer.model.gpt", reason="the model is not built yet")
    knobs = REGISTRY.resolve(POCKET, gates)
    model = gpt.build_model(knobs)
    assert count_parameters(knobs).total == sum(p.numel() for p in model.parameters())


@given(shapes)
def test_iso_byte_shapes_are_valid_different_and_within_three_percent(shape: dict) -> None:
    incumbent = REGISTRY.resolve(shape)
    base = count_parameters(incumbent).total
    seen = set()
    for change in iso_byte_shapes(incumbent, ("num_layers", "model_dim", "mlp_mult")):
        candidate = REGISTRY.resolve(incumbent, change)
        assert abs(count_parameters(candidate).total - base) <= 0.03 * base
        assert all(incumbent[k] != v for k, v in change.items())
        assert change and set(change) <= {"num_layers", "model_dim", "mlp_mult"}
        seen.add(tuple(sorted(change.items())))
    assert len(seen) == len(list(iso_byte_shapes(incumbent, ("num_layers", "model_dim", "mlp_mult"))))


def test_only_the_named_knobs_are_varied() -> None:
    incumbent = REGISTRY.resolve(POCKET)
    changes = list(iso_byte_shapes(incumbent, ("num_layers", "model_dim")))
    assert changes and all("mlp_mult" not in c for c in changes)


def test_bytes_follow_parameters_and_deeper_is_slower() -> None:
    small, large = REGISTRY.resolve(POCKET), REGISTRY.resolve(POCKET, {"num_layers": 6})
    grown = count_parameters(large).total / count_parameters(small).total
    assert predict_bytes(small, large, 500_000) == pytest.approx(500_000 * (grown - 1), abs=1)
    assert predict_bytes(large, small, 500_000) < 0 < predict_step_time(small, large)
    assert predict_step_time(small, small) == 0
