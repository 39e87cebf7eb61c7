"""The zoo: which torchvision networks there are, and at what size each of them runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import images
import networks
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 96
LARGE = 100e6  # parameters
SIZES = {
    "inception_v3": 128,
    "maxvit_t": 224,
    "vit_h_14": 98,
    "s3d": 224,
    "mvit_v1_b": 224,
    "mvit_v2_s": 224,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
}
"""Pixels of networks that do not take SIZE: fixed by their position embeddings, partitions or last pools."""
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}
FRAMES = {"s3d": 16, "mvit_v1_b": 16, "mvit_v2_s": 16}
ROOMS = {"classification": "", "segmentation": "segmentation", "video": "video", "detection": "detection"}


class DetectionParts(nn.Module):
    """The convolutional parts of a detector: its backbone, with the pyramid, and the heads on its features.

    What follows them (anchors, box decoding, non-maximum suppression) depends on values and is no graph.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        rpn = getattr(detector, "rpn", None)
        self.head = rpn.head if rpn is not None else detector.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


@dataclass(frozen=True)
class ZooModel:
    """One torchvision network and the settings of its row.

    Attributes:
        name: Its name in torchvision.
        family: One of ROOMS.
    """

    name: str
    family: str

    @property
    def parameters(self) -> int:
        """How many the whole network has, by torchvision's list; a detector's heads are among them."""
        weights = networks.torchvision_models().get_model_weights(self.name)
        return int(next(iter(weights)).meta["num_params"])

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one input, or (C, T, H, W) of a clip."""
        size = SIZES.get(self.name, SIZE)
        return (3, FRAMES.get(self.name, 8), size, size) if self.family == "video" else (3, size, size)

    def skeleton(self) -> nn.Module:
        """The network with torchvision's own random weights, in training mode."""
        models = networks.torchvision_models()
        options = dict(OPTIONS.get(self.name, {}))
        if self.name.startswith("vit_"):
            options["image_size"] = self.shape[-1]
        if self.family in ("segmentation", "detection"):
            options["weights_backbone"] = None
        model: nn.Module = models.get_model(self.name, weights=None, **options)
        return DetectionParts(model) if self.family == "detection" else model

    def inputs(self, count: int, seed: int) -> Tensor:
        """`count` structured images, or clips whose frames pan over one image each."""
        channels, *clip_length, height, width = self.shape
        if not clip_length:
            return images.synthetic(count, (channels, height, width), seed)
        frames = clip_length[0]
        wide = images.synthetic(count, (channels, height + frames, width + frames), seed)
        clip = [wide[:, :, t : t + height, t : t + width] for t in range(frames)]
        return torch.stack(clip, dim=2)

    def batches(self, large: bool) -> tuple[int, int, int]:
        """Calibration inputs, judging inputs, and the batch that they come in."""
        if large or (self.family == "video" and self.shape[-1] > SIZE):
            return 2, 2, 2
        return 16, 8, 4


def zoo() -> Iterator[ZooModel]:
    """Every network of the four families, in the order of torchvision's own lists."""
    models = networks.torchvision_models()

    for family, room in ROOMS.items():
        module = getattr(models, room) if room else models
        for name in models.list_models(module=module):
            yield ZooModel(name, family)
