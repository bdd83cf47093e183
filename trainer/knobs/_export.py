"""Knobs of the export: quantiser, container, compressor."""

from trainer.knobs._core import Knob

KNOBS = (
    Knob(name="int8_clip_quantile", kind=float, default=0.9999984, low=0.5, high=1.0, role="export", phase="export",
         ladder=(0.999, 0.9999, 0.99999, 0.9999984, 1.0), doc="Per-row clip quantile of |w| before int8.",
         source="challenge; seeds: nudges had little material benefit"),
    Knob(name="keep_float_max_numel", kind=int, default=65536, low=0, high=2**31, role="shape", phase="export",
         doc="Tensors of at most this many elements stay float (fp32 if control tensors, else fp16).",
         unit="elements"),
    Knob(name="compressor", kind=str, default="zstd", choices=("zstd", "zlib"), role="export", phase="export",
         ladder=("zstd", "zlib"), doc="Compressor of the artifact: zstd level 22, or the challenge's zlib level 9.",
         source="zstd-22: about 5% smaller"),
    Knob(name="container", kind=str, default="flat", choices=("flat", "challenge"), role="export", phase="export",
         doc="flat: JSON header + raw tensors. challenge: a torch.save'd int8_clean_per_row_v1 object."),
)
