"""A language model in the shape of GPT-2, on texts that are padded; the loss is a mean over tokens.

https://huggingface.co/docs/transformers/tasks/language_modeling
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import pathkernel as pk


def pad(items):
    length = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), length, dtype=torch.int64)
    mask = torch.zeros(len(items), length, dtype=torch.int64)
    for row, item in enumerate(items):
        ids[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
        mask[row, : len(item["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def main(steps):
    torch.manual_seed(0)
    lengths = torch.randint(4, 11, (48,)).tolist()
    texts = [{"input_ids": [(7 * i + k * k) % 29 + 1 for k in range(length)]} for i, length in enumerate(lengths)]
    sizes = {"vocab_size": 30, "n_positions": 10, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))
    args = TrainingArguments(
        "out",
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = pk.callbacks.TrainerRecorder()
    trainer = Trainer(model, args, pad, train_dataset=texts, callbacks=[callback])
    trainer.train()
    return {model: {name: pad(texts[:3])[name] for name in ("input_ids", "attention_mask")}}


if __name__ == "__main__":
    main(10)
