"""The README's drop-in example, run as it stands on an existing data set and loader."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from monai.data import CacheDataset, DataLoader
from monai.networks.nets import ResNet
from monai.transforms import Compose, RandFlipd, ScaleIntensityd

README = Path(__file__).parents[1] / "README.md"


def test_drop_in_example_runs_on_a_users_data_set_and_loader() -> None:
    block = re.search(r"<!-- tests/test_readme.py runs this block -->\n```python\n(.*?)```", README.read_text(), re.S)
    assert block is not None
    records = [{"image": torch.rand(1, 12, 12), "label": i % 3, "patient_id": f"patient {i // 3}"} for i in range(45)]
    transform = Compose([ScaleIntensityd("image"), RandFlipd("image", prob=0.5)])
    network = ResNet("basic", [1, 1, 1, 1], [4, 4, 8, 8], spatial_dims=2, n_input_channels=1, num_classes=3)
    before = {name: value.clone() for name, value in network.named_parameters()}
    given = {
        "device": torch.device("cpu"),
        "loader": DataLoader(CacheDataset(records, transform, progress=False), batch_size=8, shuffle=True),
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3),
        "loss_function": torch.nn.CrossEntropyLoss(),
    }

    exec(block.group(1), given)

    assert given["trainer"].state.epoch == 5
    saliency = next(
        handler.__self__
        for handlers in given["trainer"]._event_handlers.values()
        for handler, *_ in handlers
        if type(getattr(handler, "__self__", None)).__name__ == "SaliencyMask"
    )
    changed = {name: value != before[name] for name, value in network.named_parameters()}
    assert any(bool(difference.any()) for difference in changed.values())
    for name, may_change in saliency.mask.items():
        assert not bool((changed[name] & ~may_change).any()), name
