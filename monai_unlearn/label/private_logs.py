"""Logs that do not name who has withdrawn: MONAI Label's own lines have ids of images in them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Set
from urllib.parse import quote, quote_plus

__all__ = ["hidden", "hide_in_logs"]

LOGGERS = ("", "uvicorn", "uvicorn.access", "uvicorn.error")


def hidden(text: str, names: Set[str]) -> str:
    """A text with an ellipsis in the place of names, wherever they stand as words of their own."""
    # As they stand, and as addresses and JSON have them.
    forms = {form for name in names for form in (name, quote(name), quote_plus(name), json.dumps(name)[1:-1])}
    for name in sorted(forms, key=len, reverse=True):
        if name in text:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", text)
    return text


class _Hide(logging.Filter):
    def __init__(self, names: Set[str]) -> None:
        super().__init__()
        self._names = names

    def filter(self, record: logging.LogRecord) -> bool:
        if self._names:
            text = record.getMessage()
            clean = hidden(text, self._names)
            if clean != text:
                record.msg, record.args = clean, None
        return True


def hide_in_logs(names: Set[str]) -> None:
    """Hide names in whatever is logged from now on.

    Args:
        names: the names, to which more may be added later.
    """
    for handler in {handler for name in LOGGERS for handler in logging.getLogger(name).handlers}:
        handler.addFilter(_Hide(names))
