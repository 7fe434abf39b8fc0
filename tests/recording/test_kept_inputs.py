"""What the network saw is what is kept: augmentation, scaling, padding, streams, and data that are not at hand."""

import copy
import pickle
import random

import pytest
import torch
from cases import generator
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pathkernel as pk
from pathkernel.errors import InputError, SampleIdError

CE, N = nn.CrossEntropyLoss(), 24
torch.manual_seed(0)
X, Y = torch.randn(N, 4), torch.randint(2, (N,))
PIXELS = (255 * torch.rand(N, 4)).to(torch.uint8)
RAGGED = [torch.randn(int(n), 3) for n in torch.randint(2, 6, (N,))]


class Items(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.item(i)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.linear(x)).sum(1)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, a, b):
        return self.net(a) - 0.5 * self.net(b).tanh()


def padded(samples):
    return pad_sequence([a for a, _ in samples], batch_first=True), torch.stack([b for _, b in samples])


def scaled(samples):
    return torch.stack([a for a, _ in samples]) / 255, torch.stack([b for _, b in samples])


def noisy(i):
    return X[i] + 0.1 * torch.randn(4), Y[i]


def pair(i):
    return (X[i], X[random.randrange(N)]), Y[i]


def as_it_is(batch):
    return batch


class Case:
    """One loader of the user: dataset, network, collate function, what the loop makes of a batch, data, keep."""

    def __init__(self, dataset, network=lambda: nn.Linear(4, 2), unpack=as_it_is, data=None, keep=None, **loader):
        self.dataset, self.network, self.unpack, self.keep, self.loader = dataset, network, unpack, keep, loader
        self.data = (lambda: dataset) if data is None else data


def labelled(batch):
    return batch["image"], batch["label"]


def in_loop(batch):
    return batch[0] / 255, batch[1]


CASES = {
    "plain dataset": Case(TensorDataset(X, Y)),
    "indexed dataset": Case(pk.IndexedDataset(TensorDataset(X, Y)), data=lambda: (X, Y)),
    "workers": Case(TensorDataset(X, Y), num_workers=1),
    "items are dicts": Case(Items(lambda i: {"image": X[i], "label": Y[i]}), unpack=labelled),
    "ragged, padded by collate_fn": Case(Items(lambda i: (RAGGED[i], Y[i])), Sums, collate_fn=padded),
    "bytes, scaled by collate_fn": Case(TensorDataset(PIXELS, Y), collate_fn=scaled),
    "bytes, scaled in the loop": Case(TensorDataset(PIXELS, Y), unpack=in_loop, keep=True),
    "augmented": Case(Items(noisy)),
    "augmented, kept": Case(Items(noisy), keep=True, data=lambda: (X, Y)),
    "random pairs": Case(Items(pair), Pair),
    "two inputs": Case(Items(lambda i: ((X[i], X[-i]), Y[i])), Pair),
    "length alone": Case(TensorDataset(X, Y), data=lambda: N),
    "nothing": Case(TensorDataset(X, Y), data=lambda: "nothing"),
    "stream": Case(Stream(), data=lambda: "nothing"),
    "stream of a known length": Case(Stream(), data=lambda: N),
}


def loader_of(case):
    if isinstance(case.dataset, IterableDataset):
        return DataLoader(case.dataset, batch_size=8, **case.loader)
    generator = torch.Generator().manual_seed(3)
    return DataLoader(case.dataset, batch_size=8, shuffle=True, generator=generator, **case.loader)


def prepared(case):
    torch.manual_seed(5)
    random.seed(5)
    model = case.network()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def loop(model, optimizer, batches, unpack, seen=None):
    for batch in batches:
        if isinstance(batch, pk.recording.indexed.IndexedBatch):  # the plain loop over an `IndexedDataset`
            batch = batch.batch
        x, target = unpack(batch)
        optimizer.zero_grad()
        z = model(*x) if isinstance(x, (list, tuple)) else model(x)
        CE(z, target).backward()
        if seen is not None:
            seen.append(copy.deepcopy(x))
        optimizer.step()


