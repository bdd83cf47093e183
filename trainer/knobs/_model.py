"""Knobs of the plain model's shape and initialisation. Names and defaults are the challenge's."""

from collections.abc import Mapping
from typing import Any

from trainer.knobs._core import Knob, KnobError, check

KNOBS = (
    Knob(name="vocab_size", kind=int, default=1024, low=260, high=65535, role="shape", phase="data",
         doc="Vocabulary of the SentencePiece tokenizer; must equal the data's.", unit="tokens"),
    Knob(name="num_layers", kind=int, default=9, low=1, high=64, role="model", phase="init",
         ladder=(4, 5, 6, 7, 8), doc="Transformer blocks; the first half are U-Net encoders.",
         source="technique catalogue: 10th layer -0.0039 bpb on one H100", cost="bytes and time, linear"),
    Knob(name="model_dim", kind=int, default=512, low=16, high=4096, role="model", phase="init",
         ladder=(96, 112, 128, 144, 160), doc="Width of the residual stream.", unit="features",
         cost="bytes and time, quadratic"),
    Knob(name="num_heads", kind=int, default=8, low=1, high=64, role="model", phase="init",
         ladder=(2, 4, 8), doc="Attention (query) heads; must divide model_dim into even head widths."),
    Knob(name="num_kv_heads", kind=int, default=4, low=1, high=64, role="model", phase="init",
         ladder=(1, 2, 4), doc="Key/value heads (grouped-query attention); must divide num_heads."),
    Knob(name="mlp_mult", kind=int, default=2, low=1, high=8, role="model", phase="init",
         ladder=(1, 2, 3, 4), doc="MLP hidden width as a multiple of model_dim.",
         source="3x: 1.2172 -> 1.1950 pre-quant on 8xH100 with tuning", cost="bytes and time"),
    Knob(name="tie_embeddings", kind=bool, default=True, role="model", phase="init",
         doc="Use the embedding matrix as output head."),
    Knob(name="tied_embed_init_std", kind=float, default=0.005, low=1e-5, high=1.0, role="train", phase="init",
         ladder=(0.0025, 0.005, 0.01, 0.02), doc="Standard deviation of the embedding at initialisation."),
    Knob(name="rope_base", kind=float, default=1e4, low=10, high=1e7, role="model", phase="init",
         ladder=(1e3, 1e4, 5e4), doc="Base of the rotary frequencies.",
         source="50k: raw -0.003, quantised +0.005 bpb on one H100"),
    Knob(name="logit_softcap", kind=float, default=30.0, low=1, high=1000, role="model", phase="init",
         ladder=(15.0, 20.0, 30.0, 50.0), doc="c in c*tanh(z/c) over the logits."),
    Knob(name="qk_gain_init", kind=float, default=1.5, low=0.1, high=20, role="train", phase="init",
         ladder=(1.0, 1.5, 2.25, 3.0, 4.0, 5.0), doc="Initial per-head multiplier of the queries.",
         source="4 -> 5 -> 5.25 monotonic on 8xH100; ternary study best 2.25"),
)


@check
def heads_fit(k: Mapping[str, Any]) -> None:
    """Heads divide the width into even parts and groups of equal size."""
    if k["model_dim"] % k["num_heads"] or (k["model_dim"] // k["num_heads"]) % 2:
        raise KnobError(f"num_heads = {k['num_heads']}: must divide model_dim = {k['model_dim']} into even widths")
    if k["num_heads"] % k["num_kv_heads"]:
        raise KnobError(f"num_kv_heads = {k['num_kv_heads']}: must divide num_heads = {k['num_heads']}")
