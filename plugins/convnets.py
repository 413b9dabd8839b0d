"""The convolutional encoders of Table 10.

    --model resnet50 | convnext_tiny

ResNet-50's batch norm sees one micro-batch (on GPUs, those of all processes), so its results depend
on how a batch is split.
"""

from collections import OrderedDict
from functools import partial
from itertools import takewhile

import torch
import torchvision
from torch import Tensor, nn


class ConvNet(nn.Sequential):
    """torchvision's network up to its last feature map; each position becomes a token."""

    def __init__(self, name: str, width: int, image_size: int):
        if image_size < 32:
            raise ValueError(f"{name} takes images of 32 px or more")
        # No block is left out at random, as in OpenCLIP, so results do not depend on the split.
        options = {"stochastic_depth_prob": 0.0} if name.startswith("convnext") else {}
        layers = torchvision.models.get_model(name, weights=None, **options).named_children()
        super().__init__(OrderedDict(takewhile(lambda layer: layer[0] != "avgpool", layers)))
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        if images.is_cuda:  # tensor cores want the channels last
            images = images.contiguous(memory_format=torch.channels_last)
        return super().forward(images).flatten(2).transpose(1, 2)  # [B, D, S/32, S/32] -> [B, N, D]


resnet50 = partial(ConvNet, "resnet50", 2048)
convnext_tiny = partial(ConvNet, "convnext_tiny", 768)
