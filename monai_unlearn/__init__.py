"""Machine unlearning for MONAI: engine handlers, bundles and a report of what was achieved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monai_unlearn.forget_set import ForgetSet

__all__ = ["ForgetSet", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when asked for: PyTorch and MONAI take seconds, and the command's --help needs neither.
    if name == "ForgetSet":
        from monai_unlearn.forget_set import ForgetSet

        return ForgetSet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
