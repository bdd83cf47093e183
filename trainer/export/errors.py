"""What can go wrong between a state dict and an artifact, in either direction. Torch-free."""


class ExportError(ValueError):
    """A state dict or setting that cannot be exported; the message names the tensor or knob."""


class NonFiniteTensorError(ExportError):
    """A tensor to be exported holds NaN or infinity (or would, once rounded to its stored type)."""


class ArtifactError(ValueError):
    """An artifact that cannot be read or rebuilt; the message names what is wrong in it."""
