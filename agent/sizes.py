"""Parameters, bytes and time of a configuration, estimated from its knobs alone. Torch-free.

The counts follow the challenge's model (token embedding, GQA attention without biases, two-matrix MLP,
U-Net skips) and the techniques' own small tensors as the technique catalogue defines them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.knobs import REGISTRY, KnobError, KnobValue

GATE_WINDOW = 12
"""Features that the attention gate and the smear gate look at (catalogue: x[:12])."""


@dataclass(frozen=True)
class Sizes:
    """Parameter counts by part; ``total`` is what the challenge's log calls model_params."""

    embedding: int  # token embedding, and the head when untied
    matrices: int  # 2-D block matrices (attention and MLP): what Muon trains and int8 compresses
    control: int  # scales, gains, mixes, skip weights
    gates: int  # technique gates

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.matrices + self.control + self.gates

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds of the matrix products for one token: block matrices plus the output head."""
        return self.matrices + self._head

    @property
    def _head(self) -> int:
        return self.embedding


def count_parameters(knobs: Mapping[str, Any]) -> Sizes:
    """Count the parameters of resolved ``knobs`` (every knob present).

    Per block with width d, kv width e = d * num_kv_heads / num_heads and hidden width h = mlp_mult * d:
    2dd + 2de (attention), 2dh (MLP), heads + 4d (q_gain, attn_scale, mlp_scale, resid_mix).
    Skips: floor(num_layers / 2) vectors of width d. Challenge defaults give 17,059,912 (challenge_spec).
    """
    d, layers, heads = int(knobs["model_dim"]), int(knobs["num_layers"]), int(knobs["num_heads"])
    kv_width = d // heads * int(knobs["num_kv_heads"])
    hidden = int(knobs["mlp_mult"]) * d
    matrices = layers * (2 * d * d + 2 * d * kv_width + 2 * d * hidden)
    control = layers * (heads + 4 * d) + (layers // 2) * d
    gates = 0
    if knobs.get("attn_out_gate"):
        gates += layers * heads * min(GATE_WINDOW, d)
    if knobs.get("smear_gate"):
        gates += min(GATE_WINDOW, d) + 1
    copies = 1 if knobs["tie_embeddings"] else 2
    return Sizes(copies * int(knobs["vocab_size"]) * d, matrices, control, gates)


def predict_bytes(incumbent: Mapping[str, Any], candidate: Mapping[str, Any], incumbent_bytes: int) -> int:
    """Signed change of the artifact in bytes, at the incumbent's own measured bytes per parameter."""
    old, new = count_parameters(incumbent).total, count_parameters(candidate).total
    return round(incumbent_bytes * (new - old) / old)


def predict_step_time(incumbent: Mapping[str, Any], candidate: Mapping[str, Any]) -> float:
    """Signed change of the step time as a fraction, by matrix multiply-adds per token."""
    old, new = count_parameters(incumbent).flops_per_token, count_parameters(candidate).flops_per_token
    return (new - old) / old


def iso_byte_shapes(
    incumbent: Mapping[str, KnobValue], vary: Sequence[str], tolerance: float = 0.03
) -> Iterator[dict[str, KnobValue]]:
    """Yield changes of ``vary`` (a subset of num_layers, model_dim, mlp_mult) at nearly equal parameters.

    Each yielded change differs from the incumbent in at least two knobs' worth of shape (or one, where
    one alone stays inside the tolerance), is a valid configuration, and has a parameter count within
    ``tolerance`` (a fraction) of the incumbent's. Smallest steps come first.
    """
    base = count_parameters(incumbent).total
    layers, width, mult = (int(incumbent[n]) for n in ("num_layers", "model_dim", "mlp_mult"))
    grain = 2 * int(incumbent["num_heads"])
    layer_range = range(max(1, layers // 2), layers * 2 + 1) if "num_layers" in vary else (layers,)
    mult_range = range(1, 5) if "mlp_mult" in vary else (mult,)
    low, high = int(width * 0.6) // grain * grain, int(width * 1.6)
    width_range = range(max(grain, low), high + 1, grain) if "model_dim" in vary else (width,)
    found: list[tuple[float, dict[str, KnobValue]]] = []
    for n in layer_range:
        for m in mult_range:
            fits = [(abs(_total(incumbent, n, w, m) / base - 1), w) for w in width_range]
            miss, w = min(fits)  # the width that lands closest, one per depth and MLP multiple
            change: dict[str, KnobValue] = {
                k: v for k, v in (("num_layers", n), ("model_dim", w), ("mlp_mult", m)) if v != incumbent[k]
            }
            if miss > tolerance or not change or not _valid(incumbent, change):
                continue
            found.append((abs(n - layers) / layers + abs(m - mult) / mult, change))
    found.sort(key=lambda f: (f[0], sorted(f[1].items())))
    yield from (change for _, change in found)


def _total(incumbent: Mapping[str, Any], layers: int, width: int, mult: int) -> int:
    shape = {"num_layers": layers, "model_dim": width, "mlp_mult": mult}
    return count_parameters({**incumbent, **shape}).total


def _valid(incumbent: Mapping[str, KnobValue], change: Mapping[str, KnobValue]) -> bool:
    try:
        REGISTRY.resolve({**incumbent, **change})
    except KnobError:
        return False
    return True
