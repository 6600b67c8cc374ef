"""ADPretrain: Yao, Luo, Qian, Zhang, "Advancing Industrial Anomaly Detection via Anomaly Representation Pretraining",
NeurIPS 2025, arXiv 2511.05245.

A representation, not a detector. Tokens of a frozen backbone become residuals to the nearest normal reference of their
category; a small projector per level is trained on labelled images of other categories, so that normal and anomalous
residuals differ in angle and in size. Existing detectors then read the projected residuals in place of the tokens.

Defaults follow the official code where paper and code differ (the size in the norm loss, both views as anchors).
Differences from that code:

- Parameters are float32, with a forward pass in the training's precision; theirs are bfloat16 throughout. Both losses
  and the nearest references are always computed in float32 or better.
- Losses never hold the matrix of all similarities, and do not depend on the number of workers (`Config.negatives`).
- Batches of an epoch differ by one image at most in size; theirs drops the last, smaller one, also for the centre.
- Views are made in floating point (`methods.adpretrain.views`), not in 8 bits.
- Any number of levels of any widths; widths that are not multiples of 16 have fewer heads than 16, and patches of less
  than 192 pixels, as early levels of convolutional networks have, count as anomalous with a sixth of their pixels.

The state after the last epoch is kept; the official code keeps the epochs that are best on test images of MVTec AD.

To reach (paper, percent, second-hand): VisA with ImageBind, image AUROC / AUPRO from 91.6 / 81.3 to 94.6 / 87.0 for
PatchCore, from 92.6 / 86.3 to 95.4 / 88.7 for PaDiM, and from 49.2 / 44.5 to 94.2 / 89.0 for the size alone.
"""

from methods.adpretrain.checkpoint import export_checkpoint, load_checkpoint, projector_from_state
from methods.adpretrain.losses import angle_loss, norm_loss
from methods.adpretrain.pretraining import CLIP_STATISTICS, Pretraining, estimate_centre
from methods.adpretrain.projector import Projector
from methods.adpretrain.references import ReferencePool, References, SplitReferences
from methods.adpretrain.representation import ProjectedResiduals
from methods.adpretrain.residuals import residual
from methods.adpretrain.settings import Config

__all__ = [
    "CLIP_STATISTICS",
    "Config",
    "Pretraining",
    "ProjectedResiduals",
    "Projector",
    "ReferencePool",
    "References",
    "SplitReferences",
    "angle_loss",
    "estimate_centre",
    "export_checkpoint",
    "load_checkpoint",
    "norm_loss",
    "projector_from_state",
    "residual",
]

REPRESENTATION = ProjectedResiduals