def record(case, epochs=1, **options):
    model, optimizer = prepared(case)
    data, seen = case.data(), []
    given = {} if isinstance(data, str) else {"data": data}
    loader = loader_of(case)
    with pk.KernelRecorder(model, optimizer, CE, audit_every=1, **given, **options) as recorder:
        for _ in range(epochs):
            loop(model, optimizer, recorder.track(loader, keep=case.keep), case.unpack, seen)
    return recorder.trajectory, seen, given


@pytest.mark.parametrize("name", CASES)
def test_loaders_of_the_user(name, tmp_path):
    case = CASES[name]
    trajectory, seen, given = record(case, epochs=2, store=tmp_path / "run")
    plain, optimizer = prepared(case)
    bare = case.dataset.dataset if isinstance(case.dataset, pk.IndexedDataset) else case.dataset
    loader = loader_of(Case(bare, **case.loader))
    for _ in range(2):
        loop(plain, optimizer, loader, case.unpack)
    assert all(torch.equal(p, q) for p, q in zip(trajectory.model.parameters(), plain.parameters(), strict=True))

    queries = torch.utils._pytree.tree_map(lambda leaf: leaf[:2], seen[0])
    queries = tuple(queries) if isinstance(queries, list) else queries
    opened = pk.Trajectory.open(tmp_path / "run", model=trajectory.model, loss=CE, data=given.get("data"))
    whys = [pk.KernelMachine(each).explain(queries, outputs=1) for each in (trajectory, opened)]
    for why in whys:
        assert max(*why.residual, why.split_error) <= 1e-5
    assert torch.equal(*(torch.as_tensor(why.shares) for why in whys))
    assert len(opened.data) == len(trajectory.data) == (2 * N if name == "stream" else N)
    assert (torch.as_tensor(whys[0].shares) != 0).any(0).all()
    with torch.no_grad():
        z = trajectory.model(*queries) if isinstance(queries, tuple) else trajectory.model(queries)
    assert torch.allclose(torch.as_tensor(whys[0].output).float(), z[:, 1], atol=1e-5)


def test_ids_alone_where_the_data_hold_the_same():
    trajectory, _, _ = record(CASES["plain dataset"])
    assert all(batch.inputs is None for step in trajectory.steps() for batch in step.batches)
    case = Case(TensorDataset(X, Y), keep=True)
    assert all(batch.inputs is None for step in record(case)[0].steps() for batch in step.batches)


def test_kept_inputs_are_what_the_network_saw():
    trajectory, seen, _ = record(CASES["augmented, kept"])
    kept = [batch.inputs for step in trajectory.steps() for batch in step.batches]
    assert all(torch.equal(one, other) for one, other in zip(kept, seen, strict=True))


def test_shares_of_kept_inputs_are_those_of_announced_ones():
    trajectory, seen, _ = record(CASES["augmented, kept"])
    ids = [batch.ids for step in trajectory.steps() for batch in step.batches]
    model, optimizer = prepared(CASES["augmented, kept"])
    with pk.KernelRecorder(model, optimizer, CE, (X, Y)) as recorder:
        for i, x in zip(ids, seen, strict=True):
            recorder.announce(i, inputs=x)
            optimizer.zero_grad()
            CE(model(x), Y[i]).backward()
            optimizer.step()
    whys = [pk.KernelMachine(each).explain(X[:2]) for each in (trajectory, recorder.trajectory)]
    assert torch.equal(*(torch.as_tensor(why.shares) for why in whys))


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_scaled_in_the_loop_is_refused_unless_it_is_kept(bias):
    """With a bias, scaled inputs look like the clipping of single parameters: the gradient does not tell."""
    case = Case(TensorDataset(PIXELS, Y), lambda: nn.Linear(4, 2, bias=bias), in_loop)
    with pytest.raises(SampleIdError, match="keep=True") as caught:
        record(case)
    assert "not moved" in str(caught.value)


