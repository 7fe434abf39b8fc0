"""`TrainerRecorder`: two lines for `transformers.Trainer`, ids of its own, and training to the same bits."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Subset

import pathkernel as pk
from pathkernel.errors import InputError, MissingExtraError, RecordingError, SampleIdError, TrajectoryError
from pathkernel.trajectory.trajectory import Trajectory

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore::pathkernel.errors.CertificateWarning")]
transformers = pytest.importorskip("transformers")
from accelerate.state import AcceleratorState  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

V, N, LONGEST = 24, 20, 6
EXACT = 1e-5
"""Of the largest output, float32."""
Recorder = pk.callbacks.TrainerRecorder
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
OLD = VERSION < (5, 0)
RESUMES = pytest.mark.skipif(VERSION < (4, 48), reason="its Trainer cannot read its random states under torch 2.6")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # where earlier versions leave it to later Trainers
    AcceleratorState._reset_state(reset_partial_state=True)


class Texts(Dataset):
    """Sequences of equal length, half of them with a mask behind their end; `labels` as a classifier takes them."""

    def __init__(self, classes: int = 3, mask: bool = True, more: bool = False) -> None:
        numbers = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, V, (N, LONGEST), generator=numbers)
        self.ends = torch.randint(3, LONGEST + 1, (N,), generator=numbers)
        self.classes, self.mask, self.more = classes, mask, more

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Any]:
        item: dict[str, Any] = {"input_ids": self.ids[i]}
        if self.mask:
            item["attention_mask"] = (torch.arange(LONGEST) < self.ends[i]).long()
        if self.classes:
            item["labels"] = i % self.classes
        else:
            item["labels"] = torch.where(torch.arange(LONGEST) < self.ends[i], self.ids[i], torch.tensor(-100))
        return item | ({"sample_index": i, "text": "words"} if self.more else {})

    def queries(self, n: int = 2) -> dict[str, torch.Tensor]:
        return {name: torch.stack([self[i][name] for i in range(n)]) for name in ("input_ids", "attention_mask")}


def small_bert(**options: Any) -> BertConfig:
    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertConfig(**sizes, intermediate_size=24, max_position_embeddings=LONGEST, **options)


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(small_bert(num_labels=3, **options))


def gpt(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "n_positions": LONGEST, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "save_strategy": "no"}
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1000}
    return TrainingArguments(str(folder / "run"), **(given | fixed | options))


def trained(
    folder: Path,
    make: Callable[[], nn.Module],
    data: Any,
    *callbacks: TrainerCallback,
    trainer: type[Trainer] = Trainer,
    more: dict[str, Any] | None = None,
    resume: Any = None,
    **options: Any,
) -> Trainer:
    made = trainer(make(), arguments(folder, **options), train_dataset=data, callbacks=list(callbacks), **(more or {}))
    made.train(resume_from_checkpoint=resume)
    return made


def bits(trainer: Trainer) -> list[Any]:
    """Weights, buffers, the optimizer's state and all random generators."""
    state = trainer.optimizer.state_dict()["state"].values()
    held = [*trainer.model.state_dict().values(), *(v for own in state for v in own.values() if torch.is_tensor(v))]
    return [[t.clone() for t in held], torch.get_rng_state(), str(np.random.get_state()), random.getstate()]


def same(one: list[Any], other: list[Any]) -> bool:
    tensors = len(one[0]) == len(other[0]) and all(torch.equal(*pair) for pair in zip(one[0], other[0], strict=True))
    return tensors and torch.equal(one[1], other[1]) and one[2:] == other[2:]


def check(callback: Any, trainer: Trainer, X: dict[str, torch.Tensor], limit: float = EXACT) -> None:
    """The shares of training samples add up to what the trained network says, here to its largest output."""
    with torch.no_grad():
        expected = trainer.model.eval()(**X).logits.flatten(1).amax(1).double().numpy()
    why = callback.machine.explain(X, outputs=torch.max)
    size = max(abs(expected).max(), 1)
    assert abs(why.output - expected).max() <= limit * size
    assert abs(why.shares.sum(1) + sum(why.channels.values()) - expected).max() <= limit * size
    assert why.split_error <= limit
    assert abs(why.channels.get("unexplained", np.zeros(1))).max() <= limit * size
    assert why.shares.any(axis=0).sum() > 1


