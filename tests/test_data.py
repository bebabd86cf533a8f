"""The data stream: every sample once, the same batches wherever it resumes and however it is spread."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lte_scale.batches import EvalBatch
from lte_scale.config.schema import AugmentConfig, DataConfig
from lte_scale.data import ShardIndex, open_index
from lte_scale.evaluation_data import evaluation_batches
from lte_scale.order import epoch_order, epoch_plan
from tests.shard_files import CLASSES, PLAIN, SIZE, png, write_lengths, write_tar
from tests.streams import HEAVY, HERE, UNEVEN, assert_same, damaged_index, identities, stream, take


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    heads=st.integers(1, 9),
    buffer=st.integers(1, 20),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 1000),
)
def test_all_heads_together_emit_each_sample_of_an_epoch_once(
    lengths: list[int], heads: int, buffer: int, seed: int, epoch: int
) -> None:
    assume(sum(lengths) >= heads)
    plans = [epoch_plan(lengths, seed, epoch, head, heads, buffer) for head in range(heads)]
    expected = {(shard, number) for shard, length in enumerate(lengths) for number in range(length)}
    assert Counter(sample for plan in plans for sample in plan) == Counter(expected)
    sizes = {len(plan) for plan in plans}
    assert max(sizes) - min(sizes) <= 1
    assert plans == [epoch_plan(lengths, seed, epoch, head, heads, buffer) for head in range(heads)]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 60), buffer=st.integers(1, 70), epoch=st.integers(0, 5))
def test_a_buffer_holds_no_more_than_its_size(count: int, buffer: int, epoch: int) -> None:
    order = epoch_order(count, 0, epoch, 0, buffer).tolist()
    assert sorted(order) == list(range(count))
    assert all(arrived < emitted + buffer for emitted, arrived in enumerate(order))


def test_buffer_of_one_keeps_the_order_and_large_ones_shuffle_differently_per_epoch_head_and_seed() -> None:
    assert epoch_order(50, 0, 0, 0, 1).tolist() == list(range(50))
    orders = [epoch_order(50, *key, 50).tolist() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_plan([10] * 20, 0, 0, 0, 1, 1) != epoch_plan([10] * 20, 0, 1, 0, 1, 1)


def test_the_order_of_a_resumed_run_outlives_versions_of_numpy() -> None:
    expected = [(1, 0), (1, 2), (1, 1), (0, 0), (0, 1), (2, 0)]
    assert epoch_plan([2, 3, 1], seed=5, epoch=3, head=0, heads=1, buffer=3) == expected


# ---------------------------------------------------------------------------------------------------- the stream


def test_the_stream_follows_the_plan_over_uneven_shards(tmp_path: Path) -> None:
    index = write_lengths(tmp_path, UNEVEN)
    samples = sum(UNEVEN)
    for heads in (1, 3, 8):  # 8 heads: more than there are shards
        seen: Counter[int] = Counter()
        for head in range(heads):
            plan = [
                index.offsets[shard] + number
                for epoch in range(2)
                for shard, number in epoch_plan(index.lengths, 7, epoch, head, heads, 4)
            ]
            source = stream(index, heads=range(head, head + 1), total_heads=heads, batch_size=1)
            batches = take(source, len(plan))
            assert [identity for batch in batches for identity in identities(batch.images)] == plan
            assert [batch.position for batch in batches] == list(range(1, len(plan) + 1))
            seen.update(plan)
        assert seen == Counter(dict.fromkeys(range(samples), 2))


def test_labels_belong_to_their_images_and_batches_cross_epochs(tmp_path: Path) -> None:
    source = stream(write_lengths(tmp_path, UNEVEN), batch_size=5)
    batches = take(source, 23)  # 5 epochs of 23 samples
    seen = [identity for batch in batches for identity in identities(batch.images)]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [identity % CLASSES for identity in seen]
    for epoch in range(5):
        assert sorted(seen[epoch * 23 : (epoch + 1) * 23]) == list(range(23))
    assert source.batches_per_epoch == pytest.approx(23 / 5)
    assert source.epoch_of(23) == pytest.approx(5.0)


def test_any_number_of_workers_resumes_at_any_position_with_the_very_next_sample(tmp_path: Path) -> None:
    index = write_lengths(tmp_path, (3, 8, 0, 1, 4))
    augment = replace(HEAVY, mixup=0.5, cutmix=0.5)
    options: dict[str, Any] = {"heads": range(1, 3), "total_heads": 3, "batch_size": 4, "augment": augment}
    whole = take(stream(index, **options), 10)  # 7.5 epochs of each head's part
    for workers in range(4):
        source = stream(index, **options, data=replace(HERE, workers=workers))
        for start in range(7) if workers != 2 else (0, 5):
            assert_same(take(source, 3, start), whole[start : start + 3])


@pytest.mark.parametrize("augment", [HEAVY, replace(HEAVY, mixup=0.8), replace(HEAVY, cutmix=1.0, label_smoothing=0.1)])
def test_heads_in_one_rank_are_the_heads_of_as_many_ranks(tmp_path: Path, augment: AugmentConfig) -> None:
    index = write_lengths(tmp_path, UNEVEN)
    together = take(stream(index, heads=range(3), total_heads=3, augment=augment), 5)
    apart = [take(stream(index, heads=range(h, h + 1), total_heads=3, augment=augment), 5) for h in range(3)]
    for number, batch in enumerate(together):
        assert batch.images.equal(torch.cat([batches[number].images for batches in apart]))
        assert batch.targets.equal(torch.cat([batches[number].targets for batches in apart]))
        assert batch.labels.equal(torch.cat([batches[number].labels for batches in apart]))
        soft = bool(augment.mixup or augment.cutmix)
        assert batch.targets.shape == ((12, CLASSES) if soft else (12,))
        assert batch.targets.dtype == (torch.float32 if soft else torch.int64)


def test_members_of_a_head_take_slices_of_its_batches(tmp_path: Path) -> None:
    index = write_lengths(tmp_path, UNEVEN)
    options: dict[str, Any] = {"heads": range(1, 2), "total_heads": 2, "batch_size": 6, "augment": HEAVY}
    whole = take(stream(index, **options), 4)
    members = [take(stream(index, **options, member=m, members=3), 4) for m in range(3)]
    for number, batch in enumerate(whole):
        assert batch.images.equal(torch.cat([batches[number].images for batches in members]))
        assert batch.labels.equal(torch.cat([batches[number].labels for batches in members]))


def test_augmentation_differs_between_epochs_and_samples(tmp_path: Path) -> None:
    same = png(3)
    write_tar(tmp_path / "0.tar", {"a.png": same, "a.cls": b"0", "b.png": same, "b.cls": b"0"})
    images = take(stream(open_index(str(tmp_path)), batch_size=4, augment=HEAVY), 1)[0].images
    assert len({tuple(image.flatten().tolist()) for image in images}) == 4


def test_the_training_loops_random_states_are_left_alone(tmp_path: Path) -> None:
    index = write_lengths(tmp_path, UNEVEN)
    for workers in (0, 1):
        source = stream(index, augment=replace(HEAVY, mixup=1.0), data=replace(HERE, workers=workers))
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        take(source, 2)
        assert torch.rand(3).equal(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_heads": 24}, "23 samples cannot be divided among 24 heads"),
        ({"batch_size": 6, "members": 4}, "train.batch_size: 6 .* multiple of 4"),
        ({"batch_size": 6, "members": 2, "augment": replace(PLAIN, mixup=1.0)}, "even number .* multiple of 4"),
        ({"num_classes": 0}, "model.num_classes"),
        ({"augment": AugmentConfig(mean=[0.1, 0.2])}, "augment.mean"),
        ({"data": replace(HERE, cache_dir="/proc/none/cache")}, "data.cache_dir: cannot create /proc/none/cache"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    index = write_lengths(tmp_path, UNEVEN)
    with pytest.raises(ValueError, match=message) as error:
        stream(index, **changes)
    assert "\n" not in str(error.value)


def test_more_classes_in_the_index_than_in_the_model_are_refused(tmp_path: Path) -> None:
    index = replace(write_lengths(tmp_path, UNEVEN), classes=tuple("abcdef"))
    with pytest.raises(ValueError, match=r"model.num_classes: 5 is fewer than the 6 classes"):
        stream(index)


def evaluation(index: ShardIndex, world: int, rank: int, workers: int = 0, size: int = 4) -> list[EvalBatch]:
    return list(
        evaluation_batches(
            index, rank=rank, world=world, batch_size=size, image_size=SIZE, channels=1, augment=PLAIN,
            data=DataConfig(workers=workers), num_classes=CLASSES,
        )
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 3, 5])
def test_evaluation_sees_each_sample_once_in_equally_many_batches_on_all_ranks(
    tmp_path: Path, world: int, workers: int
) -> None:
    index = write_lengths(tmp_path, (3, 11, 0, 2, 6))  # 22 samples
    ranks = [evaluation(index, world, rank, workers) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {math.ceil(math.ceil(22 / world) / 4)}
    seen = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.images.shape == (4, 1, SIZE, SIZE)
        valid = identities(batch.images[batch.valid])
        assert batch.labels[batch.valid].tolist() == [identity % CLASSES for identity in valid]
        seen += valid
    assert seen == list(range(22))


def test_evaluation_marks_damage(tmp_path: Path) -> None:
    index = damaged_index(tmp_path)
    batches = evaluation(index, 1, 0, size=8)
    assert [identities(batch.images[batch.valid]) for batch in batches] == [[0, 2, 4, 7], [8, 9, 10, 11]]
    assert [len(batch.bad) for batch in batches] == [4, 0]


def test_more_ranks_than_samples_still_yield_the_same_number_of_batches(tmp_path: Path) -> None:
    index = write_lengths(tmp_path, (2,))
    ranks = [evaluation(index, 4, rank) for rank in range(4)]
    assert [len(batches) for batches in ranks] == [1, 1, 1, 1]
    assert sum(int(batches[0].valid.sum()) for batches in ranks) == 2
