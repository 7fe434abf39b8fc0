"""Per-sample gradients layer by layer, as activations × back-propagated signals, without forming them.

What the author of a rule for a layer needs is importable from here, see `layer_rule`.
"""

from pathkernel.runtime.lazy import lazy_names

_HOMES = {
    "Dense": "gradients.layers.factors",
    "Factor": "gradients.layers.factors",
    "Lookup": "gradients.layers.factors",
    "NoRule": "gradients.layers.rules",
    "Outer": "gradients.layers.factors",
    "layer_rule": "gradients.layers.rules",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
