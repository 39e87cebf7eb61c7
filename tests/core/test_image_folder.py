"""Images as calibration data: the numbers of torchvision's transforms, a fair choice of files, and bad folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision_models import torchvision_transforms

from fxq.cli.image_folder import IMAGENET_MEAN, IMAGENET_STD, ImageFolder, Preprocessing
from fxq.errors import CalibrationError, MissingDependencyError


def picture(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(("width", "height"), [(61, 40), (40, 61), (32, 32), (33, 47)])
def test_the_numbers_are_torchvisions(tmp_path: Path, width: int, height: int) -> None:
    path, transforms = picture(tmp_path / "a.png", width, height), torchvision_transforms()
    steps = [transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()]
    theirs = transforms.Compose([*steps, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    with Image.open(path) as image:
        expected = theirs(image.convert("RGB"))
    found = Preprocessing((28, 28), resize=32)(path)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("crop", "scaled"), [(False, (20, 16)), (True, (32, 16))])
def test_an_image_is_cut_or_stretched_to_what_the_model_takes(
    tmp_path: Path, crop: bool, scaled: tuple[int, int]
) -> None:
    path = picture(tmp_path / "a.png", 60, 30)
    with Image.open(path) as image:
        resized = torch.from_numpy(np.array(image.resize(scaled, Image.Resampling.BILINEAR)))
    found = Preprocessing((16, 20), crop=crop, mean=(0.0,) * 3, std=(1 / 255,) * 3, layout="nhwc")(path)
    left = (scaled[0] - 20) // 2
    torch.testing.assert_close(found, resized[:, left : left + 20].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colours_become_what_the_means_are_for(tmp_path: Path, mode: str, channels: int) -> None:
    path = picture(tmp_path / "a.png", 9, 9, mode)
    taken = Preprocessing((8, 8), mean=(0.5,) * channels, std=(0.5,) * channels)
    assert taken(path).shape == (channels, 8, 8)


def test_every_class_has_its_share(tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl"):
        for index in range(4):
            picture(tmp_path / name / f"{index}.JPG", 12 + index, 12)
    (tmp_path / "labels.txt").write_text("cat dog owl")
    folder = ImageFolder(tmp_path, Preprocessing((8, 8)), count=6, batch_size=4)
    assert [f"{file.parent.name}/{file.stem}" for file in folder.files] == [
        f"{name}/{index}" for name in ("cat", "dog", "owl") for index in (0, 2)
    ]
    for _ in range(2):
        batches = list(folder)
        assert [tuple(batch.shape) for batch in batches] == [(4, 3, 8, 8), (2, 3, 8, 8)]
        assert all(batch.is_contiguous() for batch in batches)
    assert len(folder) == 2


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"size": (0, 8)}, "images of 0 by 8 pixels"),
    "channels": ({"mean": (0.0, 0.0)}, "2 means and 3 standard deviations"),
    "std": ({"std": (1.0, 0.0, 1.0)}, "a standard deviation of 0"),
    "layout": ({"layout": "hwc"}, "the layout 'hwc'"),
    "resize": ({"resize": 8, "crop": False}, "resize is for images that are cropped"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be(name: str) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(CalibrationError, match=message):
        Preprocessing(**{"size": (8, 8), **arguments})


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there are no images in"):
        ImageFolder(tmp_path, Preprocessing((8, 8)))
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(CalibrationError, match=r"cannot read the image .*b\.png"):
        next(iter(ImageFolder(tmp_path, Preprocessing((8, 8)))))
    with pytest.raises(CalibrationError, match="0 images"):
        ImageFolder(tmp_path, Preprocessing((8, 8)), count=0)
    small = picture(tmp_path / "a.png", 9, 9)
    with pytest.raises(CalibrationError, match=r"a\.png has 6 by 6 pixels when resized, and 8 by 8 are to be cut out"):
        Preprocessing((8, 8), resize=6)(small)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 9, 9)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"reading images needs .*(?s:.*)pip install pillow"):
        Preprocessing((8, 8))(path)