def test_wrong_ids_are_noticed_by_default():
    model, optimizer = prepared(CASES["plain dataset"])
    with pytest.raises(SampleIdError), pk.KernelRecorder(model, optimizer, CE, (X, Y)) as recorder:
        batches = recorder.track(DataLoader(TensorDataset(X, Y), batch_size=8))
        first = next(batches)
        next(batches)
        CE(model(first[0]), first[1]).backward()
        optimizer.step()


def test_wrong_ids_are_noticed_where_batches_are_kept_by_themselves():
    """Augmented batches are kept from the first on, and compared with what came with their ids."""
    model, optimizer = prepared(CASES["augmented"])
    with (
        pytest.raises(SampleIdError, match="handed out"),
        pk.KernelRecorder(model, optimizer, CE, Items(noisy), audit_every=1) as recorder,
    ):
        batches = recorder.track(DataLoader(Items(noisy), batch_size=8))
        loop(model, optimizer, [next(batches)], as_it_is)
        early = next(batches)
        next(batches)
        loop(model, optimizer, [early], as_it_is)


def test_streams_are_counted_over_loaders():
    model, optimizer = prepared(CASES["stream"])
    with pk.KernelRecorder(model, optimizer, CE) as recorder:
        for _ in range(2):
            loop(model, optimizer, recorder.track(DataLoader(Stream(), batch_size=8)), as_it_is)
    first = [batch.ids[0].item() for step in recorder.trajectory.steps() for batch in step.batches]
    assert first == list(range(0, 2 * N, 8))
    assert len(recorder.trajectory.data) == 2 * N


@pytest.mark.parametrize("data", [{}, {"data": 2 * N}], ids=["counted", "length"])
def test_a_recording_without_data_goes_on(data, tmp_path):
    model, optimizer = prepared(CASES["stream"])
    for _ in range(2):
        with pk.KernelRecorder(model, optimizer, CE, store=tmp_path / "run", **data) as recorder:
            loop(model, optimizer, recorder.track(DataLoader(Stream(), batch_size=8)), as_it_is)
    first = [batch.ids[0].item() for step in recorder.trajectory.steps() for batch in step.batches]
    assert first == (list(range(0, N, 8)) * 2 if data else list(range(0, 2 * N, 8)))
    assert pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=1).residual.max() <= 1e-5


def test_worker_processes_persist():
    model, optimizer = prepared(CASES["plain dataset"])
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, num_workers=1, persistent_workers=True)
    with pk.KernelRecorder(model, optimizer, CE, (X, Y)) as recorder:
        loop(model, optimizer, recorder.track(loader), as_it_is)
        ((_, tracked),) = recorder._parts.loaders._known.values()
        workers = tracked._iterator._workers
        loop(model, optimizer, recorder.track(loader), as_it_is)
        assert tracked._iterator._workers is workers and loader._iterator is None
        tracked._iterator._shutdown_workers()


@pytest.mark.parametrize("schedule", [None, pk.Nothing()], ids=["kept", "streamed"])
def test_shares_while_training_runs(schedule):
    case = CASES["length alone"]
    shares = pk.StreamingShares(X[:2], outputs="all")
    trajectory, _, _ = record(case, observers=[shares], schedule=schedule)
    assert shares.result.residual.max() <= 1e-5
    if schedule is None:
        why = pk.KernelMachine(trajectory).explain(X[:2], outputs="all")
        assert torch.allclose(*(torch.as_tensor(each.shares) for each in (why, shares.result)), atol=1e-6)


def test_a_batch_that_is_overwritten_is_kept_as_it_was():
    model, optimizer = prepared(CASES["plain dataset"])
    buffer = torch.empty(8, 4)
    with pk.KernelRecorder(model, optimizer, CE, N) as recorder:
        for i in torch.arange(N).split(8):
            recorder.announce(i)
            buffer.copy_(X[i] + 1)
            optimizer.zero_grad()
            CE(model(buffer), Y[i]).backward()
            buffer.zero_()
            optimizer.step()
    assert torch.equal(recorder.trajectory.store.read(0).batches[0].inputs, X[:8] + 1)


