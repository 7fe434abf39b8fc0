"""A regression of skorch with what its documentation gives it: a schedule, clipping and early stopping.

https://skorch.readthedocs.io/en/stable/user/callbacks.html
"""

import numpy as np
import torch
from sklearn.datasets import make_regression
from skorch import NeuralNetRegressor
from skorch.callbacks import EarlyStopping, GradientNormClipping, LRScheduler
from torch import nn


class RegressorModule(nn.Module):
    def __init__(self, num_units=20, nonlin=torch.tanh):
        super().__init__()
        self.dense0 = nn.Linear(20, num_units)
        self.nonlin = nonlin
        self.dense1 = nn.Linear(num_units, 10)
        self.output = nn.Linear(10, 1)

    def forward(self, X):
        X = self.nonlin(self.dense0(X))
        X = torch.tanh(self.dense1(X))
        return self.output(X)


def main(epochs):
    X, y = make_regression(200, 20, n_informative=10, bias=0, random_state=0)
    X, y = X.astype(np.float32), (y.astype(np.float32) / 100).reshape(-1, 1)
    callbacks = [
        ("clip", GradientNormClipping(0.5)),
        ("schedule", LRScheduler("CosineAnnealingLR", T_max=epochs)),
        ("stop", EarlyStopping(patience=5)),
    ]
    net = NeuralNetRegressor(
        RegressorModule,
        max_epochs=epochs,
        lr=0.1,
        optimizer__momentum=0.9,
        batch_size=32,
        callbacks=callbacks,
    )
    net.fit(X, y)
    return {net.module_: torch.from_numpy(X[:4])}


if __name__ == "__main__":
    main(10)
