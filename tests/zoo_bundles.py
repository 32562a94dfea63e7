"""Training bundles in the model zoo's style, small enough to be trained in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.bundle import ConfigParser

SIZE, PATIENTS, IMAGES = 16, 12, 4
VALIDATION_PATIENTS = 4
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": {
        "_target_": "ResNet",
        "block": "basic",
        "layers": [1, 1, 1, 1],
        "block_inplanes": [4, 4, 8, 8],
        "spatial_dims": 2,
        "n_input_channels": 1,
        "num_classes": 2,
        "conv1_t_size": 3,
        "no_max_pool": True,
    },
    "one output": {
        "_target_": "DenseNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 1,
        "init_features": 8,
        "growth_rate": 4,
        "block_config": [1, 1],
    },
    "densenet": {
        "_target_": "DenseNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 2,
        "init_features": 8,
        "growth_rate": 4,
        "block_config": [1, 1],
    },
    "seresnet": {
        "_target_": "SEResNet50",
        "layers": [1, 1, 1, 1],
        "spatial_dims": 2,
        "in_channels": 1,
        "num_classes": 2,
    },
}


def write_images(folder: Path, ending: str = ".png") -> dict[str, list[dict]]:
    """Bright and dark images of patients; file names repeat between patients, as in many archives."""
    random = np.random.RandomState(0)
    lists: dict[str, list[dict]] = {"training": [], "validation": []}
    for number in range(PATIENTS + VALIDATION_PATIENTS):
        part = "training" if number < PATIENTS else "validation"
        patient = f"Zoo-{number:03d}"
        (folder / patient).mkdir(parents=True)
        for view in range(IMAGES):
            label = (number + view) % 2
            pixels = np.clip(random.normal(90 + 60 * label, 25, (SIZE, SIZE)), 0, 255).astype(np.uint8)
            name = f"{patient}/view{view}{ending}"
            if ending == ".png":
                from PIL import Image

                Image.fromarray(pixels).save(folder / name)
            else:
                import nibabel

                nibabel.save(nibabel.Nifti1Image(pixels.astype(np.float32), np.eye(4)), folder / name)
            lists[part].append({"image": name, "label": label, "patient_id": patient, "sex": "FM"[number % 2]})
    (folder / "dataset.json").write_text(json.dumps(lists))
    return lists


def write_bundle(
    root: Path,
    images: Path,
    *,
    network: str = "resnet",
    trainer_at: str = "train::trainer",
    suffix: str = ".json",
    loss: dict | None = None,
    dataset: dict | None = None,
    loader: dict | None = None,
    trainer: dict | None = None,
    labels: str = "class",
    save_dict: str = "{'model': @network}",
    saver_to: str = "model.pt",
) -> Path:
    """A bundle that reads its list from ``images/dataset.json``; returns its training config."""
    transforms = [
        {"_target_": "LoadImaged", "keys": "image", "image_only": False},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 255, "b_min": -1, "b_max": 1},
        {"_target_": "Resized", "keys": "image", "spatial_size": [32, 32]},
    ]
    flip = {"_target_": "RandFlipd", "keys": "image", "prob": 0.5}

    label = {"class": "r['label']", "finding": "[float(r['label'])]", "findings": "[r['label'], 1.0 - r['label']]"}

    def data(part: str) -> str:
        return (
            f"$[{{**r, 'image': @dataset_dir + '/' + r['image'], 'label': torch.tensor({label[labels]})}} for r in "
            f"json.load(open(@dataset_dir + '/dataset.json'))['{part}']]"
        )

    steps = [{"_target_": "Activationsd", "keys": "pred", "softmax": labels == "class", "sigmoid": labels != "class"}]
    if labels == "class":
        steps.append({"_target_": "AsDiscreted", "keys": ["pred", "label"], "argmax": [True, False], "to_onehot": 2})

    own_trainer = {
        "_target_": "SupervisedTrainer",
        "max_epochs": "@epochs",
        "device": "@device",
        "train_data_loader": "@train::dataloader",
        "network": "@network",
        "loss_function": "@loss",
        "optimizer": "@optimizer",
        "inferer": "@train::inferer",
        "train_handlers": "@train::handlers",
        "key_train_metric": {
            "train_loss": {
                "_target_": "ignite.metrics.Loss",
                "loss_fn": "@loss",
                "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
            }
        },
        "decollate": False,
        **(trainer or {}),
    }
    config: dict[str, Any] = {
        "imports": ["$import json", "$import monai", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": str(images),
        "cache_dir": str(root.parent / "cache"),
        "ckpt_dir": "$@bundle_root + '/models'",
        "device": "$torch.device('cpu')",
        "epochs": 4,
        "network_def": NETWORKS[network],
        "network": "$@network_def.to(@device)",
        "loss": loss or {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": 0.005},
        "lr_scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "optimizer": "@optimizer", "step_size": 3},
        "train": {
            "preprocessing": {"_target_": "Compose", "transforms": [*transforms, flip]},
            "dataset": {
                "_target_": "CacheDataset",
                "data": data("training"),
                "transform": "@train::preprocessing",
                **(dataset or {"progress": False}),
            },
            "dataloader": {
                "_target_": "DataLoader",
                "dataset": "@train::dataset",
                "batch_size": 8,
                "shuffle": True,
                **(loader or {}),
            },
            "inferer": {"_target_": "SimpleInferer"},
            "handlers": [
                {"_target_": "LrScheduleHandler", "lr_scheduler": "@lr_scheduler", "print_lr": False},
                {"_target_": "ValidationHandler", "validator": "@validate::evaluator", "interval": 1},
                {"_target_": "StatsHandler", "output_transform": "$monai.handlers.from_engine('loss', first=True)"},
                {
                    "_target_": "CheckpointSaver",
                    "save_dir": "@ckpt_dir",
                    "save_dict": f"${save_dict}",
                    "save_final": True,
                    "final_filename": "final.pt",
                },
                "$monai.handlers.CheckpointSaver(save_dir=@ckpt_dir, save_dict={'model': @network}, save_final=True,"
                " final_filename='by_expression.pt')",
            ],
        },
        "validate": {
            "preprocessing": {"_target_": "Compose", "transforms": transforms},
            "dataset": {
                "_target_": "Dataset",
                "data": data("validation"),
                "transform": "@validate::preprocessing",
            },
            "dataloader": {"_target_": "DataLoader", "dataset": "@validate::dataset", "batch_size": 8},
            "evaluator": {
                "_target_": "SupervisedEvaluator",
                "device": "@device",
                "val_data_loader": "@validate::dataloader",
                "network": "@network",
                "inferer": {"_target_": "SimpleInferer"},
                "postprocessing": {
                    "_target_": "Compose",
                    "transforms": steps,
                },
                "key_val_metric": {
                    "val_auc": {
                        "_target_": "ROCAUC",
                        "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
                    }
                },
                "val_handlers": [
                    {
                        "_target_": "CheckpointSaver",
                        "save_dir": "@ckpt_dir",
                        "save_dict": f"${save_dict}",
                        "save_key_metric": True,
                        "key_metric_filename": saver_to,
                    }
                ],
            },
        },
    }
    top, _, name = trainer_at.rpartition("::")
    (config[top] if top else config)[name] = own_trainer
    config["run"] = [f"$@{trainer_at}.run()"]
    configs = root / "configs"
    configs.mkdir(parents=True)
    (configs / "metadata.json").write_text(json.dumps({"version": "0.0.1", "name": "zoo"}))
    path = configs / f"train{suffix}"
    path.write_text(json.dumps(config, indent=1) if suffix == ".json" else yaml.safe_dump(config))
    evaluate = {
        "validate::handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@ckpt_dir + '/model.pt'",
                "load_dict": "${'model': @network}",
            }
        ],
        "validate::evaluator::val_handlers": "@validate::handlers",
        "run": ["$@validate::evaluator.run()"],
    }
    (configs / "evaluate.json").write_text(json.dumps(evaluate))
    inference = {
        **{key: config[key] for key in ("imports", "bundle_root", "dataset_dir", "device", "network_def", "network")},
        "dataset": config["validate"]["dataset"] | {"transform": {"_target_": "Compose", "transforms": transforms}},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 8},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": "${'model': @network}",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": {"_target_": "SimpleInferer"},
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }
    (configs / "inference.json").write_text(json.dumps(inference))
    return path


def train(config: Path, seed: int = 0) -> None:
    """Run the bundle's own training, as its owner would."""
    parser = ConfigParser()
    parser.read_config(str(config))
    parser["bundle_root"] = str(config.parent.parent)
    torch.manual_seed(seed)
    parser.get_parsed_content("run")
