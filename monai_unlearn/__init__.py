"""Machine unlearning for MONAI: engine handlers, bundles and a report of what was achieved."""

from monai_unlearn.forget_set import ForgetSet

__all__ = ["ForgetSet", "__version__"]

__version__ = "0.1.0"
