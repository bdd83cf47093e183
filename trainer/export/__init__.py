"""Export: quantise, compress, write; read back. Names are loaded on first use.

Importing this package imports no torch, so that ``trainer.export.codesize`` and
``trainer.export.policy`` stay within reach of the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.export.errors import ArtifactError, ExportError, NonFiniteTensorError

if TYPE_CHECKING:
    from trainer.export.artifact import ExportInfo, TensorInfo, encode_state, export_model, load_artifact

__all__ = [
    "ArtifactError", "ExportError", "ExportInfo", "NonFiniteTensorError", "TensorInfo", "encode_state",
    "export_model", "load_artifact",
]


def __getattr__(name: str) -> Any:
    """Fetch a public name from ``trainer.export.artifact`` (which imports torch) when first asked for."""
    if name in __all__:
        from trainer.export import artifact

        return getattr(artifact, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
