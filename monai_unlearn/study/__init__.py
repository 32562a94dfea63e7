"""Studies: methods × forget sets × seeds, into one table."""

from monai_unlearn.study.command import study

__all__ = ["study"]
