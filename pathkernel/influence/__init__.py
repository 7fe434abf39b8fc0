"""Questions about training samples: is a label wrong, and what would training again say without some of them."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.influence.datamodels import Datamodel as Datamodel
    from pathkernel.influence.datamodels import datamodel as datamodel
    from pathkernel.influence.labels import LabelQuality as LabelQuality
    from pathkernel.influence.labels import label_quality as label_quality

_HOMES = {
    "Datamodel": "influence.datamodels",
    "LabelQuality": "influence.labels",
    "datamodel": "influence.datamodels",
    "label_quality": "influence.labels",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