@pytest.mark.parametrize("name", ["augmented, kept", "ragged, padded by collate_fn", "nothing"])
def test_keyframes_and_pickles(name):
    trajectory, seen, _ = record(CASES[name], schedule=pk.Keyframes(8))
    again = pickle.loads(pickle.dumps(trajectory)) if "padded" not in name else trajectory
    why = pk.KernelMachine(again).explain(seen[0][:2], outputs=1)
    assert max(*why.residual, why.split_error) <= 1e-5


class WithLoss(nn.Module):
    """Returns ``(logits, loss)``; without labels, the logits of the last place alone, as GPTs do."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)

    def forward(self, ids, labels=None):
        if labels is None:
            return self.head(torch.tanh(self.words(ids[:, -1:]))), None
        logits = self.head(torch.tanh(self.words(ids)))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("given", ["by place", "by name"])
def test_labels_by_place_or_by_name_without_data(given, tmp_path):
    torch.manual_seed(5)
    model, text = WithLoss().double(), torch.randint(7, (N, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, outputs=0, audit_every=1, store=tmp_path / "run") as recorder:
        for i in torch.arange(N).split(8):
            recorder.announce(i)
            x, target = text[i, :-1], text[i, 1:]
            optimizer.zero_grad()
            _, loss = model(x, target) if given == "by place" else model(ids=x, labels=target)
            loss.backward()
            optimizer.step()
    opened = pk.Trajectory.open(tmp_path / "run", model=model)
    x, target = text[:2, :-1], text[:2, 1:]
    queries = [x, (x, target)] if given == "by place" else [{"ids": x}, {"labels": target, "ids": x}]
    for query, outputs in zip(queries, (7, 4 * 7), strict=True):
        for record in (recorder.trajectory, opened):
            why = pk.KernelMachine(record).explain(query, outputs="all")
            assert len(why.output) == 2 * outputs
            assert max(*why.residual, why.split_error) <= 1e-10


def test_queries_look_like_what_was_announced():
    trajectory, _, _ = record(CASES["nothing"])
    with pytest.raises(InputError, match=r"\(n, 4\)"):
        pk.KernelMachine(trajectory).explain(torch.zeros(2, 5))
    ragged, _, _ = record(CASES["ragged, padded by collate_fn"])
    assert pk.KernelMachine(ragged).explain(torch.randn(2, 9, 3)).residual.max() <= 1e-5


def test_what_needs_the_data_says_so():
    trajectory, _, _ = record(CASES["length alone"])
    with pytest.raises(InputError, match="the number of samples alone"):
        trajectory.data[torch.arange(2)]
    model, optimizer = prepared(CASES["nothing"])
    recorder = pk.KernelRecorder(model, optimizer, CE)
    with pytest.raises(InputError, match="not given"):
        next(iter(recorder.batches(8)))
    dicts = pk.KernelRecorder(model, optimizer, CE, CASES["items are dicts"].dataset)
    with pytest.raises(InputError, match="whose items are a dict"):
        next(iter(dicts.batches(8)))


def test_ids_beyond_the_length_are_refused():
    model, optimizer = prepared(CASES["nothing"])
    recorder = pk.KernelRecorder(model, optimizer, CE, data=N)
    with pytest.raises(SampleIdError, match=f"to {N - 1}"):
        recorder.announce([N])


class Fields(IterableDataset):
    def __iter__(self):
        for i in reversed(range(N)):
            yield {"x": X[i], "y": Y[i], "index": i}


@pytest.mark.parametrize("ids", ["index", lambda batch: batch["index"]], ids=["key", "callable"])
def test_ids_from_a_field(ids):
    model, optimizer = prepared(CASES["nothing"])
    with pk.KernelRecorder(model, optimizer, CE, (X, Y), audit_every=1) as recorder:
        loop(model, optimizer, recorder.track(DataLoader(Fields(), batch_size=8), ids=ids), lambda b: (b["x"], b["y"]))
    assert recorder.trajectory.store.read(0).batches[0].ids.tolist() == list(range(N - 1, N - 9, -1))
    assert recorder.trajectory.store.read(0).batches[0].inputs is None


class Mislabelled(IterableDataset):
    def __iter__(self):
        for i in range(N):
            yield {"x": X[i], "y": Y[i], "index": (i + 1) % N}


def counted(recorder):
    """Batches in another order than the data, counted as they come."""
    order = torch.arange(N).roll(5).split(8)
    return (recorder.take_ids(batch) for batch in pk.indexed([{"x": X[i], "y": Y[i]} for i in order]))


@pytest.mark.parametrize(
    "batches",
    [lambda recorder: recorder.track(DataLoader(Mislabelled(), batch_size=8), ids="index"), counted],
    ids=["field", "counted"],
)
def test_ids_that_did_not_come_with_their_samples_are_compared_with_the_data(batches):
    """What differs from the data is kept by itself only where ids were collected with the samples."""
    model, optimizer = prepared(CASES["nothing"])
    before = model.weight.clone()
    with pytest.raises(SampleIdError, match="keep=True"), pk.KernelRecorder(model, optimizer, CE, (X, Y)) as recorder:
        loop(model, optimizer, batches(recorder), lambda b: (b["x"], b["y"]))
    assert torch.equal(model.weight, before)


def test_a_field_that_is_not_there():
    recorder = pk.KernelRecorder(*prepared(CASES["nothing"]), CE, (X, Y))
    with pytest.raises(SampleIdError, match="'x', 'y', 'index'"):
        next(iter(recorder.track(DataLoader(Fields(), batch_size=8), ids="id")))


def test_streams_have_no_places_in_the_data():
    recorder = pk.KernelRecorder(*prepared(CASES["nothing"]), CE, (X, Y))
    with pytest.raises(SampleIdError, match="over a Stream"):
        next(iter(recorder.track(DataLoader(Stream(), batch_size=8))))


@pytest.mark.parametrize("make", [lambda: TensorDataset(X, Y), Stream], ids=["map", "stream"])
def test_loops_of_others(make):
    model, optimizer = prepared(CASES["nothing"])
    loader = pk.indexed(DataLoader(make(), batch_size=8))
    assert len(loader) == 3 if isinstance(make(), TensorDataset) else True
    with pk.KernelRecorder(model, optimizer, CE, data=N, audit_every=1) as recorder:
        for batch in loader:
            x, target = recorder.take_ids(batch)
            optimizer.zero_grad()
            CE(model(x), target).backward()
            optimizer.step()
    assert [b.ids[0].item() for s in recorder.trajectory.steps() for b in s.batches] == [0, 8, 16]
    assert pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=1).residual.max() <= 1e-5
    with pytest.raises(SampleIdError, match=r"pathkernel\.indexed"):
        recorder.take_ids((X, Y))


@pytest.mark.parametrize("data", ["tensors", "number", "nothing"])
def test_batches_that_are_fetched_ahead_of_their_pass_are_refused(data: str) -> None:
    """Inputs may be anything with ``keep=True``; those of the batch before say that ids have shifted."""
    g = generator(7)
    X, y = torch.randn(12, 4, generator=g), torch.randint(3, (12,), generator=g)
    model = nn.Linear(4, 3)
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    given = {"tensors": (X, y), "number": 12, "nothing": None}[data]
    loader = DataLoader(TensorDataset(X, y), batch_size=4)
    with (
        pytest.raises(pk.errors.SampleIdError, match="handed out by `track` with the batch before"),
        pk.KernelRecorder(model, optimizer, data=given) as recorder,
    ):
        batches = recorder.track(loader, keep=True)
        following = next(batches, None)
        while following is not None:
            (x, target), following = following, next(batches, None)
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
