"""Mixed precision in bfloat16, in the manner of PyTorch's recipe for automatic mixed precision.

https://pytorch.org/tutorials/recipes/recipes/amp_recipe.html
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import pathkernel as pk


def make_model(in_size, out_size, num_layers):
    layers = []
    for _ in range(num_layers - 1):
        layers.append(nn.Linear(in_size, in_size))
        layers.append(nn.ReLU())
    layers.append(nn.Linear(in_size, out_size))
    return nn.Sequential(*tuple(layers))


def main(epochs=3, use_amp=True):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images[:256] / 16, dtype=torch.float32).split(32)
    targets = torch.tensor(labels[:256]).split(32)

    net = make_model(64, 10, 3)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    loss_fn = nn.CrossEntropyLoss()
    with pk.KernelRecorder(net, opt, loss_fn, data=256, task="classification") as recorder:
        for _ in range(epochs):
            for input, target in recorder.track(zip(data, targets, strict=True), keep=True):
                with torch.autocast(device_type="cpu", dtype=torch.bfloat16, enabled=use_amp):
                    output = net(input)
                    loss = loss_fn(output, target)
                loss.backward()
                opt.step()
                opt.zero_grad()
    return {net: torch.tensor(images[256:260] / 16, dtype=torch.float32)}


if __name__ == "__main__":
    main()
