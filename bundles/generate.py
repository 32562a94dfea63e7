"""Write the bundle configs: the shared part stands here once, each method adds its own lines.

Every config runs by itself, with each component visible and replaceable. Run ``python bundles/generate.py`` after
a change; a test holds the files equal to what this gives.
"""

from __future__ import annotations

import json
from pathlib import Path

DATA = {
    "dataset_file": None,
    "download": None,
    "dataset_dir": "runs/data",
    "seed": 0,
}
REQUEST = {
    "forget_fraction": 0.1,
    "forget_indices": None,
    "forget_patients": None,
    "forget_request": None,
    "allow_partial": False,
    "overlap": "refuse",
    "find_duplicates": False,
}
RECIPE = {
    "train_epochs": 30,
    "train_lr": 0.05,
    "batch_size": 64,
    "image_range": [-1, 1],
    "models_dir": "runs/models",
    "device": "$'cuda' if torch.cuda.is_available() else 'cpu'",
}
COMPONENTS = {
    "bundle": {"_target_": "monai_unlearn.bundle.Bundle.running"},
    "initialize": "$@bundle",
    "data": {
        "_target_": "monai_unlearn.data.load_data",
        "dataset_file": "@dataset_file",
        "download": "@download",
        "dataset_dir": "@dataset_dir",
    },
    "split": {
        "_target_": "monai_unlearn.data.make_split",
        "data": "@data",
        "seed": "@seed",
        "forget_fraction": "@forget_fraction",
        "forget_indices": "@forget_indices",
        "forget_patients": "@forget_patients",
        "forget_request": "@forget_request",
        "allow_partial": "@allow_partial",
        "overlap": "@overlap",
        "find_duplicates": "@find_duplicates",
        "cache_dir": "@models_dir",
        "difficulty": "@difficulty",
    },
    "difficulty": "$None",
    "augmentation": [{"_target_": "monai_unlearn.data.RandomFlip", "spatial_axis": 1}],
    "network_def": {
        "_target_": "monai.networks.nets.ResNet",
        "block": "basic",
        "layers": [2, 2, 2, 2],
        "block_inplanes": [16, 32, 64, 128],
        "spatial_dims": 2,
        "n_input_channels": "$@data.channels",
        "num_classes": "$@data.num_classes",
        "conv1_t_size": 3,
        "conv1_t_stride": 2,
        "no_max_pool": True,
    },
    "network": {
        "_target_": "monai_unlearn.placement.place_network",
        "network": "@network_def",
        "device": "@device",
    },
    "loss_function": {"_target_": "torch.nn.CrossEntropyLoss"},
    "inferer": {"_target_": "monai.inferers.SimpleInferer"},
    "train_seed": "@seed",
    "train_dataset": {
        "_target_": "monai_unlearn.data.BatchedImages",
        "source": "$@data.train",
        "augmentation": "@augmentation",
        "seed": "@train_seed",
        "device": "@device",
        "value_range": "@image_range",
    },
    "train_loader": {
        "_target_": "monai_unlearn.data.make_loader",
        "dataset": "@train_dataset",
        "batch_size": "@batch_size",
        "shuffle": True,
        "seed": "@train_seed",
    },
    "evaluation_part": "$@data.train",
    "evaluation_dataset": {
        "_target_": "monai_unlearn.data.BatchedImages",
        "source": "@evaluation_part",
        "device": "@device",
        "value_range": "@image_range",
    },
    "evaluation_loader": {
        "_target_": "monai_unlearn.data.make_loader",
        "dataset": "@evaluation_dataset",
        "batch_size": 500,
    },
    "recipe": {
        "optimizer": {
            "_target_": "torch.optim.SGD",
            "params": "$@network.parameters()",
            "lr": "@train_lr",
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 0.0005,
        },
        "lr_scheduler": {
            "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "optimizer": "@recipe::optimizer",
            "T_max": "@train_epochs",
        },
        "trainer": {
            "_target_": "monai.engines.SupervisedTrainer",
            "device": "@device",
            "max_epochs": "@train_epochs",
            "train_data_loader": "@train_loader",
            "network": "@network",
            "optimizer": "@recipe::optimizer",
            "loss_function": "@loss_function",
            "inferer": "@inferer",
            "decollate": False,
            "train_handlers": [
                {
                    "_target_": "monai.handlers.LrScheduleHandler",
                    "lr_scheduler": "@recipe::lr_scheduler",
                    "print_lr": False,
                }
            ],
        },
    },
}
# Columns by which figures are broken down (by default those of the usual names), and handlers of MONAI's that are given
# the report's numbers: TensorBoardStatsHandler, MLFlowHandler.
REPORT = {"subgroups": None}
HANDLERS = {"report_handlers": []}
PRED_AND_LABEL = {"_target_": "monai.handlers.from_engine", "keys": ["pred", "label"]}
EVALUATOR = {
    "evaluator": {
        "_target_": "monai.engines.SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@train_loader",
        "network": "@network",
        "inferer": "@inferer",
        "decollate": False,
        "key_val_metric": {
            "accuracy": {
                "_target_": "ignite.metrics.Accuracy",
                "output_transform": PRED_AND_LABEL,
            }
        },
        "additional_metrics": {
            "auroc": {
                "_target_": "monai.handlers.ROCAUC",
                "output_transform": {
                    "_target_": "monai_unlearn.evaluation.probabilities_and_one_hot",
                    "_mode_": "callable",
                },
            },
            "loss": {
                "_target_": "ignite.metrics.Loss",
                "loss_fn": "@loss_function",
                "output_transform": PRED_AND_LABEL,
            },
        },
    },
}
UNLEARNING = {
    "forget": "$@split.forget_set()",
    "private_dir": "$@output_dir + '/private'",
    "optimizer": {
        "_target_": "torch.optim.SGD",
        "params": "$@network.parameters()",
        "lr": "@lr",
        "momentum": 0.9,
        "weight_decay": 0.0005,
    },
    "trainer": {
        **COMPONENTS["recipe"]["trainer"],
        "max_epochs": "@epochs",
        "optimizer": "@optimizer",
        "train_handlers": "@methods",
    },
    "unlearn": {"_target_": "monai_unlearn.workflow.unlearn", "bundle": "@bundle"},
}
# Unlearning may have to do with a part of the retain data; original and retrained models had all of it.
METHOD_TRAINER = {
    **UNLEARNING["trainer"],
    "train_data_loader": "$@forget.with_part_of_retain(@train_loader, @retain_fraction, @seed)",
}
BATCH_NORM = {"_target_": "monai_unlearn.methods.BatchNormPolicy", "forget": "@forget", "policy": "@batchnorm"}
RANDOM_LABELING = {
    "_target_": "monai_unlearn.methods.RandomLabeling",
    "forget": "@forget",
    "num_classes": "$None if @data.multi_label else @data.num_classes",
    "seed": "@seed",
}
SALIENCY_MASK = {
    "_target_": "monai_unlearn.methods.SaliencyMask",
    "forget": "@forget",
    "ratio": "@saliency_ratio",
    "path": "$@private_dir + '/saliency_mask.safetensors'",
}
FINE_TUNE = {"_target_": "monai_unlearn.methods.FineTune", "forget": "@forget"}
GRADIENT_ASCENT = {"_target_": "monai_unlearn.methods.GradientAscent", "forget": "@forget"}
NEG_GRAD_PLUS = {"_target_": "monai_unlearn.methods.NegGradPlus", "forget": "@forget", "alpha": "@alpha"}
SCRUB = {
    "_target_": "monai_unlearn.methods.SCRUB",
    "forget": "@forget",
    "forget_epochs": "@forget_epochs",
    "alpha": "@alpha",
    "gamma": "@gamma",
    "temperature": "@temperature",
    "multi_label": "$@data.multi_label or @data.num_classes == 1",
    "rewind_loader": {
        "_target_": "monai_unlearn.data.matched_loader",
        "_disabled_": "$not @rewind",
        "loader": "@evaluation_loader",
        "data": "@data",
        "split": "@split",
        "seed": "@seed",
    },
}
BAD_TEACHER = {
    "_target_": "monai_unlearn.methods.BadTeacher",
    "forget": "@forget",
    "initial_state": "$@network.state_dict()",
    "share": "@share",
    "temperature": "@temperature",
    "multi_label": "$@data.multi_label or @data.num_classes == 1",
    "seed": "@seed",
}
DELETE = {
    "_target_": "monai_unlearn.methods.DELETE",
    "forget": "@forget",
    "multi_label": "$@data.multi_label or @data.num_classes == 1",
}
RUM = {
    "_target_": "monai_unlearn.methods.RUM",
    "forget": "@forget",
    "low": "@low",
    "middle": "@middle",
    "high": "@high",
    "scores": "@scores",
    "num_classes": "$None if @data.multi_label else @data.num_classes",
    "seed": "@seed",
}
SYNAPTIC_DAMPENING = {
    "_target_": "monai_unlearn.methods.SelectiveSynapticDampening",
    "forget": "@forget",
    "alpha": "@alpha",
    "dampening": "@dampening",
}
INFLUENCE = {
    "_target_": "monai_unlearn.methods.InfluenceUnlearning",
    "forget": "@forget",
    "alpha": "@alpha",
    "damping": "@damping",
    "samples": "@fisher_samples",
    "retained": "$len(@split.retain)",
    "seed": "@seed",
}
MASKED_SMALL_GRADIENTS = {
    "_target_": "monai_unlearn.methods.MaskedSmallGradients",
    "forget": "@forget",
    "share": "@share",
    "scale": "@gradient_scale",
    "seed": "@seed",
}
CONV_TRANSPOSE = {"_target_": "monai_unlearn.methods.ConvTranspose", "forget": "@forget"}
WEIGHT_NOISE = {
    "_target_": "monai_unlearn.methods.WeightNoise",
    "forget": "@forget",
    "scale": "@noise_scale",
    "seed": "@seed",
}
L1_SPARSE = {"_target_": "monai_unlearn.methods.L1Sparse", "forget": "@forget", "alpha": "@alpha"}
LAST_LAYERS = {"_target_": "monai_unlearn.methods.LastLayers", "forget": "@forget", "k": "@k"}
REFERENCE_GUIDED = {
    "_target_": "monai_unlearn.methods.ReferenceGuided",
    "forget": "@forget",
    "held_out_loader": {
        "_target_": "monai_unlearn.data.make_loader",
        "dataset": {
            "_target_": "torch.utils.data.Subset",
            "dataset": "@evaluation_dataset",
            "indices": "$@split.selection.tolist()",
        },
        "batch_size": "$@evaluation_loader.batch_size",
        "num_workers": "$@evaluation_loader.num_workers",
    },
    "alpha": "@alpha",
    "multi_label": "$@data.multi_label or @data.num_classes == 1",
}
BOUNDARY_SHRINK = {
    "_target_": "monai_unlearn.methods.BoundaryShrink",
    "forget": "@forget",
    "bound": "@bound",
    "multi_label": "$@data.multi_label or @data.num_classes == 1",
}
AMUN = {
    "_target_": "monai_unlearn.methods.AMUN",
    "forget": "@forget",
    "epsilon": "@epsilon",
    "steps": "@search_steps",
    "true_labels": "@true_labels",
    "alpha": "@alpha",
    "multi_label": "$@data.multi_label",
    "seed": "@seed",
}
PERTURB_AND_RECOVER = {
    "_target_": "monai_unlearn.methods.PerturbAndRecover",
    "forget": "@forget",
    "budget": "@budget",
    "judge": "@judge",
    "seed": "@seed",
}
RETRAIN = {
    "_target_": "monai_unlearn.methods.Retrain",
    "forget": "@forget",
    "initial_state": "$@network.state_dict()",
}
EXACT_LAST_LAYERS = {**LAST_LAYERS, "initial_state": RETRAIN["initial_state"]}


