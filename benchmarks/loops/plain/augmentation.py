"""Images that the Dataset augments at random, a ResNet with BatchNorm, in the manner of kuangliu/pytorch-cifar.

https://github.com/kuangliu/pytorch-cifar/blob/master/main.py and models/resnet.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset


class Augmented(Dataset):
    """Random crops with padding, and random flips."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        padded = F.pad(self.images[i], (1, 1, 1, 1))
        top, left = torch.randint(3, (2,)).tolist()
        image = padded[:, top : top + 8, left : left + 8]
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), self.labels[i]


class BasicBlock(nn.Module):
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.layer1 = BasicBlock(1, 6, 1)
        self.layer2 = BasicBlock(6, 8, 2)
        self.linear = nn.Linear(8, num_classes)

    def forward(self, x):
        out = self.layer2(self.layer1(x))
        return self.linear(out.mean(dim=(2, 3)))


def main(epochs=3):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    trainset = Augmented(images[:256], labels[:256])
    trainloader = DataLoader(trainset, batch_size=32, shuffle=True)

    net = ResNet()
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for epoch in range(epochs):
        net.train()
        train_loss = 0
        for batch_idx, (inputs, targets) in enumerate(trainloader):
            optimizer.zero_grad()
            outputs = net(inputs)
            loss = criterion(outputs, targets)
            loss.backward()
            optimizer.step()
            train_loss += loss.item()
        print(f"epoch {epoch}: loss {train_loss / (batch_idx + 1):.3f}")
        net.eval()
        with torch.no_grad():
            net(images[256:512])
        scheduler.step()
    return {net: images[256:260]}


if __name__ == "__main__":
    main()
