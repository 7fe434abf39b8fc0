"""A language model whose activations are computed again in the backward pass.

https://huggingface.co/docs/transformers/perf_train_gpu_one
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


def main(steps):
    torch.manual_seed(0)
    ids = torch.randint(1, 30, (40, 8))
    texts = [{"input_ids": row, "labels": row} for row in ids]
    sizes = {"vocab_size": 30, "n_positions": 8, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))
    model.gradient_checkpointing_enable()
    args = TrainingArguments(
        "out",
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=texts)
    trainer.train()
    return {model: {"input_ids": ids[:3]}}


if __name__ == "__main__":
    main(10)
