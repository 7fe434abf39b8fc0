"""The image classifier of Fabric's examples: a convolutional network with dropout, a schedule, a test in each epoch.

https://github.com/Lightning-AI/pytorch-lightning/blob/master/examples/fabric/image_classifier/train_fabric.py
"""

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric, seed_everything
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(54, 24)
        self.dropout2 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(24, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = torch.flatten(self.dropout1(x), 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


def main(epochs):
    fabric = Fabric(accelerator="cpu", devices=1)
    seed_everything(1, verbose=False)
    images, labels = load_digits(return_X_y=True)
    X, y = torch.tensor(images / 16, dtype=torch.float32)[:, None].reshape(-1, 1, 8, 8), torch.tensor(labels)
    train_dataset, test_dataset = TensorDataset(X[:192], y[:192]), TensorDataset(X[192:256], y[192:256])
    train_loader = DataLoader(train_dataset, batch_size=32, shuffle=True)
    test_loader = DataLoader(test_dataset, batch_size=32)
    train_loader, test_loader = fabric.setup_dataloaders(train_loader, test_loader)
    model = Net()
    optimizer = optim.Adadelta(model.parameters(), lr=1.0)
    model, optimizer = fabric.setup(model, optimizer)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    with pk.KernelRecorder(model, optimizer, nn.NLLLoss(), data=train_dataset) as recorder:
        for _ in range(epochs):
            model.train()
            for data, target in recorder.track(train_loader):
                optimizer.zero_grad()
                output = model(data)
                loss = F.nll_loss(output, target)
                fabric.backward(loss)
                optimizer.step()
            scheduler.step()
            model.eval()
            correct = 0
            with torch.no_grad():
                for data, target in test_loader:
                    correct += int((model(data).argmax(dim=1) == target).sum())
    return {model.module: X[:4]}


if __name__ == "__main__":
    main(4)
