"""Truncated backpropagation through time with a state that is carried on, in the manner of d2l-ai/d2l-zh.

https://github.com/d2l-ai/d2l-zh/blob/master/chapter_recurrent-neural-networks/rnn-scratch.md, `train_epoch_ch8`
"""

import torch
import torch.nn.functional as F
from torch import nn


class RNNModel(nn.Module):
    def __init__(self, vocab_size, num_hiddens):
        super().__init__()
        self.vocab_size, self.num_hiddens = vocab_size, num_hiddens
        self.rnn = nn.GRU(vocab_size, num_hiddens, batch_first=True)
        self.linear = nn.Linear(num_hiddens, vocab_size)

    def forward(self, inputs, state):
        Y, state = self.rnn(F.one_hot(inputs, self.vocab_size).float(), state)
        return self.linear(Y), state

    def begin_state(self, batch_size):
        return torch.zeros(1, batch_size, self.num_hiddens)


def text(length):
    """Characters that follow each other with some regularity."""
    characters = torch.zeros(length, dtype=torch.int64)
    jumps = torch.randint(1, 4, (length,))
    for t in range(1, length):
        characters[t] = (2 * characters[t - 1] + jumps[t]) % 16
    return characters


def seq_data_iter_sequential(corpus, batch_size, num_steps):
    """Minibatches of subsequences, each the continuation of that at the same place in the one before."""
    offset = int(torch.randint(0, num_steps, ()))
    num_tokens = (len(corpus) - offset - 1) // batch_size * batch_size
    Xs = corpus[offset : offset + num_tokens].reshape(batch_size, -1)
    Ys = corpus[offset + 1 : offset + 1 + num_tokens].reshape(batch_size, -1)
    for i in range(0, num_steps * (Xs.shape[1] // num_steps), num_steps):
        yield Xs[:, i : i + num_steps], Ys[:, i : i + num_steps]


def grad_clipping(net, theta):
    params = [p for p in net.parameters() if p.requires_grad]
    norm = torch.sqrt(sum(torch.sum(p.grad**2) for p in params))
    if norm > theta:
        for param in params:
            param.grad[:] *= theta / norm


def main(num_epochs=5):
    torch.manual_seed(0)
    corpus = text(600)
    net = RNNModel(16, 16)
    loss = nn.CrossEntropyLoss()
    updater = torch.optim.SGD(net.parameters(), lr=1.0)
    for _ in range(num_epochs):
        state = None
        for X, Y in seq_data_iter_sequential(corpus, 8, 10):
            if state is None:
                state = net.begin_state(batch_size=X.shape[0])
            else:
                state.detach_()
            y_hat, state = net(X, state)
            value = loss(y_hat.reshape(-1, y_hat.shape[-1]), Y.reshape(-1))
            updater.zero_grad()
            value.backward()
            grad_clipping(net, 1)
            updater.step()
    return {net: (X[:4], net.begin_state(4))}


if __name__ == "__main__":
    main()
