"""A backbone under a name of its own: the smallest residual network of timm."""

from harness.backbones import BackboneRow

TOY_RESNET = BackboneRow(architecture="test_resnet.r160_in1k", summary="toy: the smallest residual network of timm")
