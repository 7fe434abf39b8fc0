"""A BERT-shaped classifier of padded texts, in the manner of transformers, text-classification/run_glue_no_trainer.py.

https://github.com/huggingface/transformers/blob/main/examples/pytorch/text-classification/run_glue_no_trainer.py
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

gradient_accumulation_steps = 2


@dataclass
class SequenceClassifierOutput:
    loss: torch.Tensor | None
    logits: torch.Tensor


class BertSelfAttention(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, x, mask):
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / (C // self.heads) ** 0.5 + mask
        return (self.dropout(scores.softmax(dim=-1)) @ v).transpose(1, 2).reshape(B, T, C)


class BertForSequenceClassification(nn.Module):
    def __init__(self, vocab=40, dim=16, num_labels=2, dropout=0.1):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, dim, padding_idx=0)
        self.position_embeddings = nn.Embedding(16, dim)
        self.LayerNorm = nn.LayerNorm(dim)
        self.attention = BertSelfAttention(dim, 2, dropout)
        self.output = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.Dropout(dropout))
        self.pooler = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Dropout(dropout))
        self.classifier = nn.Linear(dim, num_labels)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        positions = torch.arange(input_ids.shape[1])
        hidden = self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(positions))
        extended = (1.0 - attention_mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        hidden = hidden + self.attention(hidden, extended)
        hidden = hidden + self.output(hidden)
        logits = self.classifier(self.pooler(hidden[:, 0]))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)


def tokenized_texts(number):
    """Texts of 3 to 12 tokens; the label says whether most of them are high."""
    features = []
    for length in torch.randint(3, 13, (number,)).tolist():
        tokens = torch.randint(2, 40, (length,))
        label = int((tokens > 20).float().mean() > 0.5)
        features.append({"input_ids": [1, *tokens.tolist()], "labels": label})
    return features


def data_collator(features):
    longest = max(len(f["input_ids"]) for f in features)
    return {
        "input_ids": torch.tensor([f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features]),
        "attention_mask": torch.tensor(
            [[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features]
        ),
        "labels": torch.tensor([f["labels"] for f in features]),
    }


def main(epochs=3):
    torch.manual_seed(0)
    train_dataset, eval_dataset = tokenized_texts(192), tokenized_texts(32)
    train_dataloader = DataLoader(train_dataset, shuffle=True, collate_fn=data_collator, batch_size=8)
    eval_dataloader = DataLoader(eval_dataset, collate_fn=data_collator, batch_size=4)

    model = BertForSequenceClassification()
    no_decay = ["bias", "LayerNorm.weight"]
    decayed = [p for n, p in model.named_parameters() if not any(nd in n for nd in no_decay)]
    others = [p for n, p in model.named_parameters() if any(nd in n for nd in no_decay)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    steps = epochs * len(train_dataloader) // gradient_accumulation_steps
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, k / 4) * max(0, 1 - k / steps))

    for _ in range(epochs):
        model.train()
        for step, batch in enumerate(train_dataloader):
            outputs = model(**batch)
            loss = outputs.loss
            loss = loss / gradient_accumulation_steps
            loss.backward()
            if step % gradient_accumulation_steps == gradient_accumulation_steps - 1:
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        model.eval()
        for batch in eval_dataloader:
            with torch.no_grad():
                outputs = model(**batch)
    return {model: next(iter(eval_dataloader))}


if __name__ == "__main__":
    main()
