"""Sines continued by two LSTM cells and LBFGS, in the manner of pytorch/examples, time_sequence_prediction/train.py.

https://github.com/pytorch/examples/blob/main/time_sequence_prediction/train.py
"""

import numpy as np
import torch
from torch import nn, optim

import pathkernel as pk


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm1 = nn.LSTMCell(1, 8)
        self.lstm2 = nn.LSTMCell(8, 8)
        self.linear = nn.Linear(8, 1)

    def forward(self, input, future=0):
        outputs = []
        h_t = torch.zeros(input.size(0), 8)
        c_t = torch.zeros(input.size(0), 8)
        h_t2 = torch.zeros(input.size(0), 8)
        c_t2 = torch.zeros(input.size(0), 8)
        for input_t in input.split(1, dim=1):
            h_t, c_t = self.lstm1(input_t, (h_t, c_t))
            h_t2, c_t2 = self.lstm2(h_t, (h_t2, c_t2))
            output = self.linear(h_t2)
            outputs += [output]
        for _ in range(future):
            h_t, c_t = self.lstm1(output, (h_t, c_t))
            h_t2, c_t2 = self.lstm2(h_t, (h_t2, c_t2))
            output = self.linear(h_t2)
            outputs += [output]
        return torch.cat(outputs, dim=1)


def main(steps=2):
    np.random.seed(0)
    torch.manual_seed(0)
    starts = np.random.randint(-40, 40, (12, 1))
    data = torch.tensor(np.sin((np.arange(20) + starts) / 5), dtype=torch.float32)
    input, target = data[3:, :-1], data[3:, 1:]

    seq = Sequence()
    criterion = nn.MSELoss()
    optimizer = optim.LBFGS(seq.parameters(), lr=0.8, max_iter=4)
    with pk.KernelRecorder(seq, optimizer, criterion, data=(input, target)) as recorder:
        for _ in range(steps):

            def closure():
                optimizer.zero_grad()
                recorder.announce(range(len(input)))
                out = seq(input)
                loss = criterion(out, target)
                loss.backward()
                return loss

            optimizer.step(closure)
    return {seq: data[:3, :-1]}


if __name__ == "__main__":
    main()