def check_rows(trajectory: Trajectory, data: Any, name: str = "input_ids") -> list[int]:
    """What is on record under each id is that item of the dataset; returns the ids in the order of training."""
    found = []
    for step in trajectory.steps():
        for batch in step.batches:
            for i, row in zip(batch.ids.tolist(), batch.inputs[name], strict=True):
                expected = torch.as_tensor(data[i][name])
                assert torch.equal(row[: len(expected)], expected)
                found.append(i)
    return found


def untouched(trainer: Trainer) -> bool:
    """True where no hook is left on the model, and none on the optimizer."""
    model, optimizer = trainer.model, trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    on_parameters = any(p._post_accumulate_grad_hooks for p in model.parameters())
    return not (
        model._forward_pre_hooks or model._forward_hooks or on_parameters or optimizer._optimizer_step_pre_hooks
    )


# -- two lines ---------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[], nn.Module], int, dict[str, Any]]] = {
    "classification": (bert, 3, {}),
    "language model": (gpt, 0, {}),
    "accumulated, clipped, scheduled": (
        gpt,
        0,
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ),
    "weight decay": (bert, 3, {"weight_decay": 0.1, "gradient_accumulation_steps": 2, "dataloader_drop_last": True}),
    "label smoothing": (bert, 3, {"label_smoothing_factor": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_recorded_and_stays_what_it_is(case: str, tmp_path: Path) -> None:
    make, classes, options = CASES[case]
    plain = bits(trained(tmp_path, make, Texts(classes), **options))
    callback = Recorder()
    trainer = trained(tmp_path, make, Texts(classes), callback, **options)
    assert same(plain, bits(trainer))
    assert untouched(trainer)
    assert len(callback.trajectory) == 5
    check_rows(callback.trajectory, Texts(classes))
    check(callback, trainer, Texts(classes).queries())


def test_a_step_has_the_samples_of_its_own_micro_batches(tmp_path: Path) -> None:
    callback = Recorder()
    trained(tmp_path, bert, Texts(), callback, gradient_accumulation_steps=2, num_train_epochs=2, max_steps=-1)
    steps = [[len(batch.ids) for batch in step.batches] for step in callback.trajectory.steps()]
    # Earlier ones let what does not fill a step wait for the next epoch.
    assert steps == (2 * [[4, 4], [4, 4], [4]] if VERSION >= (4, 57) else 4 * [[4, 4]])
    ids = check_rows(callback.trajectory, Texts())
    assert sorted(ids[:N]) == list(range(N))
    assert ids[:12] != ids[N:]


def test_every_sample_has_its_share(tmp_path: Path) -> None:
    """Against a recorder in a loop by hand over the same batches."""
    callback = Recorder()
    options = {"lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    trained(
        tmp_path, lambda: bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), Texts(), callback, **options
    )
    model, data = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), Texts()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
    with pk.KernelRecorder(model, optimizer, data=N, returns="logits", task="classification") as recorder:
        for step in callback.trajectory.steps():
            ids = step.batches[0].ids
            recorder.announce(ids)
            batch = {name: torch.stack([torch.as_tensor(data[i][name]) for i in ids]) for name in data[0]}
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    one = callback.machine.explain(data.queries())
    other = pk.KernelMachine(recorder.trajectory).explain(data.queries())
    assert one.shares.shape == (2, N)
    assert abs(one.shares - other.shares).max() <= 1e-6 * abs(other.shares).max()


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dataloader_persistent_workers": True}], ids=["workers", "persistent"])
def test_ids_come_from_worker_processes(options: dict[str, Any], tmp_path: Path) -> None:
    callback = Recorder()
    trained(tmp_path, bert, Texts(), callback, dataloader_num_workers=1, max_steps=7, **options)
    ids = check_rows(callback.trajectory, Texts())
    assert sorted(ids[:N]) == list(range(N))


