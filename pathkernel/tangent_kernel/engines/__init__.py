"""Ways to compute a tangent kernel at one θ; one file each.

What the author of an engine needs is importable from here, see `Engine`.
"""

from pathkernel.runtime.lazy import lazy_names

_HOMES = {
    "Engine": "tangent_kernel.engines.engine",
    "JacobianProducts": "tangent_kernel.engines.jacobian_products",
    "Projection": "tangent_kernel.engines.projection",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
