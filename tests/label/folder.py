"""A datastore that does what is used of MONAI Label's, so that most tests need no MONAI Label."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any


class Folder:
    """The images of a folder by name, with info in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos: dict[str, dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        files = {path.name.partition(".")[0]: path for path in sorted(self.path.iterdir()) if path.is_file()}
        self.infos = {id: self.infos.get(id, {"ts": 1, "name": path.name}) for id, path in files.items()}

    def list_images(self) -> list[str]:
        return list(self.infos)

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        info = copy.deepcopy(self.infos.get(image_id, {}))
        return {**info, "path": str(self.path / info["name"])} if info else {}

    def get_image_uri(self, image_id: str) -> str:
        return self.get_image_info(image_id).get("path", "")

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        self.infos[image_id].update(info)
