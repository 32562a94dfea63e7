"""A small classification problem with a trainer, for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, EnsureTyped
from torch import nn

from monai_unlearn import auditing

# The networks of the tests are so small that threads only wait for each other, above all where several tests run at
# once; the first line is for processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a run, a fixture of their module, go to one process: two would make it twice."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(fixture.scope == "module" for definitions in fixtures for fixture in definitions):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def _pages_where_asked_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a page takes as long as a small run itself: only tests that are marked ``pages`` have them drawn."""
    monkeypatch.setattr(auditing, "_pages", request.node.get_closest_marker("pages") is not None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def records() -> list[dict]:
    """Thirty 1 × 6 × 6 images of three classes as MONAI records, six patients with five images each."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(30, 1, 6, 6, generator=generator)
    labels = torch.arange(30) % 3
    images += labels.view(-1, 1, 1, 1)
    return [
        {"image": image, "label": label, "index": i, "patient": f"P{i // 5}"}
        for i, (image, label) in enumerate(zip(images, labels))
    ]


@pytest.fixture
def make_network() -> Callable[..., nn.Module]:
    """A small network with convolution, BatchNorm and a linear layer."""

    def make(classes: int = 3, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        convolution = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

    return make


@pytest.fixture
def make_trainer(records: list[dict], make_network: Callable[..., nn.Module]) -> Callable[..., SupervisedTrainer]:
    """An ordinary MONAI trainer over the records, as a user would have it."""

    def make(handlers: list | tuple = (), **changes: object) -> SupervisedTrainer:
        network = changes.pop("network", None) or make_network()
        dataset = changes.pop("dataset", None) or Dataset(records, transform=Compose([EnsureTyped("image")]))
        batch_size, shuffle = changes.pop("batch_size", 8), changes.pop("shuffle", True)
        settings = {
            "device": "cpu",
            "max_epochs": 2,
            "train_data_loader": DataLoader(
                dataset, batch_size=batch_size, shuffle=shuffle, generator=torch.Generator().manual_seed(0)
            ),
            "network": network,
            "optimizer": torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
            "loss_function": nn.CrossEntropyLoss(),
            "decollate": False,
            "train_handlers": list(handlers),
        }
        return SupervisedTrainer(**{**settings, **changes})

    return make
