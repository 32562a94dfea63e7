"""Deletion requests in MONAI Label; needs ``pip install monai_unlearn[label]``.

``queue``, ``versions``, ``site``, ``images`` and ``unlearning`` know nothing of MONAI Label; ``tasks``, ``routes`` and
``app`` are what it sees of them.
"""

__all__: list[str] = []
