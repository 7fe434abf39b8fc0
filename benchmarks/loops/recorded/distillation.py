"""Distillation from a live teacher, the running average of the student, in the manner of CuriousAI/mean-teacher.

https://github.com/CuriousAI/mean-teacher/blob/master/pytorch/main.py
"""

import copy
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pathkernel as pk


class TwoViews(Dataset):
    """Each item is transformed twice, once for the student and once for the teacher; most labels are missing (-1)."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = labels.where(torch.arange(len(labels)) % 3 == 0, torch.tensor(-1))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        views = image + 0.1 * torch.randn_like(image), image + 0.1 * torch.randn_like(image)
        return views, self.labels[i]


def create_model(ema=False):
    model = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    if ema:
        for param in model.parameters():
            param.detach_()
    return model


def sigmoid_rampup(current, rampup_length):
    phase = 1.0 - min(max(current / rampup_length, 0.0), 1.0)
    return math.exp(-5.0 * phase * phase)


def update_ema_variables(model, ema_model, alpha, global_step):
    alpha = min(1 - 1 / (global_step + 1), alpha)
    for ema_param, param in zip(ema_model.parameters(), model.parameters(), strict=True):
        ema_param.data.mul_(alpha).add_(param.data, alpha=1 - alpha)


def main(epochs=4):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    dataset = TwoViews(images[:240], torch.tensor(labels[:240]))
    train_loader = DataLoader(dataset, batch_size=24, shuffle=True)

    model = create_model()
    ema_model = create_model(ema=True)
    ema_model.load_state_dict(copy.deepcopy(model.state_dict()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    class_criterion = nn.CrossEntropyLoss(ignore_index=-1, reduction="sum")
    global_step = 0
    with pk.KernelRecorder(model, optimizer, data=len(dataset), task="classification") as recorder:
        for epoch in range(epochs):
            model.train()
            ema_model.train()
            for (input, ema_input), target in recorder.track(train_loader, keep=True):
                ema_logit = ema_model(ema_input)
                class_logit = model(input)
                class_loss = class_criterion(class_logit, target) / len(target)
                consistency_weight = 10.0 * sigmoid_rampup(epoch, epochs)
                softmax, ema_softmax = F.softmax(class_logit, dim=1), F.softmax(ema_logit.detach(), dim=1)
                consistency = F.mse_loss(softmax, ema_softmax, reduction="sum") / 10
                loss = class_loss + consistency_weight * consistency / len(target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                global_step += 1
                update_ema_variables(model, ema_model, 0.9, global_step)
    return {model: images[240:244]}


if __name__ == "__main__":
    main()
