"""The same networks under captum and dattri, which have to be installed in the environment that runs this.

Regularisations follow one rule that sees no network that was trained again: for TRAK the mean of the squared lengths of
the projected gradients, for Hessians a tenth of the mean eigenvalue of the Gauss–Newton matrix. At its default of 0
dattri's TRAK is a row of its own.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _attribution_methods import LOSS, Trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk
from pathkernel.influence.checkpoint_scores import DAMPING, GaussNewton

PROJECTION = 512
ENSEMBLE = 10


def loaders(trained: Trained) -> tuple[DataLoader, DataLoader]:
    whole = [DataLoader(TensorDataset(X.float(), y), batch_size=len(y)) for X, y in (trained.samples, trained.queries)]
    return whole[0], whole[1]


def in_float32(trained: Trained) -> nn.Module:
    """A copy: both libraries make some of their tensors in torch's default type."""
    return copy.deepcopy(trained.model).float().eval()


def captum_tracincp(trained: Trained) -> Any:
    from captum.influence import TracInCP

    model = in_float32(trained)
    rate = trained.case.settings["lr"]

    def load(module: nn.Module, state: dict[str, Tensor]) -> float:
        module.load_state_dict({name: value.float() for name, value in state.items()})
        return rate

    X, y = trained.samples
    data = TensorDataset(X.float(), y)
    losses = nn.CrossEntropyLoss(reduction="none")
    return TracInCP(model, data, list(trained.checkpoints), load, loss_fn=losses, batch_size=256)


def captum_scores(trained: Trained) -> np.ndarray:
    X, y = trained.queries
    return captum_tracincp(trained).influence((X.float(), y)).double().numpy()


def captum_self_influence(trained: Trained) -> np.ndarray:
    return captum_tracincp(trained).self_influence().double().numpy()


def _task(trained: Trained, checkpoints: Any, margins: bool) -> Any:
    from dattri.task import AttributionTask

    model = in_float32(trained)

    def logits(parameters: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, x)

    def loss(parameters: Any, data: Any) -> Tensor:
        x, y = data
        return LOSS(logits(parameters, x), y.reshape(-1)) if x.dim() > 1 else LOSS(logits(parameters, x[None]), y[None])

    def margin(parameters: Any, data: Any) -> Tensor:
        log_p = -loss(parameters, data)
        return log_p - torch.log1p(-torch.exp(log_p))

    return AttributionTask(loss_func=margin if margins else loss, model=model, checkpoints=checkpoints), loss


def _trak(trained: Trained, checkpoints: list[dict[str, Tensor]], regularization: float) -> np.ndarray:
    from dattri.algorithm.trak import TRAKAttributor

    states = [{name: value.float() for name, value in state.items()} for state in checkpoints]
    task, loss = _task(trained, states, margins=True)
    attributor = TRAKAttributor(
        task=task,
        correct_probability_func=lambda parameters, data: torch.exp(-loss(parameters, data)),
        projector_kwargs={"proj_dim": PROJECTION, "device": "cpu", "proj_seed": 0},
        regularization=regularization,
    )
    train, test = loaders(trained)
    attributor.cache(train)
    with torch.no_grad():
        return attributor.attribute(test).T.double().numpy()


def _mean_length(trained: Trained) -> float:
    """Mean squared length of a projected gradient, as dattri scales it: a projection keeps lengths."""
    kernel = pk.TangentKernel(trained.model, outputs="margin")
    return float(kernel.diagonal(trained.samples).mean() / kernel.function.layout.size)


def trak(networks: int, regularized: bool) -> Callable[[Trained], np.ndarray]:
    def scores(trained: Trained) -> np.ndarray:
        ridge = _mean_length(trained) if regularized else 0.0
        return _trak(trained, [trained.model.state_dict(), *trained.others(networks - 1)], ridge)

    return scores


def _damping(trained: Trained) -> float:
    kernel = pk.TangentKernel(trained.model, outputs="loss", loss=LOSS)
    matrix = GaussNewton(kernel.function, kernel.theta, *kernel._samples(trained.samples), kernel.selection.function)
    return DAMPING * matrix.mean_eigenvalue()


def dattri_hessian(name: str, damping: str, **settings: Any) -> Callable[[Trained], np.ndarray]:
    def scores(trained: Trained) -> np.ndarray:
        from dattri.algorithm import influence_function

        task, _ = _task(trained, [{k: v.float() for k, v in trained.model.state_dict().items()}], margins=False)
        attributor = getattr(influence_function, name)(task=task, **settings, **{damping: _damping(trained)})
        train, test = loaders(trained)
        attributor.cache(train)
        with torch.no_grad():
            found = attributor.attribute(train, test)
        return found.T.double().numpy()

    return scores


SCORES = {
    "captum TracInCP": captum_scores,
    "dattri TRAK-1": trak(1, regularized=True),
    "dattri TRAK-10": trak(ENSEMBLE, regularized=True),
    "dattri TRAK-1, default": trak(1, regularized=False),
    "dattri IF-CG": dattri_hessian("IFAttributorCG", "regularization", max_iter=20),
    "dattri EK-FAC": dattri_hessian("IFAttributorEKFAC", "damping"),
}
SUSPICIONS = {"captum TracInCP": captum_self_influence}


def missing() -> str | None:
    """What of both is not installed."""
    lacking = [name for name in ("captum", "dattri") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacking)} cannot be imported" if lacking else None


def judged_by_dattri(scores: np.ndarray, subsets: np.ndarray, outputs: np.ndarray) -> float:
    """Mean LDS by dattri's own metric code, over the queries whose scores are not all the same."""
    from dattri.metric import lds

    from pathkernel.analysis.evaluation_interfaces import dattri_lds

    return float(lds(*dattri_lds(scores, subsets, outputs))[0].nanmean())
