"""Models of every make behind a real server: the embedded one, findings in DICOM files, and a zoo bundle's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from server import PYTHON, REASON, Server
from studies import write_findings
from zoo_bundles import write_bundle, write_images

from monai_unlearn.bundle import Bundle, bundle_path
from monai_unlearn.data import synthetic_cells

pytestmark = pytest.mark.skipif(PYTHON is None, reason=REASON)

QUICK = {"method": "saliency", "epochs": 1}


def _unlearn(server: Server, order: dict[str, Any]) -> dict[str, Any]:
    status, task = server.call("POST", "/train/unlearn", {**QUICK, **order})
    assert status == 200, task
    assert server.wait(task["id"])["status"] == "DONE"
    request = server.get(f"/unlearn/{task['unlearning']['id']}")
    assert request["state"] == "served", request
    return {"request": request, "report": server.get(f"/unlearn/{request['id']}/report.json")}


def test_the_embedded_model_imported_from_its_bundle(tmp_path: Path) -> None:
    """Trained by the bundle on arrays, served on PNG files: the same answers, and it unlearns there."""
    recipe = str(bundle_path("train"))
    monai.bundle.run("train", config_file=recipe, train_epochs=2, models_dir=str(tmp_path / "models"))
    (checkpoint,) = (tmp_path / "models").rglob("*.pt")
    cells = synthetic_cells()
    studies = tmp_path / "site" / "studies"
    studies.mkdir(parents=True)
    rows = []
    for split in ("train", "validation", "test"):
        part = getattr(cells, split)
        for number, (pixels, label) in enumerate(zip(part.images, part.labels)):
            file = f"{split}{number:05d}.png"
            Image.fromarray(np.asarray(pixels).squeeze()).save(studies / file)
            known = part.attributes.iloc[number]
            rows.append({"file": file, "patient": known["patient"], "sex": known["sex"], "split": split})
            rows[-1]["label"] = cells.class_names[int(label)]
    pd.DataFrame(rows).to_csv(tmp_path / "site" / "labels.csv", index=False)
    network_def = json.loads(Path(recipe).read_text())["network_def"]
    site = {
        "model": "cells",
        "labels_file": "labels.csv",
        "class_names": list(cells.class_names),
        "checkpoint": os.path.relpath(checkpoint, tmp_path / "site"),
        "options": {
            "image_size": 28,
            "network_def": network_def,
            "augmentation": [],
            "cache": "memory",
        },
    }
    (tmp_path / "site" / "site.json").write_text(json.dumps(site))

    network = Bundle.from_files([recipe]).build("network_def")
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    network.eval()
    with Server(studies) as server:
        assert server.get("/unlearn/")["served"]["made"] == "imported"
        for number in range(3):
            pixels = torch.tensor(np.asarray(cells.test.images[number]).squeeze(), dtype=torch.float32)[None, None]
            with torch.inference_mode():
                expected = network(pixels / 255 * 2 - 1)[0].softmax(0)
            scores = server.infer(f"test{number:05d}", "cells")["scores"]
            assert list(scores) == list(cells.class_names)
            np.testing.assert_allclose(list(scores.values()), expected.numpy(), atol=2e-6)
        patient = cells.train.attributes["patient"].iloc[0]
        of_patient = int((cells.train.attributes["patient"] == patient).sum())
        found = _unlearn(server, {"images": "train00000"})
        assert found["report"]["models"]["unlearned"]["forget"]["n"] == found["request"]["n_images"] == of_patient
        assert found["report"]["models"]["unlearned"]["test"]["n"] == len(cells.test.labels)
        assert server.infer("test00000", "cells")["version"] == "0002"


def test_findings_in_a_folder_of_dicom_files(tmp_path: Path) -> None:
    """As a CheXpert classifier: two findings an image, here and there one that is not mentioned."""
    studies = write_findings(tmp_path / "studies")
    with Server(studies) as server:
        assert server.train("chest", {"max_epochs": 10})["status"] == "DONE"
        before = server.infer("scan0003a", "chest")
        assert set(before["scores"]) == {"Cardiomegaly", "Edema"}
        assert isinstance(before["label"], list)
        assert sum(before["scores"].values()) != pytest.approx(1, abs=1e-3)
        found = _unlearn(server, {"patients": "PAT-0003"})
        assert found["report"]["task"] == "multi-label"
        assert found["request"]["n_images"] == 2
        assert "test auroc" in found["request"]["message"]
        assert server.infer("scan0005a", "chest")["version"] == "0002"
        status, task = server.call("POST", "/scoring/membership?run_sync=true", {})
        assert (status, task["executed"]) == (200, 78)


def test_a_network_and_transforms_of_another_bundle(tmp_path: Path) -> None:
    """A part of the site's own takes them from a zoo bundle's config, by MONAI's macros, and its model is imported."""
    lists = write_images(tmp_path / "images")
    config = write_bundle(tmp_path / "zoo", tmp_path / "images", network="densenet")
    monai.bundle.run("run", config_file=str(config), bundle_root=str(tmp_path / "zoo"))
    studies = tmp_path / "site" / "studies"
    studies.mkdir(parents=True)
    rows = []
    for part, records in lists.items():
        for record in records:
            file = record["image"].replace("/", "-")
            os.link(tmp_path / "images" / record["image"], studies / file)
            split = "train" if part == "training" else ("validation", "test")[record["patient_id"] > "Zoo-013"]
            rows.append({"file": file, "patient": record["patient_id"], "split": split})
            rows[-1]["label"] = ("dark", "bright")[record["label"]]
    pd.DataFrame(rows).to_csv(tmp_path / "site" / "labels.csv", index=False)
    theirs = {
        "network_def": f"%{config}::network_def",
        "preprocessing": f"%{config}::validate::preprocessing::transforms",
        "augmentation": [],
    }
    (tmp_path / "site" / "theirs.json").write_text(json.dumps(theirs))
    site = {
        "model": "zoo",
        "parts": ["images", "theirs.json"],
        "labels_file": "labels.csv",
        "class_names": ["dark", "bright"],
        "checkpoint": str(tmp_path / "zoo" / "models" / "model.pt"),
    }
    (tmp_path / "site" / "site.json").write_text(json.dumps(site))
    with Server(studies) as server:
        assert server.infer("Zoo-003-view0", "zoo")["label"] in ("dark", "bright")
        found = _unlearn(server, {"patients": "Zoo-003"})
        assert found["report"]["models"]["unlearned"]["forget"]["n"] == 4
        path = server.studies / ".unlearning" / "versions" / "0002" / "model.pt"
        # The file has the form of theirs, so their own configs load it.
        original = torch.load(site["checkpoint"], weights_only=True)
        unlearned = torch.load(path, weights_only=True)
        assert list(unlearned) == list(original)
        assert all(unlearned[name].shape == value.shape for name, value in original.items())
