"""A Siamese network on random pairs of images, in the manner of pytorch/examples, siamese_network/main.py.

https://github.com/pytorch/examples/blob/main/siamese_network/main.py
"""

import random

import torch
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset

import pathkernel as pk


class SiameseNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        )
        self.fc = nn.Sequential(nn.Linear(108, 16), nn.ReLU(), nn.Linear(16, 1))
        self.sigmoid = nn.Sigmoid()

    def forward_once(self, x):
        return self.features(x)

    def forward(self, input1, input2):
        output1 = self.forward_once(input1)
        output2 = self.forward_once(input2)
        output = torch.cat((output1, output2), 1)
        return self.sigmoid(self.fc(output))


class Matcher(Dataset):
    """Pairs that are drawn anew whenever an item is asked for: of one digit with an even index, else of two."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.members = [[i for i, label in enumerate(labels.tolist()) if label == digit] for digit in range(10)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        digit = random.randint(0, 9)
        first = random.choice(self.members[digit])
        if index % 2 == 1:
            digit = (digit + random.randint(1, 9)) % 10
        second = random.choice(self.members[digit])
        return self.images[first], self.images[second], torch.tensor(1.0 - index % 2)


def train(model, train_loader, optimizer):
    model.train()
    criterion = nn.BCELoss()
    for images_1, images_2, targets in train_loader:
        optimizer.zero_grad()
        outputs = model(images_1, images_2).squeeze()
        loss = criterion(outputs, targets)
        loss.backward()
        optimizer.step()


def main(epochs=4):
    torch.manual_seed(1)
    random.seed(1)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    train_dataset = Matcher(images[:256], torch.tensor(labels[:256]))
    train_loader = DataLoader(train_dataset, batch_size=32, shuffle=True)

    model = SiameseNetwork()
    optimizer = optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    with pk.KernelRecorder(model, optimizer, data=len(train_dataset), task="regression") as recorder:
        for _ in range(epochs):
            train(model, recorder.track(train_loader, keep=True), optimizer)
            scheduler.step()
    return {model: (images[256:260], images[260:264])}


if __name__ == "__main__":
    main()
