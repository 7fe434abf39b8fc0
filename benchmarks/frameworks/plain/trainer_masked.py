"""A masked language model in the shape of BERT: masks are drawn anew for each batch, and dropout is on.

https://huggingface.co/docs/transformers/tasks/masked_language_modeling
"""

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments


def mask(items):
    ids = torch.tensor([item["input_ids"] for item in items])
    attention = torch.tensor([item["attention_mask"] for item in items])
    masked = (torch.rand(ids.shape) < 0.2) & (attention == 1)
    masked[:, 0] = True
    return {
        "input_ids": ids.masked_fill(masked, 0),
        "attention_mask": attention,
        "labels": ids.masked_fill(~masked, -100),
    }


def main(steps):
    torch.manual_seed(0)
    texts = []
    for i in range(48):
        n = 5 + i % 6
        ids = [(5 * i + 3 * k) % 29 + 1 for k in range(10)]
        texts.append({"input_ids": ids, "attention_mask": n * [1] + (10 - n) * [0]})
    sizes = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 10}
    model = BertForMaskedLM(BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes))
    args = TrainingArguments(
        "out",
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, mask, train_dataset=texts)
    trainer.train()
    return {model: {name: mask(texts[:3])[name] for name in ("input_ids", "attention_mask")}}


if __name__ == "__main__":
    main(10)