def epoch_metric(function: str) -> dict:
    """An Ignite metric of all outputs of a split, by a function of ``monai_unlearn.metrics``."""
    return {
        "_target_": "ignite.metrics.EpochMetric",
        "compute_fn": {"_target_": f"monai_unlearn.metrics.{function}", "_mode_": "callable"},
        "output_transform": PRED_AND_LABEL,
        "check_compute_fn": False,
    }


def method_config(name: str, settings: dict, methods: list[dict], **changes: object) -> dict:
    """The config of a method: its settings at the top, its handlers under ``methods``."""
    top = {
        "method": name,
        **DATA,
        **REQUEST,
        "original_checkpoint": None,
        "network_key": None,
        "reference": True,
        "reference_models": 2,
        "retain_fraction": 1.0,
        **settings,
        **RECIPE,
        **REPORT,
        "output_dir": f"runs/{name}",
    }
    return {
        **top,
        **COMPONENTS,
        "reference_seed": "@seed",
        **EVALUATOR,
        "methods": methods,
        **UNLEARNING,
        "trainer": METHOD_TRAINER,
        **HANDLERS,
        **changes,
    }


STEPS = {"epochs": 5, "lr": 0.01, "batchnorm": "retain"}
CONFIGS = {
    "train": {
        **DATA,
        **RECIPE,
        **COMPONENTS,
        "split": {"_target_": "monai_unlearn.data.make_split", "data": "@data", "overlap": "keep"},
        **EVALUATOR,
        "train": {"_target_": "monai_unlearn.workflow.train", "bundle": "@bundle"},
    },
    "random_labeling": method_config("random_labeling", STEPS, [RANDOM_LABELING, BATCH_NORM]),
    "saliency": method_config(
        "saliency", {**STEPS, "saliency_ratio": 0.5}, [RANDOM_LABELING, SALIENCY_MASK, BATCH_NORM]
    ),
    "finetune": method_config("finetune", {**STEPS, "epochs": 10}, [FINE_TUNE, BATCH_NORM]),
    "gradient_ascent": method_config("gradient_ascent", {**STEPS, "lr": 1e-4}, [GRADIENT_ASCENT, BATCH_NORM]),
    "neg_grad_plus": method_config(
        "neg_grad_plus", {**STEPS, "epochs": 10, "alpha": 0.95}, [NEG_GRAD_PLUS, BATCH_NORM]
    ),
    # The images that it rewinds on are validation images, of which the split says the half.
    "scrub": method_config(
        "scrub",
        {
            **STEPS,
            "epochs": 3,
            "lr": 0.005,
            "forget_epochs": 2,
            "alpha": 0.001,
            "gamma": 0.99,
            "temperature": 4.0,
            "rewind": True,
        },
        [SCRUB, BATCH_NORM],
        evaluation_part="$@data.validation",
    ),
    # Adam, as in its public code.
    "bad_teacher": method_config(
        "bad_teacher",
        {**STEPS, "epochs": 1, "lr": 1e-4, "share": 0.3, "temperature": 1.0},
        [BAD_TEACHER, BATCH_NORM],
        optimizer={"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": "@lr"},
    ),
    "delete": method_config("delete", {**STEPS, "epochs": 20, "lr": 1e-4}, [DELETE, BATCH_NORM]),
    # It takes no step, so neither epochs nor a rate of its own.
    "synaptic_dampening": method_config(
        "synaptic_dampening",
        {"alpha": 2.0, "dampening": 1.0, "batchnorm": STEPS["batchnorm"]},
        [SYNAPTIC_DAMPENING, BATCH_NORM],
        optimizer="@recipe::optimizer",
        trainer={**METHOD_TRAINER, "max_epochs": 1},
    ),
    "influence": method_config(
        "influence",
        {"alpha": 1.0, "damping": 0.03, "fisher_samples": 1000, "batchnorm": STEPS["batchnorm"]},
        [INFLUENCE, BATCH_NORM],
        optimizer="@recipe::optimizer",
        trainer={**METHOD_TRAINER, "max_epochs": 1},
    ),
    # A score that was recorded in training comes with the original; without one the method computes its own.
    "rum": method_config(
        "rum",
        {
            **STEPS,
            "epochs": 6,
            "score": "difficulty",
            "low": "nothing",
            "middle": "finetune",
            "high": "random_labeling",
        },
        [RUM, BATCH_NORM],
        scores="$None if @score == 'difficulty' else @difficulty[@score].to_dict()",
    ),
    "masked_small_gradients": method_config(
        "masked_small_gradients",
        {**STEPS, "share": 0.3, "gradient_scale": 0.1},
        [MASKED_SMALL_GRADIENTS, BATCH_NORM],
    ),
    "conv_transpose": method_config("conv_transpose", {**STEPS}, [CONV_TRANSPOSE, BATCH_NORM]),
    "weight_noise": method_config("weight_noise", {**STEPS, "noise_scale": 1.0}, [WEIGHT_NOISE, BATCH_NORM]),
    "l1_sparse": method_config("l1_sparse", {**STEPS, "epochs": 10, "alpha": 1e-4}, [L1_SPARSE, BATCH_NORM]),
    # The last stage of the network and its classifier. The statistics follow the run, which goes over retain samples
    # alone: estimating all of them again would change those of the frozen layers.
    "cf_k": method_config("cf_k", {**STEPS, "epochs": 10, "batchnorm": "plain", "k": 6}, [LAST_LAYERS, BATCH_NORM]),
    "eu_k": method_config(
        "eu_k", {**STEPS, "epochs": 10, "batchnorm": "plain", "k": 6}, [EXACT_LAST_LAYERS, BATCH_NORM]
    ),
    # What is unseen to it are validation images, of the half that no figure is reported on.
    "reference_guided": method_config(
        "reference_guided", {**STEPS, "alpha": 1.0}, [REFERENCE_GUIDED, BATCH_NORM], evaluation_part="$@data.validation"
    ),
    "boundary_shrink": method_config(
        "boundary_shrink", {**STEPS, "lr": 3e-4, "bound": 0.1}, [BOUNDARY_SHRINK, BATCH_NORM]
    ),
    "amun": method_config(
        "amun",
        {**STEPS, "epochs": 10, "epsilon": 0.04, "search_steps": 50, "true_labels": True, "alpha": None},
        [AMUN, BATCH_NORM],
    ),
    # The recipe's own trainer: what it is made of says how to train again in fast motion. Nothing is to be tuned.
    "auto": method_config(
        "auto",
        {"budget": 0.3},
        [PERTURB_AND_RECOVER],
        current_run="$None",
        judge={"_target_": "monai_unlearn.selection.judge_of", "run": "@current_run"},
        optimizer="@recipe::optimizer",
        trainer={**METHOD_TRAINER, "max_epochs": "@train_epochs"},
    ),
    # The recipe's own trainer, so the reference is one of another seed and the gap is the noise floor.
    "retrain": method_config(
        "retrain",
        {},
        [*COMPONENTS["recipe"]["trainer"]["train_handlers"], RETRAIN],
        reference_seed="$@seed + 1",
        optimizer="@recipe::optimizer",
        trainer={**METHOD_TRAINER, "max_epochs": "@train_epochs"},
    ),
}
# What the tuner tries: setting → list of values, or a range. Published rates are seldom right for another data set.
RATES = {"low": 1e-5, "high": 0.1, "log": True}
SEARCH_SPACES = {
    "random_labeling": {"lr": RATES, "epochs": [2, 5, 10]},
    "saliency": {"lr": RATES, "epochs": [2, 5, 10], "saliency_ratio": [0.3, 0.5, 0.7]},
    "finetune": {"lr": RATES, "epochs": [2, 5, 10]},
    "gradient_ascent": {"lr": {**RATES, "high": 0.01}, "epochs": [1, 3, 5]},
    "neg_grad_plus": {"lr": RATES, "epochs": [2, 5, 10], "alpha": [0.8, 0.9, 0.95, 0.99]},
    "scrub": {"lr": RATES, "epochs": [3, 5, 10], "gamma": [0.9, 0.99], "alpha": [0.001, 0.01, 0.1]},
    "bad_teacher": {"lr": {**RATES, "high": 0.01}, "epochs": [1, 2, 5], "share": [0.1, 0.3, 1.0]},
    "delete": {"lr": RATES, "epochs": [5, 10, 20]},
    "rum": {
        "lr": RATES,
        "epochs": [3, 6, 10],
        "low": ["nothing", "finetune"],
        "middle": ["finetune", "random_labeling"],
    },
    "synaptic_dampening": {
        "alpha": {"low": 0.5, "high": 8, "log": True},
        "dampening": {"low": 0.05, "high": 2, "log": True},
    },
    "influence": {
        "alpha": {"low": 0.1, "high": 10, "log": True},
        "damping": {"low": 1e-4, "high": 1, "log": True},
    },
    "masked_small_gradients": {"lr": RATES, "epochs": [3, 6, 10], "share": [0.1, 0.3, 0.5]},
    "conv_transpose": {"lr": RATES, "epochs": [3, 6, 10]},
    "weight_noise": {"lr": RATES, "epochs": [3, 6, 10], "noise_scale": {"low": 0.25, "high": 2}},
    "cf_k": {"lr": RATES, "epochs": [2, 5, 10], "k": [1, 6, 11]},
    "eu_k": {"lr": RATES, "epochs": [5, 10, 20], "k": [1, 6, 11]},
    "l1_sparse": {"lr": RATES, "epochs": [2, 5, 10], "alpha": {"low": 1e-5, "high": 1e-2, "log": True}},
    "reference_guided": {"lr": RATES, "epochs": [2, 5, 10], "alpha": [0.3, 1.0, 3.0]},
    "boundary_shrink": {"lr": {**RATES, "high": 0.01}, "epochs": [1, 3, 5], "bound": [0.03, 0.1, 0.3]},
    "amun": {"lr": RATES, "epochs": [2, 5, 10], "true_labels": [True, False]},
}
for method, space in SEARCH_SPACES.items():
    CONFIGS[method]["search_space"] = space
