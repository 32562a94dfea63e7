"""Checkpoints as MONAI's ``CheckpointSaver`` writes them: read strictly, written in the form they came in."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.handlers import MetricLoggerKeys
from monai.utils import InterpolateMode, TraceKeys
from torch import nn

__all__ = ["Checkpoint", "file_hash", "load_checkpoint", "save_atomically"]

# Where a checkpoint that is a dict of dicts keeps the network, in the order in which they are tried.
NETWORK_KEYS = ("model", "network", "net", "state_dict")


def _plain_dict(*_: object) -> dict:
    """Takes the place of ``defaultdict``, into which torch fills nothing under ``weights_only``."""
    return {}


_plain_dict.__module__, _plain_dict.__name__, _plain_dict.__qualname__ = "collections", "defaultdict", "defaultdict"
# What the state of MONAI's MetricLogger holds, which many training bundles keep beside the network: losses, often as
# MetaTensor, and metrics, often as NumPy's numbers. None of it runs anything when it is read.
NUMBERS: list[np.generic] = [np.float32(0), np.float64(0), np.int64(0)]
HARMLESS: list = [
    *(_plain_dict, list, MetricLoggerKeys, TraceKeys, InterpolateMode),
    *(np.dtype, NUMBERS[0].__reduce__()[0], *(type(number.dtype) for number in NUMBERS)),
]


@dataclass(frozen=True)
class Checkpoint:
    """A network's state as a file holds it.

    Args:
        state_dict: parameter and buffer name → tensor, without a prefix of distributed training.
        key: key of the network's state in the file; None if the file is the state itself.
        prefix: what stands before every name in the file (``"module."``, or nothing).
    """

    state_dict: dict[str, torch.Tensor]
    key: str | None = None
    prefix: str = ""

    def load_into(self, network: nn.Module) -> None:
        """Load the state into a network, strictly.

        Raises:
            ValueError: if names or shapes differ, with the first differences.
        """
        own = network.state_dict()
        missing = [name for name in own if name not in self.state_dict]
        surplus = [name for name in self.state_dict if name not in own]
        differ = [
            f"{name} is {tuple(self.state_dict[name].shape)} in the checkpoint and {tuple(own[name].shape)} here"
            for name in own
            if name in self.state_dict and own[name].shape != self.state_dict[name].shape
        ]
        if missing or surplus or differ:
            first = (differ + [f"{n} is missing" for n in missing] + [f"{n} is unknown" for n in surplus])[0]
            raise ValueError(
                f"The checkpoint is of another network: {len(missing)} entries are missing, {len(surplus)} unknown, "
                f"{len(differ)} of another shape (first: {first}). Give network_def the architecture, channels and "
                "number of classes that the checkpoint was trained with."
            )
        network.load_state_dict(self.state_dict, strict=True)

    def with_state_of(self, network: nn.Module) -> dict:
        """The content of a file of this form with another network's state, and nothing else.

        Optimizer, averaged copies and trainer state carry traces of the forget set and are never taken over.
        """
        state = {}
        for name, value in network.state_dict().items():
            original = self.state_dict.get(name)
            value = value.detach().cpu().contiguous()
            state[self.prefix + name] = value if original is None else value.to(original.dtype)
        return state if self.key is None else {self.key: state}


def load_checkpoint(path: str | os.PathLike, key: str | None = None) -> Checkpoint:
    """Read a network's state with ``weights_only=True``.

    Args:
        path: a bare state dict, or a dict with one under ``model``, ``network``, ``net`` or ``state_dict``.
        key: key of the network's state, if it is another.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds code, holds no network, or holds values that are not finite.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The checkpoint {str(path)!r} does not exist. Check the path.")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "eights_only" in str(error) and "GLOBAL" in str(error).upper():
            raise ValueError(
                f"{file.name} holds more than tensors: loading it would run code from the file. Save the network's "
                "state_dict alone (torch.save(network.state_dict(), FILE)) where you trust the file."
            ) from None
        raise ValueError(
            f"{file.name} could not be read as a checkpoint. It is damaged, or none: get it again."
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # damage shows as whatever the unpickler trips over: TypeError, struct.error, …
        raise ValueError(
            f"{file.name} could not be read as a checkpoint. It is damaged, or none: get it again."
        ) from error

    if key is None and isinstance(content, Mapping) and not _is_state(content):
        key = next((known for known in NETWORK_KEYS if isinstance(content.get(known), Mapping)), None)
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            there = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(f"{file.name} has no {key!r}; it holds {there}. Give the right one with --network_key.")
        content = content[key]
    if not isinstance(content, Mapping) or not _is_state(content):
        there = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{file.name} holds no network state under {', '.join(NETWORK_KEYS)}; it holds {there}. "
            "Name the key with --network_key."
        )
    bad = sum(not bool(torch.isfinite(value).all()) for value in content.values() if value.is_floating_point())
    if bad:
        raise ValueError(f"{file.name}: {bad} tensors hold NaN or infinity. The model is broken: use an earlier one.")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return Checkpoint({name[len(prefix) :]: value for name, value in content.items()}, key, prefix)


def _is_state(content: Mapping) -> bool:
    return bool(content) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())


def save_atomically(content: object, path: str | os.PathLike) -> None:
    """``torch.save`` to a file that appears whole or not at all.

    Raises:
        OSError: if it can't be written, as on a full disk.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        # Given a name, torch writes it into the file, and says "unexpected pos" where the disk is full.
        with open(unfinished, "wb") as file:
            torch.save(content, file)
        os.replace(unfinished, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            sha.update(block)
    return sha.hexdigest()
