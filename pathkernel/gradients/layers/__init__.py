"""Per-sample gradients layer by layer, as activations × back-propagated signals, without forming them.

What the author of a rule for a layer needs is importable from here, see `layer_rule`.
"""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.gradients.layers.factors import Dense as Dense
    from pathkernel.gradients.layers.factors import Factor as Factor
    from pathkernel.gradients.layers.factors import Lookup as Lookup
    from pathkernel.gradients.layers.factors import Outer as Outer
    from pathkernel.gradients.layers.rules import NoRule as NoRule
    from pathkernel.gradients.layers.rules import layer_rule as layer_rule

_HOMES = {
    "Dense": "gradients.layers.factors",
    "Factor": "gradients.layers.factors",
    "Lookup": "gradients.layers.factors",
    "NoRule": "gradients.layers.rules",
    "Outer": "gradients.layers.factors",
    "layer_rule": "gradients.layers.rules",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
