"""Damaged samples and shards: named, counted, replaced by the next good one, and bounded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lte_scale.config.schema import DataConfig
from lte_scale.data import DataError, open_index
from tests.shard_files import sample_files, write_lengths, write_tar
from tests.streams import HEAVY, HERE, assert_same, damaged_index, identities, stream, take


def test_damaged_samples_are_named_and_replaced_by_the_next_good_one(tmp_path: Path) -> None:
    index = damaged_index(tmp_path)
    assert index.samples == 12
    for workers in (0, 2):
        data = replace(HERE, shuffle_buffer=1, workers=workers)
        batches = take(stream(index, batch_size=6, augment=HEAVY, data=data), 4)
        clean = take(stream(index, batch_size=6, data=data), 2)
        assert identities(clean[0].images) == [0, 2, 2, 4, 4, 0]  # 5 is replaced from the beginning
        assert identities(clean[1].images) == [7, 7, 8, 9, 10, 11]
        names = [name.split("0.tar/")[1].split(":")[0] for batch in batches for name in batch.bad]
        assert names == ["000001", "000003.png", "000005", "000006.cls"] * 2
        assert [batch.damaged for batch in batches] == [3, 1, 3, 1]
        assert batches[0].images[1].equal(batches[0].images[2]), "a copy, with the augmentation of its original"
        assert batches[0].labels.tolist() == [0, 2, 2, 4, 4, 0]


def test_members_agree_on_replacements(tmp_path: Path) -> None:
    index = damaged_index(tmp_path)
    options: dict[str, Any] = {"batch_size": 6, "data": replace(HERE, shuffle_buffer=1)}
    whole = take(stream(index, **options), 2)
    members = [take(stream(index, **options, member=m, members=6), 2) for m in range(6)]
    for number, batch in enumerate(whole):
        assert batch.images.equal(torch.cat([batches[number].images for batches in members]))
        assert batch.bad == tuple(name for batches in members for name in batches[number].bad)


def test_a_batch_without_a_good_sample_is_left_out_and_its_damage_comes_with_the_next(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for identity in range(6):
        files |= sample_files(identity)
    for identity in (2, 3):
        files[f"{identity:06d}.png"] = b"no image"
    write_tar(tmp_path / "0.tar", files)
    for workers in (0, 2):
        data = replace(HERE, shuffle_buffer=1, workers=workers)
        batches = take(stream(open_index(str(tmp_path)), batch_size=2, data=data), 3)
        assert [identities(batch.images) for batch in batches] == [[0, 1], [4, 5], [0, 1]]
        assert [batch.position for batch in batches] == [1, 3, 4]
        assert [len(batch.bad) for batch in batches] == [0, 2, 0]


@pytest.mark.parametrize("fault", ["missing", "truncated", "empty", "garbage", "fewer"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_named_once_an_epoch_and_the_others_are_read_whole(
    tmp_path: Path, fault: str, workers: int
) -> None:
    index = write_lengths(tmp_path, (8, 8, 8))
    shard = tmp_path / "00001.tar"
    if fault == "missing":
        shard.unlink()
    elif fault == "truncated":
        shard.write_bytes(shard.read_bytes()[: 4 * 2048 + 700])  # four samples of four blocks each, and a bit
    elif fault == "empty":
        shard.write_bytes(b"")
    elif fault == "garbage":
        shard.write_bytes(os.urandom(5000))
    elif fault == "fewer":
        write_tar(shard, sample_files(8))
    data = replace(HERE, shuffle_buffer=24, workers=workers)
    batches = take(stream(index, batch_size=12, data=data), 4)
    for epoch in range(2):
        both = batches[2 * epoch : 2 * epoch + 2]
        seen = {identity for batch in both for identity in identities(batch.images)}
        assert {*range(8), *range(16, 24)} <= seen
        names = [name for batch in both for name in batch.bad]
        assert len(names) == 1
        assert names[0].startswith(f"{shard}: cannot be read from sample ")
        assert sum(batch.damaged for batch in both) == 24 - len(seen)
        assert len(seen & set(range(8, 16))) == {"truncated": 4, "fewer": 1}.get(fault, 0)
    assert_same(take(stream(index, batch_size=12, data=data), 2, start=1), batches[1:3])


def test_too_much_damage_ends_the_run_with_counts_and_names(tmp_path: Path) -> None:
    index = write_lengths(tmp_path, (100,) * 4)
    (tmp_path / "00002.tar").unlink()
    for workers in (0, 1):
        data = DataConfig(workers=workers, shuffle_buffer=1000, max_bad_ratio=0.2)
        with pytest.raises(DataError, match=r"samples read are damaged, more than data.max_bad_ratio=0.2") as error:
            take(stream(index, batch_size=10, data=data), 100)
        assert "00002.tar: cannot be read from sample 0 of 100 on (No such file or directory)" in str(error.value)
        assert "\n" not in str(error.value)
        data = replace(data, max_bad_ratio=0.4)
        assert len(take(stream(index, batch_size=10, data=data), 100)) == 100


def test_data_without_a_single_good_sample_ends_the_run(tmp_path: Path) -> None:
    index = write_lengths(tmp_path, (5, 5))
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match="no whole batch in 7 batches"):
        take(stream(index, batch_size=2), 1)
