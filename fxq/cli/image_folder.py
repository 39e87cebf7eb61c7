"""A folder of image files as calibration data: scaled, cropped and normalized as classifiers are trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError
from ..optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageFolder", "Preprocessing"]

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
SUFFIXES: Final = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MODES: Final = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to what a model takes: ``(pixels / 255 - mean) / std``.

    Attributes:
        size: Height and width that the model takes, in pixels.
        resize: Length of the shorter side before the crop; None (default) scales the image until it just covers
            `size`.
        crop: Keep the proportions and cut out the centre (default); False stretches the whole image to `size`.
        mean: For each channel, of values in [0, 1]; one makes the image grey, three make it RGB.
        std: Likewise.
        layout: ``"nchw"`` (default) or ``"nhwc"``.

    Raises:
        CalibrationError: A field holds no such value.
    """

    size: tuple[int, int]
    resize: int | None = None
    crop: bool = True
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    layout: Literal["nchw", "nhwc"] = "nchw"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise CalibrationError(f"images of {self.size[0]} by {self.size[1]} pixels", hint="give a positive size")
        if len(self.mean) != len(self.std) or len(self.mean) not in _MODES:
            raise CalibrationError(
                f"{len(self.mean)} means and {len(self.std)} standard deviations",
                hint="give three of each for RGB, or one of each for grey images",
            )
        if min(self.std) <= 0:
            raise CalibrationError(f"a standard deviation of {min(self.std)}", hint="give positive ones")
        if self.layout not in ("nchw", "nhwc"):
            raise CalibrationError(f"the layout {self.layout!r}", hint='use "nchw" or "nhwc"')
        if self.resize is not None and not self.crop:
            raise CalibrationError("resize is for images that are cropped", hint="leave out resize, or crop")

    def __call__(self, path: Path) -> Tensor:
        """One image: float32, [channels, height, width] or, by `layout`, [height, width, channels].

        Raises:
            CalibrationError: The file is no image, or smaller than the crop once it is resized.
            MissingDependencyError: Pillow is not installed.
        """
        pillow = require("PIL.Image", purpose="reading images", package="pillow")
        try:
            with pillow.open(path) as image:
                fitted = self._fitted(image.convert(_MODES[len(self.mean)]), path, pillow.Resampling.BILINEAR)
                pixels = np.array(fitted, dtype=np.uint8)
        except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
            raise CalibrationError(
                f"cannot read the image {path}: {error}", hint="repair it, or take it out of the folder"
            ) from error
        channels = torch.from_numpy(pixels).reshape(*self.size, len(self.mean)).float().div(255)
        made = channels.sub_(torch.tensor(self.mean)).div_(torch.tensor(self.std))
        return made if self.layout == "nhwc" else made.permute(2, 0, 1).contiguous()

    def _fitted(self, image: Image, path: Path, filtering: int) -> Image:
        """An image of `size`, by bilinear filtering."""
        height, width = self.size
        if not self.crop:
            return image.resize((width, height), filtering)
        short = min(image.width, image.height)
        if self.resize is not None:
            # The longer side is rounded down, as torchvision's Resize does it.
            scaled = (int(self.resize * image.width / short), int(self.resize * image.height / short))
        else:
            factor = max(width / image.width, height / image.height)
            scaled = (math.ceil(image.width * factor - 1e-6), math.ceil(image.height * factor - 1e-6))
        if scaled[0] < width or scaled[1] < height:
            raise CalibrationError(
                f"{path} has {scaled[1]} by {scaled[0]} pixels when resized, and {height} by {width} are to be cut out",
                hint=f"resize to {max(height, width)} or more",
            )
        left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
        return image.resize(scaled, filtering).crop((left, top, left + width, top + height))


class ImageFolder:
    """Batches of the images below a folder; iterate as often as you like.

    Args:
        path: The folder; files in folders below it count too.
        preprocessing: What is done to each image.
        count: How many images at most; they are taken evenly from all, in the order of their paths, so that each of
            a classifier's folders has its share. About 500 are usual (R34).
        batch_size: Images in a batch; the last one may be smaller.

    Attributes:
        files: The images that are taken.

    Raises:
        CalibrationError: The folder holds no images, or `count` or `batch_size` is less than 1.
    """

    def __init__(self, path: Path, preprocessing: Preprocessing, *, count: int = 512, batch_size: int = 32) -> None:
        if count < 1 or batch_size < 1:
            raise CalibrationError(f"{count} images in batches of {batch_size}", hint="take at least one")
        every = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not every:
            raise CalibrationError(f"there are no images in {path}", hint=f"they end in {', '.join(sorted(SUFFIXES))}")
        taken = min(count, len(every))
        self.files = [every[index * len(every) // taken] for index in range(taken)]
        self.preprocessing, self.batch_size = preprocessing, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.files) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.files), self.batch_size):
            yield torch.stack([self.preprocessing(file) for file in self.files[start : start + self.batch_size]])
