"""Gradients that are accumulated over batches, and training that goes on, as the documentation of skorch has them.

https://skorch.readthedocs.io/en/stable/user/FAQ.html#how-do-i-use-gradient-accumulation
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn

ACC_STEPS = 2  # number of steps to accumulate before updating weights


class GradAccNet(NeuralNetClassifier):
    """Net that accumulates gradients"""

    def __init__(self, *args, acc_steps=ACC_STEPS, **kwargs):
        super().__init__(*args, **kwargs)
        self.acc_steps = acc_steps

    def get_loss(self, *args, **kwargs):
        loss = super().get_loss(*args, **kwargs)
        return loss / self.acc_steps  # normalize loss

    def train_step(self, batch, **fit_params):
        """Perform gradient accumulation

        Only optimize every 2nd batch.

        """
        # note that n_train_batches starts at 1 for each epoch
        n_train_batches = len(self.history[-1, "batches"])
        step = self.train_step_single(batch, **fit_params)
        if n_train_batches % self.acc_steps == 0:
            self.optimizer_.step()
            self.optimizer_.zero_grad()
        return step


def main(epochs):
    X, y = load_digits(n_class=4, return_X_y=True)
    X, y = (X[:256] / 16).astype(np.float32), y[:256].astype(np.int64)
    net = GradAccNet(
        nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 4)),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=0.01,
        batch_size=16,
        max_epochs=epochs,
        train_split=None,
    )
    net.fit(X, y)
    net.partial_fit(X, y)
    return {net.module_: torch.from_numpy(X[:4])}


if __name__ == "__main__":
    main(3)
