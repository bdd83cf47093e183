"""Every knob, declared once. ``REGISTRY`` is the only registry; import it from here. Torch-free."""

from trainer.knobs import _export, _model, _techniques, _train
from trainer.knobs._core import Knob, KnobError, KnobValue, Registry

REGISTRY = Registry([*_model.KNOBS, *_train.KNOBS, *_techniques.KNOBS, *_export.KNOBS])

__all__ = ["REGISTRY", "Knob", "KnobError", "KnobValue", "Registry"]
