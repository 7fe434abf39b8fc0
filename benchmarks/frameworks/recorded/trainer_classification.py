"""Classification of sequences with the Trainer and its own collator, in the manner of its documentation.

https://huggingface.co/docs/transformers/tasks/sequence_classification
"""

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import pathkernel as pk


def main(steps):
    torch.manual_seed(0)
    ids = torch.randint(1, 40, (64, 12))
    labels = (ids[:, 0] + ids[:, 1]) % 3
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist(), "text": 64 * ["words"]})
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 12}
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, num_labels=3, **sizes)
    model = BertForSequenceClassification(config)
    args = TrainingArguments(
        "out",
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        weight_decay=0.01,
        warmup_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = pk.callbacks.TrainerRecorder()
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])
    trainer.train()
    return {model: {"input_ids": ids[:4]}}


if __name__ == "__main__":
    main(10)