# The audit of any models: no method, but a trainer all the same, with which relearning is timed.
CONFIGS["audit"] = {
    "run": None,
    "original": None,
    "unlearned": None,
    "retrained": None,
    "network_key": None,
    **DATA,
    **REQUEST,
    "original_checkpoint": None,
    "reference": True,
    "reference_models": 2,
    "relearn_epochs": 10,
    "shadow_models": 0,
    "curve_runs": None,
    "lr": STEPS["lr"],
    **RECIPE,
    **REPORT,
    "output_dir": "runs/audit",
    **COMPONENTS,
    "reference_seed": "@seed",
    **EVALUATOR,
    "methods": [],
    **{key: value for key, value in UNLEARNING.items() if key != "unlearn"},
    "trainer": {**UNLEARNING["trainer"], "max_epochs": 1},
    **HANDLERS,
    "audit": {"_target_": "monai_unlearn.auditing.audit", "bundle": "@bundle"},
}
# Parts that are added to any of the above: --config_file "['bundles/saliency.json','bundles/chexpert.json']".
MULTI_LABEL = {
    "loss_function": {"_target_": "monai_unlearn.loss.MaskedBCEWithLogitsLoss"},
    "evaluator::key_val_metric": {"auroc": epoch_metric("mean_auroc")},
    "evaluator::additional_metrics": {
        "accuracy": epoch_metric("known_accuracy"),
        "loss": EVALUATOR["evaluator"]["additional_metrics"]["loss"],
    },
}
TO_TENSOR = {"_target_": "monai.transforms.EnsureTyped", "keys": "image", "track_meta": False}


