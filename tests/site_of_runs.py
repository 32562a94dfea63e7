"""A folder as runs leave it: results, an earlier run, kept models, and a user's own checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_unlearn.checkpoint import file_hash
from monai_unlearn.data.duplicates import _write_cache
from monai_unlearn.leftovers import find
from monai_unlearn.output import write_json

ORIGINAL, RETRAINED, SHADOW = "0123456789abcdef", "fedcba9876543210", "00112233445566ff"
OWN = Path("runs/saliency")
MODELS = Path("runs/models")
# What finalise removes, relative to the site.
OURS = [
    "runs/saliency/private",
    "runs/saliency.1/private",
    "runs/saliency.1/unlearned_model.pt",
    f"runs/models/{ORIGINAL}",
    f"runs/models/shadow/{SHADOW}",
    "runs/models/duplicates.hashes",
]


def save_network(path: Path, seed: int = 0, **more: Any) -> Path:
    """A network's state, or with ``more`` a checkpoint that has it among others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    state = torch.nn.Linear(8, 3).state_dict()
    torch.save({"model": state, **more} if more else state, path)
    return path


def optimizer_state() -> dict:
    """What an optimizer keeps after a step."""
    network = torch.nn.Linear(8, 3)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def keep_model(folder: Path, what: str, seed: int = 0) -> Path:
    """A model as ``training.py`` keeps it."""
    save_network(folder / "model.pt", seed)
    cost = {"seconds": 1.0, "samples": 2, "forward": 3, "backward": 4}
    write_json(
        {"what": what, "cost": cost, "machine": {}, "sha256": file_hash(folder / "model.pt")}, folder / "training.json"
    )
    if what == "original":
        (folder / "history.csv").write_text("forgetting\n0\n")
    return folder


def keep_shadow(folder: Path) -> Path:
    """Scores of a shadow model as ``shadow.py`` keeps them."""
    folder.mkdir(parents=True)
    np.savez(folder / "scores.npz", scores=np.arange(4.0))
    write_json({"shadow": 0, "depends_on": "x-0", "sha256": file_hash(folder / "scores.npz")}, folder / "record.json")
    return folder


def write_run(folder: Path, seed: int, **report: Any) -> Path:
    """A run's folder, with mask, key and models."""
    save_network(folder / "unlearned_model.pt", seed)
    (folder / "private").mkdir()
    (folder / "private" / "saliency_mask.safetensors").write_bytes(b"mask" * 1000)
    (folder / "private" / "split_key").write_text("ab" * 32)
    (folder / "split.json").write_text("{}")
    (folder / "report.html").write_text("<p>old</p>")
    hashes = {"unlearned": file_hash(folder / "unlearned_model.pt")}
    write_json({"schema_version": "1.2", "provenance": {"hashes": hashes}, **report}, folder / "report.json")
    return folder


def read_report(folder: Path = OWN) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def change_report(folder: Path = OWN, **changes: Any) -> None:
    write_json({**read_report(folder), **changes}, folder / "report.json")


def make_site(root: Path, output_dir: str = str(OWN), **more: Any) -> list[dict[str, Any]]:
    """Write the site into a folder that is the working directory, and return what ``find`` lists."""
    own = write_run(root / OWN, 1)
    write_run(root / f"{OWN}.1", 2)
    original = keep_model(root / MODELS / ORIGINAL, "original", 3)
    keep_model(root / MODELS / RETRAINED, "retrained", 4)
    for number in range(2):
        keep_shadow(root / MODELS / "shadow" / SHADOW / f"shadow-{number:03d}")
    _write_cache(root / MODELS / "duplicates.hashes", {bytes(16): bytes(range(16))})
    given = Path(MODELS if not Path(output_dir).is_absolute() else root / MODELS)
    arguments: dict[str, Any] = {
        "original": given / ORIGINAL / "model.pt",
        "models_dir": given,
        "retrained": [given / RETRAINED],
        "shadow": [given / "shadow" / SHADOW],
        **more,
    }
    left = find(output_dir, **arguments)
    hashes = {"unlearned": file_hash(own / "unlearned_model.pt"), "original": file_hash(original / "model.pt")}
    change_report(
        own,
        settings={"output_dir": output_dir, "models_dir": str(given)},
        provenance={"hashes": hashes},
        left=left,
    )
    return left


def everything(root: Path) -> dict[str, bytes]:
    """Every file's content, every folder and link, by its path."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        for path in root.rglob("*")
    }
