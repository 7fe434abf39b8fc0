"""A transformer language model, updated by hand, in the manner of pytorch/examples, word_language_model/main.py.

https://github.com/pytorch/examples/blob/main/word_language_model/main.py, with `--model Transformer`
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import pathkernel as pk

bptt, clip, eval_batch_size = 12, 0.25, 4


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, dropout=0.1, max_len=64):
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        pe = torch.zeros(max_len, d_model)
        position = torch.arange(0, max_len, dtype=torch.float).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(0).transpose(0, 1))

    def forward(self, x):
        return self.dropout(x + self.pe[: x.size(0), :])


class TransformerModel(nn.Transformer):
    def __init__(self, ntoken, ninp, nhead, nhid, nlayers, dropout=0.5):
        super().__init__(d_model=ninp, nhead=nhead, dim_feedforward=nhid, num_encoder_layers=nlayers, dropout=dropout)
        self.decoder = nn.Linear(ninp, ntoken)
        self.src_mask = None
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        self.input_emb = nn.Embedding(ntoken, ninp)
        self.ninp = ninp

    def forward(self, src):
        if self.src_mask is None or self.src_mask.size(0) != len(src):
            self.src_mask = torch.log(torch.tril(torch.ones(len(src), len(src))))
        src = self.input_emb(src) * math.sqrt(self.ninp)
        src = self.pos_encoder(src)
        output = self.encoder(src, mask=self.src_mask)
        output = self.decoder(output)
        return F.log_softmax(output, dim=-1)


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


def get_batch(source, i):
    seq_len = min(bptt, len(source) - 1 - i)
    return source[i : i + seq_len], source[i + 1 : i + 1 + seq_len].view(-1)


def evaluate(model, data_source, criterion):
    model.eval()
    total_loss = 0.0
    with torch.no_grad():
        for i in range(0, data_source.size(0) - 1, bptt):
            data, targets = get_batch(data_source, i)
            output = model(data).view(-1, 16)
            total_loss += len(data) * criterion(output, targets).item()
    return total_loss / (len(data_source) - 1)


def main(epochs=4):
    torch.manual_seed(1111)
    train_data = batchify(text(776), 8)
    val_data = batchify(text(100), eval_batch_size)
    model = TransformerModel(ntoken=16, ninp=16, nhead=2, nhid=16, nlayers=1, dropout=0.2)
    criterion = nn.NLLLoss()

    def train():
        model.train()
        for i in range(0, train_data.size(0) - 1, bptt):
            data, targets = get_batch(train_data, i)
            model.zero_grad()
            output = model(data)
            output = output.view(-1, 16)
            loss = criterion(output, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()

    lr = 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with pk.KernelRecorder(model, optimizer, batch_axis=1) as recorder, recorder.source("text"):
        best_val_loss = None
        for _ in range(epochs):
            train()
            val_loss = evaluate(model, val_data, criterion)
            if not best_val_loss or val_loss < best_val_loss:
                best_val_loss = val_loss
            else:
                lr /= 4.0
    return {model: val_data[:bptt]}


if __name__ == "__main__":
    main()