def files_part(
    settings: dict, data: dict, preprocessing: list[dict], augmentation: list[dict], network: dict, workers: int = 0
) -> dict:
    """A part for images on disk: where they are, how they are read, and a network that suits them."""
    dataset = {
        "_target_": "monai_unlearn.data.file_dataset",
        "source": "$@data.train",
        "transform": "$@preprocessing + @augmentation",
        "cache": "@cache",
        "cache_dir": "@cache_dir",
        "num_workers": "@num_workers",
    }
    return {
        **settings,
        "on_broken": "raise",
        "original_checkpoint": None,
        "num_workers": workers,
        "cache": "none",
        "cache_dir": None,
        "data": {**data, "on_broken": "@on_broken"},
        "preprocessing": [*preprocessing, TO_TENSOR],
        "augmentation": augmentation,
        "network_def": network,
        "train_dataset": dataset,
        "train_loader::num_workers": "@num_workers",
        "evaluation_dataset": {**dataset, "source": "@evaluation_part", "transform": "@preprocessing"},
        "evaluation_loader": {
            "_target_": "monai_unlearn.data.make_loader",
            "dataset": "@evaluation_dataset",
            "batch_size": "@batch_size",
            "num_workers": "@num_workers",
        },
    }


def affine(*ranges: float, spatial_dims: int = 2) -> dict:
    """A small random rotation (radians), shift (pixels) and change of scale."""
    rotation, shift, scale = ranges
    return {
        "_target_": "monai.transforms.RandAffined",
        "keys": "image",
        "prob": 1.0,
        "rotate_range": [rotation] * (1 if spatial_dims == 2 else 3),
        "translate_range": [shift] * spatial_dims,
        "scale_range": [scale] * spatial_dims,
        "padding_mode": "border",
    }


