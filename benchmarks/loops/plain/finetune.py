"""A backbone that SGD moves and a new head that AdamW moves, in the manner of PyTorch's transfer learning tutorial.

https://pytorch.org/tutorials/beginner/transfer_learning_tutorial.html
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        )
        self.fc = nn.Linear(72, classes)

    def forward(self, x):
        return self.fc(self.backbone(x))


def main(num_epochs=4):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    parts = {"train": slice(0, 256), "val": slice(256, 400)}
    image_datasets = {x: TensorDataset(images[part], labels[part]) for x, part in parts.items()}
    dataloaders = {x: DataLoader(image_datasets[x], batch_size=32, shuffle=x == "train") for x in parts}

    model = Net(5)
    model.fc = nn.Linear(72, 10)
    criterion = nn.CrossEntropyLoss()
    optimizer_ft = optim.SGD(model.backbone.parameters(), lr=0.01, momentum=0.9)
    optimizer_head = optim.AdamW(model.fc.parameters(), lr=3e-3)
    scheduler = optim.lr_scheduler.StepLR(optimizer_ft, step_size=2, gamma=0.1)

    best_model_wts, best_acc = copy.deepcopy(model.state_dict()), 0.0
    for _ in range(num_epochs):
        for phase in ["train", "val"]:
            model.train(phase == "train")
            running_corrects = 0
            for inputs, target in dataloaders[phase]:
                optimizer_ft.zero_grad()
                optimizer_head.zero_grad()
                with torch.set_grad_enabled(phase == "train"):
                    outputs = model(inputs)
                    loss = criterion(outputs, target)
                    if phase == "train":
                        loss.backward()
                        optimizer_ft.step()
                        optimizer_head.step()
                running_corrects += torch.sum(outputs.argmax(1) == target).item()
            if phase == "train":
                scheduler.step()
            elif running_corrects > best_acc:
                best_model_wts, best_acc = copy.deepcopy(model.state_dict()), running_corrects
    print(f"{best_acc / 144:.0%} right; {len(best_model_wts)} tensors kept")
    model.eval()
    return {model: images[400:404]}


if __name__ == "__main__":
    main()
