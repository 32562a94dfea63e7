"""Everything that changes weights: handlers for an unchanged ``monai.engines.SupervisedTrainer``."""

from monai_unlearn.methods._trainer import require_supervised_trainer, unwrapped_handlers
from monai_unlearn.methods.batch_norm import BatchNormPolicy
from monai_unlearn.methods.random_labeling import RandomLabeling
from monai_unlearn.methods.retrain import Retrain
from monai_unlearn.methods.saliency_mask import SaliencyMask

__all__ = [
    "BatchNormPolicy",
    "RandomLabeling",
    "Retrain",
    "SaliencyMask",
    "require_supervised_trainer",
    "unwrapped_handlers",
]
