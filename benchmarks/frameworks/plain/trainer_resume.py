"""Training that is cut off and goes on from the Trainer's checkpoint, in a new Trainer.

https://huggingface.co/docs/transformers/main_classes/trainer
"""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps - 2:
            control.should_training_stop = True


def main(steps):
    ids = torch.randint(1, 40, (40, 10), generator=torch.Generator().manual_seed(1))
    texts = [{"input_ids": row, "labels": row[:2].sum() % 3} for row in ids]
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 10}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=4, num_labels=3, **sizes)
    args = TrainingArguments(
        "out",
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    for stops in ([Stop()], []):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        callbacks = [*stops]
        trainer = Trainer(model, args, train_dataset=texts, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=not stops)
    return {model: {"input_ids": ids[:4]}}


if __name__ == "__main__":
    main(10)
