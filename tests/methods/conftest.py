"""What the tests of all methods need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset
from torch import nn

from monai_unlearn import ForgetSet

State = dict[str, torch.Tensor]


@pytest.fixture
def forget() -> ForgetSet:
    """Two of the six patients: ten of the thirty records."""
    return ForgetSet(["P0", "P3"], key="patient")


@pytest.fixture
def snapshot() -> Callable[[nn.Module], State]:
    """A copy of a network's whole state."""
    return lambda network: {name: value.detach().clone() for name, value in network.state_dict().items()}


@pytest.fixture
def same_bits() -> Callable[[State, State], bool]:
    """Whether two states are equal bit by bit: -0.0 is not 0.0, and NaN is NaN."""

    def bits(value: torch.Tensor) -> torch.Tensor:
        return value.detach().contiguous().view(-1).view(torch.uint8)

    def same(one: State, other: State) -> bool:
        return one.keys() == other.keys() and all(torch.equal(bits(one[name]), bits(other[name])) for name in one)

    return same


@pytest.fixture
def double(records: list[dict]) -> Dataset:
    """The records in float64."""
    return Dataset([{**record, "image": record["image"].double()} for record in records])


@pytest.fixture
def on() -> Callable:
    """A handler that calls a function with the engine at an event."""

    class On:
        def __init__(self, event: object, function: Callable[[Engine], object]) -> None:
            self.event, self.function = event, function

        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(self.event, self.function)

    return On


@pytest.fixture
def loader_of() -> Callable[..., DataLoader]:
    """A loader in order over some records."""
    return lambda records, batch_size=8: DataLoader(Dataset(records), batch_size=batch_size)


@pytest.fixture
def begin_again() -> Callable[[Engine], None]:
    """Make a trainer whose run an exception ended start a new run from its first epoch."""

    def begin(trainer: Engine) -> None:
        trainer.state.epoch = trainer.state.iteration = 0
        trainer.data_loader.generator.manual_seed(0)
        trainer._internal_run_generator = None  # Ignite 0.5.5 keeps the used one, and the next run would do nothing

    return begin