def test_columns_that_the_model_does_not_take_are_removed_as_ever(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [Texts(more=True)[i] for i in range(N)]
    data = datasets.Dataset.from_dict(
        {k: [r[k].tolist() if torch.is_tensor(r[k]) else r[k] for r in rows] for k in rows[0]}
    )
    plain = bits(trained(tmp_path, bert, data))
    callback = Recorder()
    trainer = trained(tmp_path, bert, data, callback)
    assert same(plain, bits(trainer))
    check_rows(callback.trajectory, Texts())
    assert set(callback.trajectory.store.read(0).batches[0].inputs) == {"input_ids", "attention_mask", "labels"}


def test_a_dataset_that_makes_batches_by_itself_goes_on_to(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
        asked.append(len(rows["number"]))
        chosen = [Texts()[i] for i in rows["number"]]
        noise = torch.rand(len(chosen))  # one call of the generator for a batch
        return {"labels": [int(u * 3) for u in noise], "input_ids": [row["input_ids"] for row in chosen]}

    def data() -> Any:
        return datasets.Dataset.from_dict({"number": list(range(N))}).with_transform(transform)

    plain = bits(trained(tmp_path, bert, data(), remove_unused_columns=False))
    assert set(asked) == {4}
    callback = Recorder()
    trainer = trained(tmp_path, bert, data(), callback, remove_unused_columns=False)
    assert set(asked) == {4}
    assert same(plain, bits(trainer))
    check_rows(callback.trajectory, Texts())


def test_ids_that_the_dataset_holds_are_taken_off(tmp_path: Path) -> None:
    class Shifted(Texts):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return super().__getitem__(i) | {"sample_index": i + 100}

    callback = Recorder(ids="sample_index")
    trainer = trained(tmp_path, bert, Shifted(), callback, remove_unused_columns=False)
    found = torch.cat([batch.ids for step in callback.trajectory.steps() for batch in step.batches])
    assert int(found.min()) >= 100
    check(callback, trainer, Texts().queries())


def test_a_column_of_ids_that_the_trainer_drops_is_said(tmp_path: Path) -> None:
    with pytest.raises(SampleIdError, match=r"'sample_index'.*remove_unused_columns=False"):
        trained(tmp_path, bert, Texts(more=True), Recorder(ids="sample_index"))


def test_subsets_have_places_in_data_that_were_given(tmp_path: Path) -> None:
    class Pairs(Texts):
        def __getitem__(self, i: int) -> Any:
            item = super().__getitem__(i)
            return {name: item[name] for name in ("input_ids", "attention_mask")}, item["labels"]

    def collate(items: list[Any]) -> dict[str, Any]:
        inputs, labels = torch.utils.data.default_collate(items)
        return inputs | {"labels": labels}

    callback = Recorder(data=Pairs())
    part = Subset(Pairs(), list(range(N - 1, 7, -1)))
    trainer = trained(tmp_path, bert, part, callback, more={"data_collator": collate}, remove_unused_columns=False)
    ids = torch.cat([batch.ids for step in callback.trajectory.steps() for batch in step.batches])
    assert int(ids.min()) >= 8
    assert int(ids.max()) == N - 1
    check(callback, trainer, Texts().queries())


def test_samples_of_a_stream_are_counted(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return (Texts()[i] for i in range(N))

    callback = Recorder()
    trainer = trained(tmp_path, bert, Stream(), callback)
    assert check_rows(callback.trajectory, Texts()) == list(range(N))
    check(callback, trainer, Texts().queries())


class Padding:
    """Pads sequences of different lengths."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(item["input_ids"]) for item in items)
        ids, mask, labels = torch.zeros(len(items), length).long(), torch.zeros(len(items), length).long(), []
        for i, item in enumerate(items):
            ids[i, : len(item["input_ids"])] = torch.as_tensor(item["input_ids"])
            mask[i, : len(item["input_ids"])] = 1
            labels.append(item["labels"])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}


class Ragged(Texts):
    def __getitem__(self, i: int) -> dict[str, Any]:
        item = super().__getitem__(i)
        return {"input_ids": item["input_ids"][: self.ends[i]], "labels": item["labels"]}


GROUPED = {"group_by_length": True} if OLD else {"train_sampling_strategy": "group_by_length"}


@pytest.mark.parametrize("options", [{}, GROUPED], ids=["random", "by length"])
def test_batches_that_are_padded_are_kept_as_they_were(options: dict[str, Any], tmp_path: Path) -> None:
    more = {"data_collator": Padding()}
    plain = bits(trained(tmp_path, bert, Ragged(), more=more, **options))
    callback = Recorder()
    trainer = trained(tmp_path, bert, Ragged(), callback, more=more, **options)
    assert same(plain, bits(trainer))
    check_rows(callback.trajectory, Ragged())
    check(callback, trainer, Texts().queries())


def test_random_masking_is_kept(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    def masking(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.stack([item["input_ids"] for item in items])
        masked = torch.rand(ids.shape) < 0.3
        masked[:, 0] = True
        return {"input_ids": ids.masked_fill(masked, 0), "labels": ids.masked_fill(~masked, -100)}

    def make() -> nn.Module:
        torch.manual_seed(0)
        return BertForMaskedLM(small_bert())

    more = {"data_collator": masking}
    plain = bits(trained(tmp_path, make, Texts(0), more=more))
    callback = Recorder()
    trainer = trained(tmp_path, make, Texts(0), callback, more=more)
    assert same(plain, bits(trainer))
    step = callback.trajectory.store.read(0).batches[0]
    assert (step.inputs["input_ids"] == 0).any()
    check(callback, trainer, {"input_ids": Texts().ids[:2]})


def test_a_collator_that_makes_no_dict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SampleIdError, match=r"data collator made a list.*data_collator"):
        trained(tmp_path, bert, Texts(), Recorder(), more={"data_collator": list}, remove_unused_columns=False)


# -- losses and models -------------------------------------------------------------------------------------------------


def test_a_loss_function_of_the_users_own(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        whole = nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.2, reduction="sum")
        return whole / (num_items_in_batch or len(labels))

    callback = Recorder()
    more = {"compute_loss_func": loss}
    plain = bits(trained(tmp_path, bert, Texts(), more=more, gradient_accumulation_steps=2))
    trainer = trained(tmp_path, bert, Texts(), callback, more=more, gradient_accumulation_steps=2)
    assert same(plain, bits(trainer))
    check(callback, trainer, Texts().queries())


class TwoPasses(Trainer):
    """The loss of two passes with different dropout, as R-Drop has it."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(**inputs).loss + model(**inputs).loss


class Selective(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss


def test_several_passes_of_a_batch(tmp_path: Path) -> None:
    callback = Recorder()
    trainer = trained(tmp_path, bert, Texts(), callback, trainer=TwoPasses)
    assert [len(step.batches) for step in callback.trajectory.steps()] == 5 * [2]
    check(callback, trainer, Texts().queries())


def test_a_call_of_the_model_without_ids_is_said_before_anything_moves(tmp_path: Path) -> None:
    with pytest.raises(SampleIdError, match=r"without the ids of its samples.*`model\(\*\*inputs\)`"):
        trained(tmp_path, bert, Texts(), Recorder(), trainer=Selective)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpoints(reentrant: bool, tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if not OLD:
        options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain = bits(trained(tmp_path, gpt, Texts(0), **options))
    callback = Recorder()
    trainer = trained(tmp_path, gpt, Texts(0), callback, **options)
    assert same(plain, bits(trainer))
    check(callback, trainer, Texts(0).queries())


def test_bfloat16(tmp_path: Path) -> None:
    plain = bits(trained(tmp_path, bert, Texts(), bf16=True))
    callback = Recorder()
    trainer = trained(tmp_path, bert, Texts(), callback, bf16=True)
    assert same(plain, bits(trainer))
    why = callback.machine.explain(Texts().queries())
    assert why.relative_residual <= 2e-3
    with torch.no_grad():
        expected = trainer.model.eval()(**Texts().queries()).logits.numpy()
    assert abs(callback.machine(Texts().queries()) - expected).max() <= 2e-2 * abs(expected).max()


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_name(name: str, tmp_path: Path) -> None:
    if name == "adafactor":
        with pytest.raises(pk.errors.PathKernelError, match="Adafactor"):
            trained(tmp_path, bert, Texts(), Recorder(), optim=name)
        callback = Recorder(rule="elementwise")
    else:
        callback = Recorder()
    trainer = trained(tmp_path, bert, Texts(), callback, optim=name, max_steps=3, learning_rate=1e-3)
    check(callback, trainer, Texts().queries())
    assert untouched(trainer)


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(V, 8), nn.Linear(8, 3)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
            z = self.out(torch.tanh(self.words(input_ids)).mean(1))
            return z if labels is None else (nn.functional.cross_entropy(z, labels), z)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Small()

    callback = Recorder(returns=1, task="classification")
    trainer = trained(tmp_path, make, Texts(mask=False), callback)
    X = Texts().ids[:3]
    assert abs(callback.machine({"input_ids": X}) - trainer.model(X).detach().numpy()).max() < 1e-6


# -- the life of a training --------------------------------------------------------------------------------------------


class Looks(TrainerCallback):
    """Copies model and optimizer after the second step, as those do who average."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.copies = copy.deepcopy(kwargs["model"]), copy.deepcopy(kwargs["optimizer"].optimizer)
            self.copies[0].train()(
                **{"input_ids": Texts().ids[:2], "pathkernel_ids": torch.zeros(2)}
            ).logits.sum().backward()


def test_evaluation_and_copies_leave_nothing_on_record(tmp_path: Path) -> None:
    callback, looks = Recorder(), Looks()
    more = {"eval_dataset": Texts()}
    trainer = trained(tmp_path, bert, Texts(), looks, callback, more=more, eval_strategy="steps", eval_steps=2)
    assert len(callback.trajectory) == 5
    assert looks.copies[0] is not trainer.model
    check(callback, trainer, Texts().queries())


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    callback = Recorder()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "worst"}

    def worst(prediction: Any, calls: list[int] = []) -> dict[str, float]:  # noqa: B006 - it counts
        calls.append(1)
        return {"worst": -abs(len(calls) - 3)}

    more = {"eval_dataset": Texts(), "compute_metrics": worst}
    trainer = trained(tmp_path, bert, Texts(), callback, more=more, greater_is_better=True, **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    check(callback, trainer, Texts().queries())
    at_best = pk.KernelMachine(callback.trajectory, at=3)
    assert abs(at_best(Texts().queries()) - callback.machine(Texts().queries())).max() < 1e-5


def test_training_twice_goes_on(tmp_path: Path) -> None:
    callback = Recorder()
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=Texts(), callbacks=[callback])
    trainer.train()
    trainer.train()
    assert len(callback.trajectory) == 10
    check(callback, trainer, Texts().queries())


def test_training_twice_with_other_weights_begins_anew(tmp_path: Path) -> None:
    callback = Recorder()
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=Texts(), callbacks=[callback])
    trainer.train()
    with torch.no_grad():
        trainer.model.classifier.weight.mul_(0.5)
    with pytest.warns(RuntimeWarning, match="record begins at step 0.*had begun before"):
        trainer.train()
    assert len(callback.trajectory) == 5
    check(callback, trainer, Texts().queries())


def test_other_samples_begin_a_new_record(tmp_path: Path) -> None:
    callback = Recorder()
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=Texts(), callbacks=[callback])
    trainer.train()
    trainer.train_dataset = Subset(Texts(), range(8))
    with pytest.warns(RuntimeWarning, match="record begins at step 0"):
        trainer.train()
    assert callback.machine.explain(Texts().queries()).shares.shape == (2, 8)


def test_a_model_that_is_made_anew_has_a_record_of_its_own(tmp_path: Path) -> None:
    callback = Recorder()
    options = arguments(tmp_path)
    trainer = Trainer(args=options, train_dataset=Texts(), callbacks=[callback], model_init=lambda: bert())
    trainer.train()
    trainer.train()
    assert len(callback.trajectory) == 5
    check(callback, trainer, Texts().queries())


class Stops(TrainerCallback):
    def __init__(self, error: type[BaseException], step: int = 3) -> None:
        self.error, self.step = error, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise self.error("cable")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_training_leaves_nothing_behind(error: type[BaseException], tmp_path: Path) -> None:
    callback, data = Recorder(), Texts()
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=data, callbacks=[callback, Stops(error)])
    with pytest.raises(error, match="cable"):
        trainer.train()
    gc.collect()
    assert untouched(trainer)
    assert trainer.callback_handler.train_dataloader.dataset is data
    assert len(callback.trajectory) == 3
    check(callback, trainer, Texts().queries())


def test_an_error_while_it_is_held_is_closed_by_hand(tmp_path: Path) -> None:
    callback = Recorder()
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=Texts(), callbacks=[callback, Stops(ValueError)])
    try:
        trainer.train()
    except ValueError as error:
        kept = error  # its traceback holds the frames of the loop
    assert not untouched(trainer)
    callback.close()
    assert untouched(trainer)
    assert len(callback.trajectory) == 3
    assert kept.args == ("cable",)


class GoesThrough(TrainerCallback):
    """Goes through the training loader in the midst of training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            next(iter(kwargs["train_dataloader"]))


def test_somebody_else_may_go_through_the_loader(tmp_path: Path) -> None:
    callback = Recorder()
    trainer = trained(tmp_path, bert, Texts(), callback, GoesThrough())
    assert len(callback.trajectory) == 5
    check(callback, trainer, Texts().queries())


@RESUMES
def test_a_checkpoint_goes_on_in_the_store(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7, "gradient_accumulation_steps": 2}
    first, callback = Recorder(store=True), Recorder(store=True)
    for place, own in (("plain", []), ("recorded", [first])):
        with pytest.raises(ValueError, match="cable"):
            trained(tmp_path / place, bert, Texts(), *own, Stops(ValueError, 5), **options)
    gc.collect()
    plain = trained(tmp_path / "plain", bert, Texts(), resume=True, **options)
    expected = bits(plain)
    trainer = trained(tmp_path / "recorded", bert, Texts(), callback, resume=True, **options)
    assert same(expected, bits(trainer))
    assert len(callback.trajectory) == 7
    check_rows(callback.trajectory, Texts())
    check(callback, trainer, Texts().queries())
    assert len(first.trajectory) == 5
    again = Trajectory.open(
        tmp_path / "recorded/run/pathkernel", model=trainer.model, loss="returned", data=N, returns="logits"
    )
    assert torch.equal(again.final, callback.trajectory.final)


@RESUMES
def test_a_checkpoint_without_a_store_is_warned_of(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, bert, Texts(), max_steps=4, **options)
    callback = Recorder()
    with pytest.warns(RuntimeWarning, match=r"begins at step 4.*store=True"):
        trainer = trained(tmp_path, bert, Texts(), callback, max_steps=6, resume=True, **options)
    assert len(callback.trajectory) == 2
    check(callback, trainer, Texts().queries())


def test_a_killed_process_has_all_steps_of_its_checkpoint_on_disk(tmp_path: Path) -> None:
    from pathkernel.storage.disk import DiskStore

    seen = []

    class Looks(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            store = DiskStore(tmp_path / "record")
            store.load()
            seen.append(len(store))

    class Before(Recorder):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            """Too late: somebody may have pulled the plug between the checkpoint and this."""

    callback = Before(store=tmp_path / "record")
    trained(tmp_path, bert, Texts(), callback, Looks(), save_strategy="steps", save_steps=2)
    assert seen[:2] == [2, 4]


# -- what is logged, and refused ---------------------------------------------------------------------------------------


def test_the_certificate_is_logged_where_there_is_a_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = Recorder()
    trainer = trained(tmp_path, bert, Texts(), callback)
    assert not any("residual" in entry for entry in trainer.state.log_history)
    found = callback.certificate()
    assert found["residual"] <= EXACT
    state = SimpleNamespace(log_history=[], epoch=1.0, global_step=5)
    callback.on_train_end(SimpleNamespace(report_to=["tensorboard"]), state, None)
    assert state.log_history == [found | {"epoch": 1.0, "step": 5}]
    trainer.log(found)
    assert trainer.state.log_history[-1]["residual"] == found["residual"]


def test_what_is_logged_leaves_random_numbers_and_an_error_in_it_ends_nothing(tmp_path: Path) -> None:
    callback = Recorder()
    trained(tmp_path, bert, Texts(), callback)
    logged = SimpleNamespace(report_to=["tensorboard"])
    state = SimpleNamespace(log_history=[], epoch=1.0, global_step=5)
    before = torch.get_rng_state()
    callback.recorder.model.register_forward_pre_hook(lambda *_: torch.rand(1) and None)  # a network that draws
    callback.on_train_end(logged, state, None)
    assert torch.equal(torch.get_rng_state(), before)

    thinned = Recorder(schedule=pk.WeightsOnly())
    trained(tmp_path, bert, Texts(), thinned)
    state = SimpleNamespace(log_history=[], epoch=1.0, global_step=5)
    with pytest.warns(pk.errors.CertificateWarning, match=r"could not be certified.*TrainerRecorder\(certify=0\)"):
        thinned.on_train_end(logged, state, None)
    assert not state.log_history


def test_a_version_outside_the_range_is_named_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "4.20.1")
    with pytest.raises(MissingExtraError, match=r"transformers is of the version 4\.20\.1"):
        Recorder()


def test_options_are_checked_at_construction() -> None:
    with pytest.raises(InputError, match=r"`model=`.*TrainerRecorder\("):
        Recorder(model=bert())
    with pytest.raises(InputError, match=r"`certify=-1`.*certify=2"):
        Recorder(certify=-1)
    with pytest.raises(TrajectoryError, match="has not seen any training"):
        Recorder().machine  # noqa: B018 - asked for


@pytest.mark.parametrize(("n_gpu", "world_size", "found"), [(2, 1, "2 GPUs"), (1, 4, "4 processes")])
def test_several_devices_are_refused(n_gpu: int, world_size: int, found: str) -> None:
    args = SimpleNamespace(n_gpu=n_gpu, world_size=world_size)
    with pytest.raises(RecordingError, match=rf"{found}.*one device"):
        Recorder().on_train_begin(args, None, None)


@pytest.mark.parametrize("option", ["torch_compile", "neftune_noise_alpha"])
def test_what_the_trainer_does_to_the_model_meanwhile_is_refused(option: str) -> None:
    args = SimpleNamespace(n_gpu=1, world_size=1, **{option: 1})
    with pytest.raises(RecordingError, match=f"`{option}"):
        Recorder().on_train_begin(args, None, None)


def test_a_model_that_was_compiled_in_place(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(V, 4), nn.Linear(4, 3)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            z = self.out(self.words(input_ids).mean(1))
            return {"loss": nn.functional.cross_entropy(z, labels), "logits": z}

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = Plain()
        model.compile(backend="eager")
        return model

    plain = bits(trained(tmp_path, make, Texts(mask=False)))
    callback = Recorder()
    trainer = trained(tmp_path, make, Texts(mask=False), callback)
    assert same(plain, bits(trainer))
    assert untouched(trainer)
    assert set(callback.trajectory.store.read(0).batches[0].inputs) == {"input_ids", "labels"}
    assert len(callback.trajectory) == 5


def test_an_encoder_with_a_decoder(tmp_path: Path) -> None:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    class Pairs(Texts):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"input_ids": self.ids[i], "labels": self.ids[(i + 1) % N][:3]}

    torch.manual_seed(0)
    sizes = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 2e-3}
    args = Seq2SeqTrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, **fixed)
    callback = Recorder()
    Seq2SeqTrainer(model, args, train_dataset=Pairs(), callbacks=[callback]).train()
    check_rows(callback.trajectory, Pairs())
    X = {name: torch.stack([Pairs()[i][name] for i in range(2)]) for name in Pairs()[0]}
    why = callback.machine.explain(X, outputs=torch.max)
    assert why.relative_residual <= EXACT
    assert why.split_error <= EXACT


def test_what_cannot_be_recorded_is_said_before_training_and_leaves_nothing(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.LBFGS(model.parameters())
    more = {"optimizers": (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))}
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Texts(), callbacks=[Recorder()], **more)
    with pytest.raises(pk.errors.PathKernelError, match="LBFGS"):
        trainer.train()
    assert untouched(trainer)


# -- rows and their ids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collator_that_sorts_keeps_the_ids(workers: int, tmp_path: Path) -> None:
    class Sorting(Padding):
        def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return super().__call__(sorted(items, key=lambda item: -len(item["input_ids"])))

    callback = Recorder()
    more = {"data_collator": Sorting()}
    plain = bits(trained(tmp_path, bert, Ragged(), more=more, dataloader_num_workers=workers))
    trainer = trained(tmp_path, bert, Ragged(), callback, more=more, dataloader_num_workers=workers)
    assert same(plain, bits(trainer))
    check_rows(callback.trajectory, Ragged())
    check(callback, trainer, Texts().queries())


class Backwards(Trainer):
    """A second call of the model, on other rows; with their ids, where `told`."""

    told = False

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        other = {name: value.flip(0) for name, value in inputs.items() if self.told or name != "pathkernel_ids"}
        return model(**inputs).loss + model(**other).loss


class BackwardsTold(Backwards):
    told = True


class TwoPassesByName(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        others = {name: value for name, value in inputs.items() if name != "pathkernel_ids"}
        return model(**inputs).loss + model(**others).loss


def test_a_second_call_on_other_rows_has_their_ids_or_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SampleIdError, match=r"called again in training.*pathkernel_ids=inputs\['pathkernel_ids'\]"):
        trained(tmp_path, bert, Texts(), Recorder(), trainer=Backwards)
    for kind in (BackwardsTold, TwoPassesByName):
        callback = Recorder()
        trainer = trained(tmp_path, bert, Texts(), callback, trainer=kind)
        check_rows(callback.trajectory, Texts())
        check(callback, trainer, Texts().queries())


class Counted(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (Texts()[i] for i in range(N))


def test_two_passes_of_a_stream_are_of_the_same_samples(tmp_path: Path) -> None:
    callback = Recorder()
    trainer = trained(tmp_path, bert, Counted(), callback, trainer=TwoPasses)
    assert sorted(check_rows(callback.trajectory, Texts())) == sorted(2 * list(range(N)))
    check(callback, trainer, Texts().queries())


def test_batches_that_are_no_loaders_are_counted_with_a_warning(tmp_path: Path) -> None:
    class Batches:
        batch_size = 4

        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter(torch.utils.data.DataLoader(Texts(), 4))

    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return Batches()

    callback = Recorder()
    with pytest.warns(RuntimeWarning, match=r"batches of a Batches.*counted.*ids=\"index\""):
        trained(tmp_path, bert, Texts(), callback, trainer=Own)
    assert check_rows(callback.trajectory, Texts()) == list(range(N))


# -- one callback, one training ----------------------------------------------------------------------------------------


def test_a_callback_that_is_given_twice(tmp_path: Path) -> None:
    callback = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trainer = trained(tmp_path, bert, Texts(), callback, callback)
    assert len(callback.trajectory) == 5
    check(callback, trainer, Texts().queries())


def test_two_callbacks_of_one_trainer_are_refused_before_training(tmp_path: Path) -> None:
    callbacks = Recorder(), Recorder()
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=Texts(), callbacks=list(callbacks))
    with pytest.raises(RecordingError, match=r"two TrainerRecorders.*Give it one"):
        trainer.train()
    gc.collect()
    callbacks[0].close()
    assert untouched(trainer)
    trainer.remove_callback(callbacks[1])
    trainer.train()
    check(callbacks[0], trainer, Texts().queries())


class Does(TrainerCallback):
    """Does something once, after the second step."""

    def __init__(self, what: Callable[[], Any]) -> None:
        self.what = what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            what, self.what = self.what, lambda: None
            self.found = what()


def test_a_callback_that_another_training_takes_away_says_so(tmp_path: Path) -> None:
    callback = Recorder()
    for does in (lambda: trained(tmp_path, bert, Texts(), callback), callback.close):
        with pytest.raises(RecordingError, match=r"does not record the training that goes on.*of its own"):
            trained(tmp_path, bert, Texts(), callback, Does(does))


def test_another_training_inside_leaves_it_alone(tmp_path: Path) -> None:
    callback, inner = Recorder(), Recorder()
    trainer = trained(tmp_path, bert, Texts(), callback, Does(lambda: trained(tmp_path, bert, Texts(), inner)))
    for own in (callback, inner):
        assert len(own.trajectory) == 5
    check(callback, trainer, Texts().queries())


def test_copies_in_the_midst_of_training_hold_what_was_recorded(tmp_path: Path) -> None:
    callback = Recorder()
    copies = Does(lambda: [copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))])
    trainer = trained(tmp_path, bert, Texts(), callback, copies)
    assert [len(each.trajectory) for each in copies.found] == [2, 2]
    for each in copies.found:
        each.close()
        assert (
            abs(each.machine(Texts().queries()) - pk.KernelMachine(callback.trajectory, at=2)(Texts().queries())).max()
            < 1e-6
        )
    check(callback, trainer, Texts().queries())


def test_a_training_that_ended_with_an_error_does_not_disturb_the_next(tmp_path: Path) -> None:
    """While somebody holds the error, as notebooks do."""

    class Ends(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = model(**inputs).loss
            if self.state.global_step == 2:
                raise ValueError("cable")
            return loss

    first, second, model = Recorder(), Recorder(), bert()
    with pytest.raises(ValueError, match="cable") as held:
        trained(tmp_path, lambda: model, Texts(), first, trainer=Ends)
    with pytest.warns(RuntimeWarning, match="still open"):
        trainer = trained(tmp_path, lambda: model, Texts(), second)
    assert held.value.args == ("cable",)
    assert [len(first.trajectory), len(second.trajectory)] == [2, 5]
    check(second, trainer, Texts().queries())
