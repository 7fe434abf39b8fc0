"""Pictures of kernels and attributions: Display objects in scikit-learn's manner, and the report page."""

from pathkernel.runtime.extras import require_extra
from pathkernel.runtime.lazy import lazy_names

require_extra("plot", "`pathkernel.plotting`", "matplotlib", "jinja2")

_HOMES = {
    "AttributionDisplay": "plotting.attribution",
    "CompletenessDisplay": "plotting.completeness",
    "GramDisplay": "plotting.gram",
    "KernelEvolutionDisplay": "plotting.evolution",
    "KeyFigure": "plotting.report",
    "ReportFigure": "plotting.report",
    "Sample": "plotting.attribution",
    "Section": "plotting.report",
    "SpectrumDisplay": "plotting.spectrum",
    "write_report": "plotting.report",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
