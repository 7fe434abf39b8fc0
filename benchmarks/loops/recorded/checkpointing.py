"""A small DenseNet that checkpoints its layers, in the manner of gpleiss/efficient_densenet_pytorch.

https://github.com/gpleiss/efficient_densenet_pytorch/blob/master/models/densenet.py and demo.py
"""

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk


def _bn_function_factory(norm, relu, conv):
    def bn_function(*inputs):
        return conv(relu(norm(torch.cat(inputs, 1))))

    return bn_function


class _DenseLayer(nn.Module):
    def __init__(self, num_input_features, growth_rate, bn_size, drop_rate, efficient):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, kernel_size=1, bias=False)
        self.norm2 = nn.GroupNorm(1, bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate, self.efficient = drop_rate, efficient

    def forward(self, *prev_features):
        bn_function = _bn_function_factory(self.norm1, self.relu1, self.conv1)
        if self.efficient and any(prev_feature.requires_grad for prev_feature in prev_features):
            bottleneck_output = cp.checkpoint(bn_function, *prev_features, use_reentrant=False)
        else:
            bottleneck_output = bn_function(*prev_features)
        new_features = self.conv2(self.relu2(self.norm2(bottleneck_output)))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class DenseNet(nn.Module):
    def __init__(self, growth_rate=4, num_layers=3, num_init_features=6, bn_size=2, drop_rate=0.1, efficient=True):
        super().__init__()
        self.conv0 = nn.Conv2d(1, num_init_features, 3, 2, 1, bias=False)
        self.denselayers = nn.ModuleList(
            _DenseLayer(num_init_features + i * growth_rate, growth_rate, bn_size, drop_rate, efficient)
            for i in range(num_layers)
        )
        self.classifier = nn.Linear(num_init_features + num_layers * growth_rate, 10)

    def forward(self, x):
        features = [self.conv0(x)]
        for layer in self.denselayers:
            features.append(layer(*features))
        return self.classifier(F.relu(torch.cat(features, 1)).mean(dim=(2, 3)))


def main(epochs=3):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    train_set = TensorDataset(images[:256], torch.tensor(labels[:256]))
    train_loader = DataLoader(train_set, batch_size=32, shuffle=True)

    model = DenseNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, nesterov=True, momentum=0.9, weight_decay=1e-4)
    milestones = [0.5 * epochs, 0.75 * epochs]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=milestones, gamma=0.1)
    with pk.KernelRecorder(model, optimizer, F.cross_entropy, data=train_set) as recorder:
        for _ in range(epochs):
            model.train()
            for input, target in recorder.track(train_loader, keep=True):
                output = model(input)
                loss = F.cross_entropy(output, target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
    return {model: images[256:260]}


if __name__ == "__main__":
    main()
