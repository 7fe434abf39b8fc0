"""Ways to compute a tangent kernel at one θ; one file each.

What the author of an engine needs is importable from here, see `Engine`.
"""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.tangent_kernel.engines.engine import Engine as Engine
    from pathkernel.tangent_kernel.engines.jacobian_products import JacobianProducts as JacobianProducts
    from pathkernel.tangent_kernel.engines.projection import Projection as Projection

_HOMES = {
    "Engine": "tangent_kernel.engines.engine",
    "JacobianProducts": "tangent_kernel.engines.jacobian_products",
    "Projection": "tangent_kernel.engines.projection",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
