"""The loss over the ranks of a process group, against one process that holds the whole batch."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import proac_cuda
from proac_cuda.stages import exchange
from ranks import run_ranks

CLASSES, CHANNELS = 5, 8
OPTIONS = {
    "all negatives": {},
    "sampled": {"num_negatives": 37, "seed": 11},
    "few": {"num_negatives": 1, "seed": 3},
    "more than there are": {"num_negatives": 10**6, "seed": 3},
    "everything": {
        "num_negatives": 20,
        "seed": 5,
        "negative_reduction": "mean",
        "pixel_anchor_weight": 0.5,
        "label_sampling": "nearest-exact",
        "weighted": True,
    },
}


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Conv2d(3, CHANNELS, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images)


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 6, 7, generator=generator)
    labels = torch.randint(0, CLASSES, (8, 12, 14), generator=generator)
    labels[:2] = 255  # with four ranks, the first one has no valid pixel
    labels[2:4] = 3  # and the second one a single class
    return (
        images,
        labels,
        torch.randn(CLASSES, CHANNELS, generator=generator),
        torch.rand(labels.shape, generator=generator),
    )


def _splits(world_size: int) -> list[slice]:
    """Ranks hold different numbers of images."""
    bounds = {1: [0, 8], 2: [0, 3, 8], 4: [0, 2, 4, 7, 8]}[world_size]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def _losses(model, images, labels, prototypes, weight, dtype, group):
    """Summed over all options, in two accumulated steps, the second of them with the classes swapped."""
    values = []
    for settings in OPTIONS.values():
        options = dict(settings)
        if options.pop("weighted", False):
            options["pixel_weight"] = weight
            options["class_weight"] = torch.arange(1.0, CLASSES + 1)
        for y in (labels, torch.where(labels < CLASSES, (labels + 1) % CLASSES, labels)):
            loss = proac_cuda.proac_loss(model(images).to(dtype), y, prototypes, process_group=group, **options)
            loss.backward()
            values.append(loss.detach())
    return torch.stack(values)


def _worker(rank: int, world_size: int, port: int, dtype: torch.dtype, results: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # a warning about this package's own calls, or about names that PyTorch will drop
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(_Model())
    images, labels, prototypes, weight = _batch()
    mine = _splits(world_size)[rank]
    losses = _losses(model, images[mine], labels[mine], prototypes, weight[mine], dtype, dist.group.WORLD)
    gradients = [parameter.grad for parameter in model.parameters()]
    torch.save((losses, gradients), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process(world_size, dtype, tmp_path):
    torch.manual_seed(0)
    model = _Model()
    images, labels, prototypes, weight = _batch()
    expected = _losses(model, images, labels, prototypes, weight, dtype, None)
    run_ranks(_worker, (world_size, _free_port(), dtype, str(tmp_path)), world_size)
    for rank in range(world_size):
        losses, gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            error = (gradient - parameter.grad).norm() / parameter.grad.norm()
            assert error <= 1e-6, error


@pytest.mark.parametrize("num_negatives", [1, 2, 5, 17, 60, 10**4])
def test_sets_are_those_of_one_process_with_colliding_keys(num_negatives, monkeypatch):
    """Keys of two bits: nearly all are tied, within ranks and across them."""
    generator = torch.Generator().manual_seed(num_negatives)
    labels = torch.randint(-1, 4, (1, 90), generator=generator)
    monkeypatch.setattr(exchange, "philox_keys", lambda seed, index: (index * 7919) % 4 * 2**22)
    key = (torch.arange(90) * 7919) % 4 * 2**22
    sizes = [40, 0, 1, 49]
    features = torch.zeros(1, 1, 90)

    thresholds = _run_ranks(features, labels, sizes, num_negatives, monkeypatch)
    first = 0
    for size, threshold in zip(sizes, thresholds, strict=True):
        mine = torch.arange(first, first + size)
        for k in range(4):
            others = [i for i in range(90) if labels[0, i] >= 0 and labels[0, i] != k]
            taken = sorted(others, key=lambda i: (key[i].item(), i))[:num_negatives]
            last_key, last_index = threshold[k].tolist()
            found = [i for i in mine.tolist() if i in others and (key[i].item(), i) <= (last_key, last_index)]
            assert found == [i for i in mine.tolist() if i in set(taken)]
        first += size


def _run_ranks(features, labels, sizes, num_negatives, monkeypatch):
    """Each rank in a thread; gather is a barrier at which all ranks' tensors meet."""
    world = len(sizes)
    barrier, slots, local, results = threading.Barrier(world), [None] * world, threading.local(), [None] * world

    def gather(values, group):
        slots[local.rank] = values
        barrier.wait()
        stacked = torch.stack(slots)
        barrier.wait()
        return stacked

    monkeypatch.setattr(exchange, "gather", gather)
    monkeypatch.setattr(exchange.dist, "get_rank", lambda group: local.rank)

    def work(rank):
        local.rank = rank
        first = sum(sizes[:rank])
        part = slice(first, first + sizes[rank])
        state = exchange.share_rng_state(torch.tensor([1, 0]), sizes[rank], None)
        assert state.tolist() == [1, first]
        results[rank] = exchange.select_negatives(
            features[..., part], labels[..., part], None, state, num_negatives, 4, -1, False, None
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class _CopiesToDevice(TorchDispatchMode):
    """The ops that copy a CPU tensor to a CUDA device; each of them would make the host wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {item.device.type for item in (*arguments, result) if isinstance(item, torch.Tensor)}
            if devices == {"cpu", "cuda"}:
                self.seen.append(str(function))
        return result


def test_nothing_is_copied_to_the_device(monkeypatch):
    """Drawing the sets of all ranks, from labels that are read at another size."""
    monkeypatch.setattr(exchange, "gather", lambda values, group: torch.stack([values, values]))
    monkeypatch.setattr(exchange.dist, "get_rank", lambda group: 0)
    copies = _CopiesToDevice()
    with FakeTensorMode(), copies:
        features = torch.empty(2, 8, 4, 5, device="cuda")
        labels = torch.empty(2, 9, 13, dtype=torch.int64, device="cuda")
        state = torch.empty(2, dtype=torch.int64, device="cuda")
        thresholds = exchange.select_negatives(features, labels, None, state, 5, 3, 255, False, None)
        assert thresholds.shape == (3, 2) and not copies.seen
        torch.ones(1).to("cuda")
    assert copies.seen, "the mode sees a copy where there is one"


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_copies_share_the_group_and_pickles_hold_none(group):
    module = proac_cuda.ProACLoss(CLASSES, CHANNELS, process_group=group)
    assert copy.deepcopy(torch.nn.Sequential(module))[0].process_group is group
    assert torch.optim.swa_utils.AveragedModel(module).module.process_group is group
    with pytest.warns(UserWarning, match="process_group.*set module.process_group"):
        loaded = pickle.loads(pickle.dumps(module))
    assert loaded.process_group is None and module.process_group is group
    assert torch.equal(loaded.prototypes, module.prototypes)


def test_groups_that_are_none(group):
    features, labels, prototypes = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64), torch.randn(3, 8)

    def loss(process_group):
        return proac_cuda.proac_loss(features, labels, prototypes, process_group=process_group)

    assert torch.equal(loss(group), loss(None))
    with pytest.raises(ValueError, match="no member"):
        loss(dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(TypeError, match=r"DeviceMesh.*get_group\(\)"):
        loss(dist.device_mesh.init_device_mesh("cpu", (1,)))


@pytest.mark.slow
def test_a_call_with_a_group_compiles(group):
    features, labels, prototypes = torch.randn(4, 8), torch.arange(4) % 3, torch.randn(3, 8)

    def loss(x):
        return proac_cuda.proac_loss(x, labels, prototypes, process_group=group, num_negatives=2, seed=1)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(features), loss(features))


def _compare_ranks(rank: int, world_size: int, port: int, results: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)

    def said(**differs) -> str:
        options = {"process_group": dist.group.WORLD} | {name: values[rank] for name, values in differs.items()}
        model = torch.nn.Sequential(torch.nn.Identity(), proac_cuda.ProACLoss(4, 8, **options))
        try:
            proac_cuda.distributed.check_ranks(model)
        except ValueError as error:
            return str(error)
        return "all alike"

    texts = [
        said(),
        said(seed=[1, 2]),  # rank 0's is used, and a backend is a rank's own affair
        said(backend=["auto", "reference"]),
        said(temperature=[0.1, 0.2]),
        said(prototype_seed=[0, 1]),
        said(num_negatives=[None, 5]),
        said(process_group=[dist.group.WORLD, None]),
        said(class_weight=[torch.ones(4), None]),
    ]
    torch.save(texts, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_that_differ_are_found(tmp_path):
    """All of them print one loss, whatever they hold; and each has to be told."""
    run_ranks(_compare_ranks, (2, _free_port(), str(tmp_path)), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second and first[:3] == ["all alike"] * 3
    assert "1.temperature is not the same on all ranks (rank 0: 0.1, rank 1: 0.2)" in first[3]
    assert "1.prototypes" in first[4] and "hash" in first[4]
    assert "1.num_negatives" in first[5] and "1.ranks of process_group" in first[6] and "1.class_weight" in first[7]


def test_check_of_ranks_needs_ranks():
    with pytest.raises(RuntimeError, match="init_process_group"):
        proac_cuda.distributed.check_ranks(proac_cuda.ProACLoss(3, 4))
