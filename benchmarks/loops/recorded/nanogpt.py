"""A GPT that returns its loss, with accumulation, clipping, warm-up and decay groups, in the manner of nanoGPT.

https://github.com/karpathy/nanoGPT/blob/master/train.py and model.py
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn

import pathkernel as pk

block_size, batch_size, vocab_size = 12, 6, 16
gradient_accumulation_steps, grad_clip = 2, 1.0
learning_rate, min_lr, warmup_iters = 1e-2, 1e-3, 4


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.dropout = n_head, dropout

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (each.view(B, T, self.n_head, -1).transpose(1, 2) for each in self.c_attn(x).split(C, dim=2))
        p = self.dropout if self.training else 0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class Block(nn.Module):
    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 2 * n_embd), nn.GELU(), nn.Linear(2 * n_embd, n_embd), nn.Dropout(dropout)
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, n_layer=2, n_head=2, n_embd=16, dropout=0.1):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList([Block(n_embd, n_head, dropout) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.size(1))))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.lm_head(x[:, [-1], :])
            loss = None
        return logits, loss

    def configure_optimizers(self, weight_decay, learning_rate, betas):
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        extra = {"fused": True} if "fused" in inspect.signature(torch.optim.AdamW).parameters else {}
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, **extra)


def text(length):
    """Characters that follow each other with some regularity."""
    characters = torch.zeros(length, dtype=torch.int64)
    jumps = torch.randint(1, 4, (length,))
    for t in range(1, length):
        characters[t] = (2 * characters[t - 1] + jumps[t]) % vocab_size
    return characters


def get_batch(data):
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([data[i : i + block_size] for i in ix])
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in ix])
    return x, y


@torch.no_grad()
def estimate_loss(model, val_data):
    model.eval()
    losses = torch.zeros(4)
    for k in range(4):
        X, Y = get_batch(val_data)
        logits, loss = model(X, Y)
        losses[k] = loss.item()
    model.train()
    return losses.mean()


def get_lr(it, max_iters):
    if it < warmup_iters:
        return learning_rate * it / warmup_iters
    decay_ratio = (it - warmup_iters) / (max_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (learning_rate - min_lr)


def main(max_iters=30):
    torch.manual_seed(1337)
    train_data, val_data = text(400), text(100)
    model = GPT()
    optimizer = model.configure_optimizers(1e-1, learning_rate, (0.9, 0.95))

    X, Y = get_batch(train_data)
    iter_num = 0
    with pk.KernelRecorder(model, optimizer, returns=0) as recorder, recorder.source("text"):
        while True:
            lr = get_lr(iter_num, max_iters)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            if iter_num % 10 == 0:
                print(f"step {iter_num}: val loss {estimate_loss(model, val_data):.4f}")
            for _ in range(gradient_accumulation_steps):
                logits, loss = model(X, Y)
                loss = loss / gradient_accumulation_steps
                X, Y = get_batch(train_data)  # the next batch while the device is busy with this one
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            iter_num += 1
            if iter_num >= max_iters:
                break
    x, y = get_batch(val_data)
    return {model: (x[:4], y[:4])}


if __name__ == "__main__":
    main()
