"""Pictures of kernels and attributions: Display objects in scikit-learn's manner, and the report page."""

from typing import TYPE_CHECKING

from pathkernel.runtime.extras import require_extra
from pathkernel.runtime.lazy import lazy_names

require_extra("plot", "`pathkernel.plotting`", "matplotlib", "jinja2")

if TYPE_CHECKING:
    from pathkernel.plotting.attribution import AttributionDisplay as AttributionDisplay
    from pathkernel.plotting.attribution import Sample as Sample
    from pathkernel.plotting.completeness import CompletenessDisplay as CompletenessDisplay
    from pathkernel.plotting.doubtful_labels import DoubtfulLabelsDisplay as DoubtfulLabelsDisplay
    from pathkernel.plotting.evolution import KernelEvolutionDisplay as KernelEvolutionDisplay
    from pathkernel.plotting.flow import EnergyDisplay as EnergyDisplay
    from pathkernel.plotting.flow import FlowDisplay as FlowDisplay
    from pathkernel.plotting.gram import GramDisplay as GramDisplay
    from pathkernel.plotting.ledger import LossLedgerDisplay as LossLedgerDisplay
    from pathkernel.plotting.ledger import RegularizationDisplay as RegularizationDisplay
    from pathkernel.plotting.near_duplicates import NearDuplicatesDisplay as NearDuplicatesDisplay
    from pathkernel.plotting.player import PlayerViewDisplay as PlayerViewDisplay
    from pathkernel.plotting.report import KeyFigure as KeyFigure
    from pathkernel.plotting.report import ReportFigure as ReportFigure
    from pathkernel.plotting.report import Section as Section
    from pathkernel.plotting.report import write_report as write_report
    from pathkernel.plotting.share_map import ShareMapDisplay as ShareMapDisplay
    from pathkernel.plotting.spectrum import SpectrumDisplay as SpectrumDisplay
    from pathkernel.plotting.stability import StabilityDisplay as StabilityDisplay
    from pathkernel.plotting.vector_field import DiracGANDisplay as DiracGANDisplay
    from pathkernel.plotting.vector_field import VectorFieldDisplay as VectorFieldDisplay

_HOMES = {
    "AttributionDisplay": "plotting.attribution",
    "CompletenessDisplay": "plotting.completeness",
    "DiracGANDisplay": "plotting.vector_field",
    "DoubtfulLabelsDisplay": "plotting.doubtful_labels",
    "EnergyDisplay": "plotting.flow",
    "FlowDisplay": "plotting.flow",
    "GramDisplay": "plotting.gram",
    "KernelEvolutionDisplay": "plotting.evolution",
    "KeyFigure": "plotting.report",
    "LossLedgerDisplay": "plotting.ledger",
    "NearDuplicatesDisplay": "plotting.near_duplicates",
    "PlayerViewDisplay": "plotting.player",
    "RegularizationDisplay": "plotting.ledger",
    "ReportFigure": "plotting.report",
    "Sample": "plotting.attribution",
    "Section": "plotting.report",
    "ShareMapDisplay": "plotting.share_map",
    "SpectrumDisplay": "plotting.spectrum",
    "StabilityDisplay": "plotting.stability",
    "VectorFieldDisplay": "plotting.vector_field",
    "write_report": "plotting.report",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
