"""The first example of skorch: a classifier that returns probabilities, with dropout.

https://github.com/skorch-dev/skorch#examples
"""

import numpy as np
import torch
from sklearn.datasets import make_classification
from skorch import NeuralNetClassifier
from torch import nn

import pathkernel as pk


class MyModule(nn.Module):
    def __init__(self, num_units=10, nonlin=torch.relu):
        super().__init__()
        self.dense0 = nn.Linear(20, num_units)
        self.nonlin = nonlin
        self.dropout = nn.Dropout(0.5)
        self.dense1 = nn.Linear(num_units, num_units)
        self.output = nn.Linear(num_units, 2)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, X, **kwargs):
        X = self.nonlin(self.dense0(X))
        X = self.dropout(X)
        X = self.nonlin(self.dense1(X))
        return self.softmax(self.output(X))


def main(epochs):
    X, y = make_classification(400, 20, n_informative=10, random_state=0)
    X, y = X.astype(np.float32), y.astype(np.int64)
    callback = pk.callbacks.SkorchRecorder()
    net = NeuralNetClassifier(
        MyModule,
        max_epochs=epochs,
        lr=0.1,
        iterator_train__shuffle=True,
        callbacks=[callback],
    )
    net.fit(X, y)
    y_proba = net.predict_proba(X)
    assert y_proba.shape == (400, 2)
    return {net.module_: torch.from_numpy(X[:4])}


if __name__ == "__main__":
    main(10)
