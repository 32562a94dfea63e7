"""On what and with what a result was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

__all__ = ["machine", "versions"]


def machine(device: torch.device) -> dict[str, str | int]:
    """Fingerprint of the machine, by which two measured times may be compared or not."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "torch": torch.__version__,
    }


def versions() -> dict[str, str]:
    """Versions of Python and the packages that the numbers depend on."""
    packages = ("monai_unlearn", "monai", "torch", "pytorch-ignite", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
