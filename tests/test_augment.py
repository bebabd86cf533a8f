"""Augmentations: shapes, ranges, determinism, grey and RGB, at every size that the data sets come in."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, _RAND_TRANSFORMS, AugmentOp
from torchvision.transforms import Compose, ConvertImageDtype, Normalize
from torchvision.transforms.functional import pil_to_tensor

from lte_scale.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ToBatch,
    erasing,
    eval_transform,
    mixup,
    preserved_randomness,
    seed_all,
    train_transform,
)
from lte_scale.config.schema import AugmentConfig

EVERYTHING = AugmentConfig(
    crop_scale=0.3, pad_crop=2, hflip=0.5, rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5
)


def image(width: int, height: int, channels: int, seed: int = 0) -> Image.Image:
    shape = (height, width) if channels == 1 else (height, width, 3)
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 28, 32, 64, 224])
def test_shapes_and_types(size: int, channels: int) -> None:
    for width, height in ((size, size), (size + 5, 2 * size), (7, 9)):
        source = image(width, height, channels)
        for transform in (
            train_transform(EVERYTHING, size, channels),
            train_transform(AugmentConfig(), size, channels),
            eval_transform(size),
        ):
            result = transform(source)
            assert (result.mode, result.size) == (source.mode, (size, size))
            batch = ToBatch(EVERYTHING, channels)([result] * 3)
            assert batch.shape == (3, channels, size, size)
            assert batch.dtype == torch.float32
            assert batch.is_contiguous()
            assert batch.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
def test_same_seed_same_result_and_other_seed_another(channels: int) -> None:
    transform, source = train_transform(EVERYTHING, 32, channels), image(40, 36, channels)
    results = []
    for seed in (1, 2, 1):
        seed_all("test", seed)
        results.append(np.stack([np.asarray(transform(source)) for _ in range(8)]))
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], results[1])


@pytest.mark.parametrize("operation", sorted({*_RAND_TRANSFORMS, *_RAND_INCREASING_TRANSFORMS}))
def test_every_operation_of_randaugment_takes_grey_images(operation: str) -> None:
    transform = train_transform(AugmentConfig(rand_augment="rand-m9", mean=[0.0], std=[1.0]), 28, 1)
    policy = next(step for step in transform.transforms if hasattr(step, "policy"))  # type: ignore[attr-defined]
    policy.policy.ops = [AugmentOp(operation, prob=1.0, magnitude=9, hparams={"translate_const": 12})]
    source = image(28, 28, 1)
    result = policy(source)
    assert result.mode == "L"
    assert result.size == (28, 28)


@pytest.mark.parametrize("magnitude", [0, 10])
@pytest.mark.parametrize("increasing", [0, 1])
def test_every_operation_of_randaugment_works_at_both_ends_of_its_range(magnitude: int, increasing: int) -> None:
    transform = train_transform(AugmentConfig(rand_augment=f"rand-m{magnitude}-p1-inc{increasing}"), 16, 3)
    policy = next(step for step in transform.transforms if hasattr(step, "policy"))  # type: ignore[attr-defined]
    for operation in policy.policy.ops:
        assert operation(image(16, 16, 3)).size == (16, 16), operation


def test_without_augmentation_an_image_of_the_right_size_is_only_normalised() -> None:
    source = image(16, 16, 3)
    pixels = torch.from_numpy(np.array(source)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for transform in (train_transform(AugmentConfig(), 16, 3), eval_transform(16)):
        batch = ToBatch(AugmentConfig(), 3)([transform(source), source])
        torch.testing.assert_close(batch, ((pixels - mean) / std).expand(2, -1, -1, -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_bit_for_bit_what_torchvision_makes_of_each_image(channels: int) -> None:
    sources = [image(20, 20, channels, seed) for seed in range(4)]
    config = AugmentConfig(mean=[0.3, 0.4, 0.5][:channels], std=[0.2, 0.3, 0.7][:channels])
    each = Compose([pil_to_tensor, ConvertImageDtype(torch.float32), Normalize(config.mean, config.std)])
    assert ToBatch(config, channels)(sources).equal(torch.stack([each(source) for source in sources]))


def test_erasing_follows_the_seed_and_differs_between_images() -> None:
    erase = erasing(AugmentConfig(random_erasing=1.0))
    assert erase is not None
    results = []
    for seed in (1, 2, 1):
        seed_all("test", seed)
        results.append(erase(torch.zeros(4, 1, 16, 16)))
    assert results[0].equal(results[2])
    assert not results[0].equal(results[1])
    assert all(0 < int((one != 0).sum()) < 16 * 16 for one in results[0])
    assert len({tuple(one.nonzero()[0].tolist()) for one in results[0]}) > 1
    assert erasing(AugmentConfig()) is None


def test_evaluation_at_224_crops_the_centre_of_256() -> None:
    source = Image.new("L", (512, 512), 0)
    source.paste(255, (32, 32, 480, 480))  # the central 7/8: all that a crop of 224 out of 256 leaves
    result = np.asarray(eval_transform(224)(source)) / 255
    assert result[4:-4, 4:-4].min() == 1
    assert result.mean() > 0.99


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (AugmentConfig(mean=[0.5, 0.5]), "augment.mean"),
        (AugmentConfig(std=[0.5]), "augment.std"),
        (AugmentConfig(std=[1.0, 0.0, 1.0]), "augment.std"),
        (AugmentConfig(rand_augment="trivial-m9"), "augment.rand_augment"),
        (AugmentConfig(rand_augment="rand-q9"), "augment.rand_augment"),
    ],
)
def test_nonsense_is_refused(config: AugmentConfig, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}") as error:
        train_transform(config, 32, 3), ToBatch(config, 3)
    assert "\n" not in str(error.value)


def test_mixup_targets_sum_to_one_and_mix_two_labels() -> None:
    mix = mixup(AugmentConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1), num_classes=5)
    assert mix is not None
    np.random.seed(0)
    images, targets = mix(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert images.shape == (4, 1, 8, 8)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets[0].topk(2).indices.sort().values.tolist() == [0, 3]
    assert mixup(AugmentConfig(label_smoothing=0.1), 5) is None


def test_random_states_are_put_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_all("outer")
    expected = draw()
    seed_all("outer")
    with preserved_randomness():
        seed_all("inner")
        assert draw() != expected
    assert draw() == expected
