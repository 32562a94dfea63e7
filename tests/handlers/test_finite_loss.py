"""A loss that is no number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import nn

from monai_unlearn.handlers import FiniteLoss

MakeTrainer = Callable[..., SupervisedTrainer]


class _Breaking(nn.Module):
    """Cross entropy that becomes another value at one of its calls."""

    def __init__(self, call: int, value: float) -> None:
        super().__init__()
        self.call, self.value, self.calls = call, value, 0

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = nn.functional.cross_entropy(logits, labels)
        return loss * self.value if self.calls == self.call else loss


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("call", [1, 3, 6])
def test_the_run_ends_at_the_first_one_before_its_step(make_trainer: MakeTrainer, call: int, value: float) -> None:
    loss = _Breaking(call, value)
    trainer = make_trainer([FiniteLoss()], loss_function=loss)
    weights = {}

    @trainer.on(Events.ITERATION_STARTED)
    def _keep(engine: Engine) -> None:
        weights.update({name: value.clone() for name, value in engine.network.named_parameters()})

    message = rf"should be finite, but is {value} in iteration {call} \(epoch {1 + (call - 1) // 4}\)"
    with pytest.raises(FloatingPointError, match=message):
        trainer.run()
    assert loss.calls == call
    for name, parameter in trainer.network.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_a_finite_loss_passes(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer([FiniteLoss()], loss_function=_Breaking(3, 1e6))
    trainer.run()
    assert trainer.state.iteration == 8


def test_nan_in_the_images_is_found_through_the_loss(make_trainer: MakeTrainer, records: list[dict]) -> None:
    records[7]["image"][0, 2, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="check the images for NaN"):
        make_trainer([FiniteLoss()]).run()
