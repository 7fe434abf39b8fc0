"""A pipeline and a grid search of scikit-learn, as the README of skorch has them.

https://github.com/skorch-dev/skorch#examples
"""

import numpy as np
import torch
from sklearn.datasets import make_classification
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

import pathkernel as pk


class MyModule(nn.Module):
    def __init__(self, num_units=10, nonlin=torch.relu):
        super().__init__()
        self.dense0 = nn.Linear(20, num_units)
        self.nonlin = nonlin
        self.output = nn.Linear(num_units, 2)

    def forward(self, X):
        return self.output(self.nonlin(self.dense0(X)))


def main(epochs):
    X, y = make_classification(200, 20, n_informative=10, random_state=0)
    X, y = X.astype(np.float32), y.astype(np.int64)
    net = NeuralNetClassifier(
        MyModule,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        max_epochs=epochs,
        verbose=0,
        train_split=False,
        callbacks=[pk.callbacks.SkorchRecorder()],
    )
    pipe = Pipeline([("scale", StandardScaler()), ("net", net)])
    params = {"net__lr": [0.01, 0.02], "net__module__num_units": [10, 20]}
    gs = GridSearchCV(pipe, params, cv=2, scoring="accuracy")
    gs.fit(X, y)
    best = gs.best_estimator_
    return {best["net"].module_: torch.from_numpy(best[:-1].transform(X[:4]))}


if __name__ == "__main__":
    main(4)
