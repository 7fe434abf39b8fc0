"""Questions about samples: wrong labels, copies, what training without some would say, which to keep or to add."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.influence.active_learning import Acquisition as Acquisition
    from pathkernel.influence.active_learning import label_next as label_next
    from pathkernel.influence.checkpoint_scores import influence_function_scores as influence_function_scores
    from pathkernel.influence.checkpoint_scores import tracin_scores as tracin_scores
    from pathkernel.influence.checkpoint_scores import trak_scores as trak_scores
    from pathkernel.influence.datamodels import Datamodel as Datamodel
    from pathkernel.influence.datamodels import datamodel as datamodel
    from pathkernel.influence.duplicates import NearDuplicates as NearDuplicates
    from pathkernel.influence.duplicates import near_duplicates as near_duplicates
    from pathkernel.influence.labels import LabelQuality as LabelQuality
    from pathkernel.influence.labels import label_quality as label_quality
    from pathkernel.influence.pruning import Coreset as Coreset
    from pathkernel.influence.pruning import prune as prune
    from pathkernel.influence.retraining import retrain as retrain

_HOMES = {
    "Acquisition": "influence.active_learning",
    "Coreset": "influence.pruning",
    "Datamodel": "influence.datamodels",
    "LabelQuality": "influence.labels",
    "NearDuplicates": "influence.duplicates",
    "datamodel": "influence.datamodels",
    "influence_function_scores": "influence.checkpoint_scores",
    "label_next": "influence.active_learning",
    "label_quality": "influence.labels",
    "near_duplicates": "influence.duplicates",
    "prune": "influence.pruning",
    "retrain": "influence.retraining",
    "tracin_scores": "influence.checkpoint_scores",
    "trak_scores": "influence.checkpoint_scores",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
