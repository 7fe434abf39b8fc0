"""Mixup, in the manner of facebookresearch/mixup-cifar10, train.py, whose `mixup_data` is written out in the loop.

https://github.com/facebookresearch/mixup-cifar10/blob/main/train.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset


def mixup_criterion(criterion, pred, y_a, y_b, lam):
    return lam * criterion(pred, y_a) + (1 - lam) * criterion(pred, y_b)


def adjust_learning_rate(optimizer, epoch):
    """The learning rate is divided by 10 for the last epochs."""
    for param_group in optimizer.param_groups:
        param_group["lr"] = 0.1 if epoch < 3 else 0.01


def main(epochs=4, alpha=1.0):
    torch.manual_seed(0)
    np.random.seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    trainset = TensorDataset(images[:320], torch.tensor(labels[:320]))
    trainloader = DataLoader(trainset, batch_size=32, shuffle=True)

    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 10),
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for epoch in range(epochs):
        adjust_learning_rate(optimizer, epoch)
        net.train()
        for inputs, targets in trainloader:
            lam = np.random.beta(alpha, alpha)
            index = torch.randperm(len(targets))
            mixed = lam * inputs + (1 - lam) * inputs[index]
            outputs = net(mixed)
            loss = mixup_criterion(criterion, outputs, targets, targets[index], lam)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {net: images[320:324]}


if __name__ == "__main__":
    main()