def network_part(name: str) -> dict:
    """One of MONAI's networks for 2-D images."""
    dense = name.startswith("DenseNet")
    return {
        "_target_": f"monai.networks.nets.{name}",
        "spatial_dims": 2,
        "in_channels" if dense else "n_input_channels": "$@data.channels",
        "out_channels" if dense else "num_classes": "$@data.num_classes",
    }


# As the public baselines jfhealthcare/Chexpert and LibAUC: Adam at 1e-4, small random affine changes, no flip.
ADAM = {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": "@train_lr"}
FROM_BYTES = {
    "_target_": "monai.transforms.ScaleIntensityRanged",
    "keys": "image",
    "a_min": 0,
    "a_max": 255,
    "b_min": "$@image_range[0]",
    "b_max": "$@image_range[1]",
}
CONFIGS["chexpert"] = {
    **files_part(
        {
            "dataset_dir": None,
            "findings": "competition",
            "uncertainty": "baseline",
            "blanks": "zeros",
            "view": "frontal",
            "projection": "all",
            "heldout_patients": None,
            "image_size": 320,
            "train_epochs": 3,
            "train_lr": 0.0001,
            "batch_size": 32,
        },
        {
            "_target_": "monai_unlearn.data.read_chexpert",
            "dataset_dir": "@dataset_dir",
            "findings": "@findings",
            "uncertainty": "@uncertainty",
            "blanks": "@blanks",
            "view": "@view",
            "projection": "@projection",
            "original_checkpoint": "@original_checkpoint",
            "heldout_patients": "@heldout_patients",
        },
        [
            {
                "_target_": "monai.transforms.LoadImaged",
                "keys": "image",
                "ensure_channel_first": True,
                "reverse_indexing": False,
                "converter": {"_target_": "monai_unlearn.data.GreyImage", "size": "@image_size"},
            },
            FROM_BYTES,
        ],
        [affine(0.26, "$0.05 * @image_size", 0.05)],
        network_part("DenseNet121"),
        workers=4,
    ),
    **MULTI_LABEL,
    "recipe::optimizer": ADAM,
}
RESIZED = {"_target_": "monai.transforms.Resized", "keys": "image", "spatial_size": "@image_size"}
CONFIGS["dicom"] = files_part(
    {
        "dataset_dir": None,
        "labels_file": None,
        "class_names": None,
        "level": "image",
        "window": None,
        "image_size": [224, 224],
        "batch_size": 32,
    },
    {
        "_target_": "monai_unlearn.data.read_dicom",
        "dataset_dir": "@dataset_dir",
        "labels_file": "@labels_file",
        "level": "@level",
        "class_names": "@class_names",
    },
    [
        {
            "_target_": "monai.transforms.LoadImaged",
            "keys": "image",
            "ensure_channel_first": True,
            "reader": {"_target_": "monai_unlearn.data.DicomViewReader", "window": "@window"},
        },
        RESIZED,
        {**FROM_BYTES, "a_max": 1},
    ],
    [affine(0.26, "$0.05 * @image_size[0]", 0.05)],
    network_part("DenseNet121"),
)
CONFIGS["nifti"] = files_part(
    {
        "dataset_dir": None,
        "labels_file": None,
        "class_names": None,
        "channels": 1,
        "image_size": [64, 64, 64],
        "batch_size": 8,
    },
    {
        "_target_": "monai_unlearn.data.read_table",
        "dataset_dir": "@dataset_dir",
        "labels_file": "@labels_file",
        "class_names": "@class_names",
        "channels": "@channels",
    },
    [
        {"_target_": "monai.transforms.LoadImaged", "keys": "image", "ensure_channel_first": True},
        {"_target_": "monai.transforms.Orientationd", "keys": "image", "axcodes": "RAS"},
        RESIZED,
        {"_target_": "monai.transforms.NormalizeIntensityd", "keys": "image", "channel_wise": True},
    ],
    [affine(0.17, "$0.05 * @image_size[0]", 0.05, spatial_dims=3)],
    {**network_part("resnet18"), "spatial_dims": 3},
)
CONFIGS["images"] = files_part(
    {
        "dataset_dir": None,
        "labels_file": None,
        "class_names": None,
        "image_size": 224,
        "batch_size": 32,
    },
    {
        "_target_": "monai_unlearn.data.read_table",
        "dataset_dir": "@dataset_dir",
        "labels_file": "@labels_file",
        "class_names": "@class_names",
    },
    CONFIGS["chexpert"]["preprocessing"][:-1],
    [affine(0.26, "$0.05 * @image_size", 0.05)],
    network_part("DenseNet121"),
)
CONFIGS["resnet18"] = {"network_def": network_part("resnet18")}
CONFIGS["resnet50"] = {"network_def": network_part("resnet50")}
CONFIGS["multi_label"] = MULTI_LABEL
# Added to a method, of which it searches for the settings: python -m monai.bundle run tune.
CONFIGS["tune"] = {
    "trials": 20,
    "finish": True,
    "sampler_seed": "@seed",
    "storage": "$@output_dir + '-tuning/study.journal'",
    "sampler": {"_target_": "optuna.samplers.TPESampler", "seed": "@sampler_seed"},
    "pruner": {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 5, "n_warmup_steps": 1},
    "tune": {"_target_": "monai_unlearn.tuning.tune", "bundle": "@bundle"},
}

# Added to somebody else's training bundle: --config_file "['THEIR/configs/train.yaml','overlay.json']".
OVERLAY = {
    "unlearning": {
        "method": "saliency",
        "forget_request": None,
        "allow_partial": False,
        "overlap": "refuse",
        "original_checkpoint": None,
        "network_key": None,
        "reference": False,
        "epochs": 5,
        "lr": None,
        "saliency_ratio": 0.5,
        "batchnorm": "retain",
        "seed": 0,
        "trainer": None,
        "evaluator": None,
        "image_key": "image",
        "label_key": "label",
        "patient_key": None,
        "output_dir": "runs/unlearned",
    },
    "unlearn": {"_target_": "monai_unlearn.overlay.unlearn", "settings": "@unlearning"},
}
CONFIGS["overlay"] = OVERLAY

# Runs of the methods above, in several processes: python -m monai.bundle run study --config_file bundles/study.json.
CONFIGS["study"] = {
    "methods": ["saliency", "random_labeling"],
    "parts": [],
    "kinds": ["random"],
    "fractions": [0.02, 0.1, 0.3],
    "seeds": [0, 1, 2],
    "tuned": [False],
    "patients": 20,
    "options": {},
    "reference_models": 3,
    "workers": None,
    "keep_models": False,
    "models_dir": "runs/study/models",
    "output_dir": "runs/study",
    "results_file": None,
    "data_name": None,
    "commit": None,
    "bundle": {"_target_": "monai_unlearn.bundle.Bundle.running"},
    "initialize": "$@bundle",
    "study": {"_target_": "monai_unlearn.study.study", "bundle": "@bundle"},
}


def write(folder: Path) -> None:
    """Write all configs into a folder."""
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent)
