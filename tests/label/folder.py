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

    def json(self) -> dict[str, Any]:
        labels = self.path / "labels"
        found: dict[str, dict[str, Any]] = {id: {} for id in self.infos}
        for file in labels.glob("*/*"):
            id, dot, ending = file.name.partition(".")
            if id in found:
                found[id][file.parent.name] = {"ext": dot + ending, "info": {}}
        return {
            "objects": {
                id: {"image": {"ext": info["name"][len(id) :], "info": copy.deepcopy(info)}, "labels": found[id]}
                for id, info in self.infos.items()
            }
        }

    def list_images(self) -> list[str]:
        return list(self.infos)

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        info = copy.deepcopy(self.infos.get(image_id, {}))
        return {**info, "path": str(self.path / info["name"])} if info else {}

    def get_image_uri(self, image_id: str) -> str:
        return self.get_image_info(image_id).get("path", "")

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        self.infos[image_id].update(info)
