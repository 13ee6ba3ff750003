"""Processes beside the training process: workers of data loaders that call the loss or hold the module."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import proac_cuda

_IMPORTING = ("spawn", "forkserver")  # whose workers import PyTorch anew, which takes them seconds


class _Losses(Dataset):
    """Each item is a loss: computed where the item is asked for."""

    def __init__(self, backend: str) -> None:
        self.module = proac_cuda.ProACLoss(5, 16, num_negatives=50, seed=3, backend=backend)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        features = torch.randn(2, 16, 64, 64, generator=generator).requires_grad_()
        labels = torch.randint(0, 5, (2, 128, 128), generator=generator)
        loss = self.module(features, labels)
        loss.backward()
        return torch.stack([loss.detach(), features.grad.double().norm().float()])


@pytest.mark.parametrize("context", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in _IMPORTING)])
def test_workers_call_the_loss(backend, context):
    """After the parent has used the kernels' threads, which are PyTorch's and not there in a forked worker.

    Workers run with one thread, as the data loader has it; PyTorch's own operations hang in a forked one that asks for more.
    """
    if backend.device == "cuda" or backend.name == "triton":
        pytest.skip("workers of data loaders run on the CPU")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        losses = _Losses(backend.name)
        expected = torch.stack([losses[index] for index in range(len(losses))])
        loader = DataLoader(losses, batch_size=3, num_workers=2, multiprocessing_context=context, timeout=120)
        actual = torch.cat(list(loader))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(actual, expected) or (backend.name == "reference" and torch.allclose(actual, expected))
