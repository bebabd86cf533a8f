"""timm's augmentations, of PIL images; then batches: normalised, erased, mixed.

All draw from the global random states (Python, NumPy, PyTorch) alone: who seeds them decides the result.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    RandomCrop,
    RandomHorizontalFlip,
    Resize,
)

from lte_scale.config.schema import AugmentConfig

Transform = Callable[[Image.Image], Image.Image]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.5,), (0.5,)
CROP_RATIO = 0.875
# Below, an image is taken to be all subject, as in CIFAR, MNIST or Tiny ImageNet: nothing of it is cropped away.
SMALLEST_CENTRE_CROP = 128


def train_transform(config: AugmentConfig, image_size: int, channels: int) -> Transform:
    """To a square of `image_size`, in the same mode: crop or resize, pad-and-crop, flip, RandAugment.

    Raises:
        ValueError: if a policy, `mean` or `std` makes no sense.
    """
    steps: list[Transform] = []
    if config.crop_scale < 1:
        scale = (config.crop_scale, 1.0)
        steps.append(RandomResizedCropAndInterpolation(image_size, scale=scale, interpolation="bicubic"))
    else:
        steps.append(_PlainResize(image_size))
    if config.pad_crop:
        steps.append(RandomCrop(image_size, padding=config.pad_crop))
    if config.hflip:
        steps.append(RandomHorizontalFlip(config.hflip))
    if config.rand_augment:
        mean, _ = statistics(config, channels)
        steps.append(_RandAugment(config.rand_augment, image_size, mean))
    return Compose(steps)


def eval_transform(image_size: int) -> Transform:
    """To a square of `image_size`, in the same mode: timm's resize and centre crop, or a plain resize below 128."""
    if image_size < SMALLEST_CENTRE_CROP:
        return _PlainResize(image_size)
    shorter = math.floor(image_size / CROP_RATIO)
    return Compose([Resize(shorter, interpolation=InterpolationMode.BICUBIC), CenterCrop(image_size)])


class ToBatch:
    """Images of one size and mode (L or RGB by `channels`) to a batch [B, channels, S, S], float32, normalised.

    All at once: the calls, not the arithmetic, are what small images cost.

    Raises:
        ValueError: if `mean` or `std` of the configuration makes no sense.
    """

    def __init__(self, config: AugmentConfig, channels: int) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in statistics(config, channels))

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        pixels = pixels.movedim(-1, 1) if pixels.ndim == 4 else pixels.unsqueeze(1)
        batch = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return batch.div_(255).sub_(self.mean).div_(self.std)


def erasing(config: AugmentConfig) -> Callable[[Tensor], Tensor] | None:
    """timm's random erasing of a normalised image, or of each of a batch, in place; None where it is off."""
    if not config.random_erasing:
        return None
    erase: Callable[[Tensor], Tensor] = RandomErasing(config.random_erasing, mode="pixel", device="cpu")
    return erase


def mixup(config: AugmentConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix (label smoothing included), drawn from NumPy's global state; None where both are off."""
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )


def statistics(config: AugmentConfig, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixel values scaled to 0 ... 1.

    Raises:
        ValueError: if there is not one per channel, or a deviation is not above 0.
    """
    defaults = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (GREY_MEAN, GREY_STD)
    mean, std = tuple(config.mean) or defaults[0], tuple(config.std) or defaults[1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(
                f"augment.{name}: {list(values)} has {len(values)} values for model.channels={channels}; "
                "give one per channel"
            )
    if min(std) <= 0:
        raise ValueError(f"augment.std: {list(std)} must be above 0")
    return mean, std


def seed_all(*parts: object) -> None:
    """Seed every state that augmentations draw from; of PyTorch, the CPU's alone."""
    seed = int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Put the global random states back afterwards: with data.workers=0 they are the training loop's own."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    # At full strength timm asks for 0 bits, which Pillow refuses since version 13.
    return ImageOps.posterize(image, min(max(bits, 1), 8))


class _PlainResize:
    """To a square, whatever the shape; an image that has the size stays as it is."""

    def __init__(self, size: int) -> None:
        self.size = (size, size)

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.size == self.size else image.resize(self.size, Image.Resampling.BICUBIC)


class _RandAugment:
    """timm's policy, as timm sets it up for training. Grey images pass through RGB, since its fill colour has three
    values and some operations need colour."""

    def __init__(self, policy: str, image_size: int, mean: Sequence[float]) -> None:
        fill = tuple(min(255, round(255 * value)) for value in (mean if len(mean) == 3 else [mean[0]] * 3))
        try:
            options = {"translate_const": int(image_size * 0.45), "img_mean": fill}
            self.policy = rand_augment_transform(policy, options)
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"augment.rand_augment: {policy!r} is no RandAugment policy of timm; write one as "
                "`rand-m9-mstd0.5-inc1`, or leave it empty"
            ) from error
        for operation in self.policy.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.policy(image.convert("RGB")).convert(image.mode)
