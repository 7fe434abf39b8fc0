"""Accumulated gradients, clipping and a schedule with the Trainer, with a validation set.

https://huggingface.co/docs/transformers/main_classes/trainer
"""

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


class Texts(Dataset):
    def __init__(self, n, seed):
        self.ids = torch.randint(1, 40, (n, 10), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i, :2].sum() % 2}


def main(steps):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 10}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=4, num_labels=2, **sizes)
    model = BertForSequenceClassification(config)
    train, valid = Texts(70, 1), Texts(16, 2)
    args = TrainingArguments(
        "out",
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_grad_norm=0.3,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        label_smoothing_factor=0.1,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=train, eval_dataset=valid)
    trainer.train()
    return {model: {"input_ids": valid.ids[:4]}}


if __name__ == "__main__":
    main(10)
