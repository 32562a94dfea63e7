"""Everything that changes weights: handlers for an unchanged ``monai.engines.SupervisedTrainer``."""

from monai_unlearn.methods._trainer import require_supervised_trainer, unwrapped_handlers
from monai_unlearn.methods.amun import AMUN
from monai_unlearn.methods.bad_teacher import BadTeacher
from monai_unlearn.methods.batch_norm import BatchNormPolicy
from monai_unlearn.methods.boundary_shrink import BoundaryShrink
from monai_unlearn.methods.conv_transpose import ConvTranspose
from monai_unlearn.methods.delete import DELETE
from monai_unlearn.methods.finetune import FineTune
from monai_unlearn.methods.gradient_ascent import GradientAscent
from monai_unlearn.methods.influence import InfluenceUnlearning
from monai_unlearn.methods.l1_sparse import L1Sparse
from monai_unlearn.methods.last_layers import LastLayers
from monai_unlearn.methods.masked_small_gradients import MaskedSmallGradients
from monai_unlearn.methods.neg_grad_plus import NegGradPlus
from monai_unlearn.methods.perturb_and_recover import PerturbAndRecover
from monai_unlearn.methods.random_labeling import RandomLabeling
from monai_unlearn.methods.reference_guided import ReferenceGuided
from monai_unlearn.methods.retrain import Retrain
from monai_unlearn.methods.rum import RUM
from monai_unlearn.methods.saliency_mask import SaliencyMask
from monai_unlearn.methods.scrub import SCRUB
from monai_unlearn.methods.synaptic_dampening import SelectiveSynapticDampening
from monai_unlearn.methods.weight_noise import WeightNoise

__all__ = [
    "AMUN",
    "DELETE",
    "RUM",
    "SCRUB",
    "BadTeacher",
    "BatchNormPolicy",
    "BoundaryShrink",
    "ConvTranspose",
    "FineTune",
    "GradientAscent",
    "InfluenceUnlearning",
    "L1Sparse",
    "LastLayers",
    "MaskedSmallGradients",
    "NegGradPlus",
    "PerturbAndRecover",
    "RandomLabeling",
    "ReferenceGuided",
    "Retrain",
    "SaliencyMask",
    "SelectiveSynapticDampening",
    "WeightNoise",
    "require_supervised_trainer",
    "unwrapped_handlers",
]
