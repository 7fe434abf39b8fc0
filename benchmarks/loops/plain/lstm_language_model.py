"""A word-level LSTM language model, updated by hand, in the manner of pytorch/examples, word_language_model/main.py.

https://github.com/pytorch/examples/blob/main/word_language_model/main.py
"""

import torch
import torch.nn.functional as F
from torch import nn

bptt, clip, eval_batch_size = 12, 0.25, 4


class RNNModel(nn.Module):
    def __init__(self, ntoken, ninp, nhid, nlayers, dropout=0.5):
        super().__init__()
        self.ntoken, self.nhid, self.nlayers = ntoken, nhid, nlayers
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout)
        self.decoder = nn.Linear(nhid, ntoken)

    def forward(self, input, hidden):
        emb = self.drop(self.encoder(input))
        output, hidden = self.rnn(emb, hidden)
        output = self.drop(output)
        decoded = self.decoder(output)
        decoded = decoded.view(-1, self.ntoken)
        return F.log_softmax(decoded, dim=1), hidden

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        return weight.new_zeros(self.nlayers, bsz, self.nhid), weight.new_zeros(self.nlayers, bsz, self.nhid)


def text(length):
    """Words that follow each other with some regularity."""
    words = torch.zeros(length, dtype=torch.int64)
    jumps = torch.randint(1, 4, (length,))
    for t in range(1, length):
        words[t] = (2 * words[t - 1] + jumps[t]) % 16
    return words


def batchify(data, bsz):
    nbatch = data.size(0) // bsz
    data = data.narrow(0, 0, nbatch * bsz)
    return data.view(bsz, -1).t().contiguous()


def repackage_hidden(h):
    """Wraps hidden states in new Tensors, to detach them from their history."""
    if isinstance(h, torch.Tensor):
        return h.detach()
    return tuple(repackage_hidden(v) for v in h)


def get_batch(source, i):
    seq_len = min(bptt, len(source) - 1 - i)
    return source[i : i + seq_len], source[i + 1 : i + 1 + seq_len].view(-1)


def evaluate(model, data_source, criterion):
    model.eval()
    total_loss = 0.0
    hidden = model.init_hidden(eval_batch_size)
    with torch.no_grad():
        for i in range(0, data_source.size(0) - 1, bptt):
            data, targets = get_batch(data_source, i)
            output, hidden = model(data, hidden)
            hidden = repackage_hidden(hidden)
            total_loss += len(data) * criterion(output, targets).item()
    return total_loss / (len(data_source) - 1)


def main(epochs=4):
    torch.manual_seed(1111)
    train_data = batchify(text(784), 8)
    val_data = batchify(text(100), eval_batch_size)
    model = RNNModel(ntoken=16, ninp=12, nhid=12, nlayers=2, dropout=0.2)
    criterion = nn.NLLLoss()

    def train():
        model.train()
        hidden = model.init_hidden(train_data.size(1))
        for i in range(0, train_data.size(0) - 1, bptt):
            data, targets = get_batch(train_data, i)
            model.zero_grad()
            hidden = repackage_hidden(hidden)
            output, hidden = model(data, hidden)
            loss = criterion(output, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-lr)

    lr = 5.0
    best_val_loss = None
    for _ in range(epochs):
        train()
        val_loss = evaluate(model, val_data, criterion)
        if not best_val_loss or val_loss < best_val_loss:
            best_val_loss = val_loss
        else:
            lr /= 4.0
    return {model: (val_data[:bptt], model.init_hidden(eval_batch_size))}


if __name__ == "__main__":
    main()
