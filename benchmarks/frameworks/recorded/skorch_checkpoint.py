"""A binary classifier of skorch that goes back to its best weights, with batch normalisation.

https://skorch.readthedocs.io/en/stable/user/save_load.html
"""

import numpy as np
import torch
from sklearn.datasets import make_moons
from skorch import NeuralNetBinaryClassifier
from skorch.callbacks import Checkpoint
from torch import nn

import pathkernel as pk


class BinaryModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
        )

    def forward(self, X):
        return self.layers(X).squeeze(-1)


def main(epochs):
    X, y = make_moons(200, noise=0.2, random_state=0)
    X, y = X.astype(np.float32), y.astype(np.float32)
    callback = pk.callbacks.SkorchRecorder()
    best = Checkpoint(monitor="valid_loss_best", dirname="best", load_best=True)
    net = NeuralNetBinaryClassifier(
        BinaryModule,
        max_epochs=epochs,
        lr=0.3,
        optimizer=torch.optim.SGD,
        batch_size=32,
        iterator_train__shuffle=True,
        iterator_train__drop_last=True,
        callbacks=[callback, best],
    )
    net.fit(X, y)
    return {net.module_: torch.from_numpy(X[:4])}


if __name__ == "__main__":
    main(8)
