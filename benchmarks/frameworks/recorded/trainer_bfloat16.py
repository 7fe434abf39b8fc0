"""Mixed precision in bfloat16 with the Trainer.

https://huggingface.co/docs/transformers/perf_train_gpu_one
"""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import pathkernel as pk


def main(steps):
    torch.manual_seed(0)
    ids = torch.randint(1, 40, (64, 10))
    texts = [{"input_ids": row, "labels": row[:2].sum() % 3} for row in ids]
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 10}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, num_labels=3, **sizes)
    model = BertForSequenceClassification(config)
    args = TrainingArguments(
        "out",
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        bf16=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = pk.callbacks.TrainerRecorder()
    trainer = Trainer(model, args, train_dataset=texts, callbacks=[callback])
    trainer.train()
    return {model: {"input_ids": ids[:4]}}


if __name__ == "__main__":
    main(10)
