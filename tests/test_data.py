"""The data stream: every sample once, the same batches wherever it resumes and however it is spread; damage."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lte_scale import archive, reading
from lte_scale.config.schema import AugmentConfig, DataConfig
from lte_scale.data import Batch, DataError, EvalBatch, ShardIndex, TrainStream, evaluation_batches, open_index
from lte_scale.index import Shard
from lte_scale.order import epoch_order, epoch_plan
from lte_scale.shards import write_shards
from tests.shard_files import CLASSES, PLAIN, SIZE, png, sample_files, write_lengths, write_tar

UNEVEN = (3, 11, 0, 1, 6, 2)
HEAVY = AugmentConfig(
    crop_scale=0.5, pad_crop=1, hflip=0.5, rand_augment="rand-m9-mstd0.5", random_erasing=0.5, mean=[0.0], std=[1.0]
)
HERE = DataConfig(workers=0, shuffle_buffer=4, max_bad_ratio=1.0)


def stream(index: ShardIndex, **changes: Any) -> TrainStream:
    options: dict[str, Any] = {
        "heads": range(1), "total_heads": 1, "member": 0, "members": 1, "batch_size": 4, "seed": 7,
        "image_size": SIZE, "channels": 1, "num_classes": CLASSES, "augment": PLAIN, "data": HERE,
    }  # fmt: skip
    return TrainStream(index, **(options | changes))


def take(source: TrainStream, count: int, start: int = 0) -> list[Batch]:
    batches = source.iterate(start)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()  # type: ignore[attr-defined]


def identities(images: Tensor) -> list[int]:
    """Which samples unaugmented images are."""
    pixels = (images[:, 0, 0, :2] * 255).round().long()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def assert_same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.images.equal(other.images)
        assert one.targets.equal(other.targets)
        assert one.labels.equal(other.labels)
        assert one.position == other.position


# ----------------------------------------------------------------------------------------------------- the order


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


# -------------------------------------------------------------------------------------------------------- damage


def damaged_index(tmp_path: Path) -> ShardIndex:
    """Twelve samples (0 ... 11) of which 1 has no label, 3 a damaged image, 5 no image, 6 a label out of range."""
    files: dict[str, bytes] = {}
    for identity in range(12):
        files |= sample_files(identity)
    del files["000001.cls"]
    files["000003.png"] = files["000003.png"][:40]
    del files["000005.png"]
    files["000006.cls"] = b"99"
    write_tar(tmp_path / "0.tar", files)
    return open_index(str(tmp_path))


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


# ---------------------------------------------------------------------------------------------------- evaluation


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


# ------------------------------------------------------------------------------------------------------- remotes


class Server(ThreadingHTTPServer):
    """Serves a directory; the first answer for a path in `failing` is an error."""

    def __init__(self, folder: Path) -> None:
        self.requested: Counter[str] = Counter()
        self.failing: set[str] = set()
        self.cut: set[str] = set()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[-1]
                server.requested[name] += 1
                if name in server.failing:
                    server.failing.discard(name)
                    self.send_error(503)
                elif name in server.cut:
                    server.cut.discard(name)
                    content = (folder / name).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[:9000])
                    self.close_connection = True
                else:
                    super().do_GET()

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "BACKOFF_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(reading, "BACKOFF_SECONDS", (0.01, 0.02))


@pytest.fixture
def server(tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """30 samples in three shards with an index, by HTTP."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_lengths(tmp_path / "raw", (10, 10, 10))
    write_shards(str(tmp_path / "raw"), tmp_path / "raw", workers=1)
    serving = Server(tmp_path / "raw")
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield serving
    serving.shutdown()
    thread.join()
    serving.server_close()


@pytest.mark.parametrize("pattern", ["/{00000..00002}.tar", "/", ""])
def test_http_streams_the_same_batches_as_local_files(tmp_path: Path, server: Server, pattern: str) -> None:
    index = open_index(server.url + pattern)
    local = open_index(str(tmp_path / "raw"))
    assert (index.samples, index.num_classes, index.lengths) == (30, CLASSES, local.lengths)
    expected = take(stream(local, batch_size=5), 7)
    for workers in (0, 2):
        assert_same(take(stream(index, batch_size=5, data=replace(HERE, workers=workers)), 7), expected)


def test_a_cache_downloads_each_shard_once(tmp_path: Path, server: Server) -> None:
    index = open_index(f"{server.url}/{{00000..00002}}.tar")
    data = replace(HERE, workers=2, cache_dir=str(tmp_path / "cache"))
    expected = take(stream(open_index(str(tmp_path / "raw")), batch_size=5), 13)
    server.requested.clear()
    server.failing = {"00001.tar"}
    server.cut = {"00002.tar"}
    assert_same(take(stream(index, batch_size=5, data=data), 13), expected)
    assert server.requested == Counter({"00000.tar": 1, "00001.tar": 2, "00002.tar": 2})
    assert sorted(p.name[-9:] for p in (tmp_path / "cache").glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_cached_shard_that_is_not_the_indexed_one_is_damage(tmp_path: Path, server: Server) -> None:
    index = open_index(server.url)
    shard = tmp_path / "raw" / "00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"000012", b"000021"))
    data = replace(HERE, shuffle_buffer=30, cache_dir=str(tmp_path / "cache"))
    batches = take(stream(index, batch_size=15, data=data), 2)
    names = [name for batch in batches for name in batch.bad]
    assert len(names) == 1
    assert "checksum" in names[0]


def test_a_stream_that_breaks_is_taken_up_where_it_broke(tmp_path: Path, server: Server) -> None:
    index = open_index(server.url)
    server.failing, server.cut = {"00000.tar"}, {"00001.tar"}
    batches = take(stream(index, batch_size=5), 6)
    assert [batch.bad for batch in batches] == [()] * 6
    assert_same(batches, take(stream(open_index(str(tmp_path / "raw")), batch_size=5), 6))


def test_a_shard_missing_on_the_server_is_named_and_survived(tmp_path: Path, server: Server) -> None:
    index = open_index(server.url)
    (tmp_path / "raw" / "00001.tar").unlink()
    batches = take(stream(index, batch_size=15, data=replace(HERE, shuffle_buffer=30)), 2)
    names = [name for batch in batches for name in batch.bad]
    assert names == [f"{server.url}/00001.tar: cannot be read from sample 0 of 10 on (HTTP 404 File not found)"]
    assert server.requested["00001.tar"] == 1, "what is not there is not asked for again"


@pytest.mark.usefixtures("impatient")
def test_pipes_run_only_when_allowed(tmp_path: Path) -> None:
    write_lengths(tmp_path, (10, 10))
    pattern = f"pipe:cat {tmp_path}/{{00000..00001}}.tar"
    with pytest.raises(ValueError, match=r"set data.allow_pipe=true"):
        open_index(pattern)
    with pytest.raises(ValueError, match=r"no index.json beside the shards"):
        open_index(pattern, allow_pipe=True)
    write_shards(str(tmp_path), tmp_path, workers=1)
    index = open_index(pattern, allow_pipe=True)
    assert_same(take(stream(index), 7), take(stream(open_index(str(tmp_path))), 7))
    gone = replace(index, shards=(Shard(f"pipe:cat {tmp_path}/gone.tar", 10), *index.shards[1:]))
    assert take(stream(gone, batch_size=20), 1)[0].damaged == 10


# ------------------------------------------------------------------------------------------------------ processes

SCRIPT = """
import signal, sys
from tests.shard_files import CLASSES, PLAIN, SIZE, open_index
from lte_scale.config.schema import DataConfig
from lte_scale.data import TrainStream
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
source = TrainStream(
    open_index(sys.argv[1]), heads=range(1), total_heads=1, member=0, members=1, batch_size=4, seed=0, image_size=SIZE,
    channels=1, num_classes=CLASSES, augment=PLAIN, data=DataConfig(workers=2),
)
batches = source.iterate(0)
next(batches)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    next(batches)
print("done", flush=True)
"""


def group_is_empty(group: int, within_seconds: float) -> bool:
    end = time.monotonic() + within_seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_signals_to_the_group_leave_the_workers_to_finish_and_they_end_with_the_process(tmp_path: Path) -> None:
    write_lengths(tmp_path, UNEVEN)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=Path(__file__).parents[1], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate("go\n", timeout=60)  # the script leaves its stream open
    assert (output, errors, process.returncode) == ("done\n", "", 0)
    assert group_is_empty(process.pid, 5)


def _one_batch(folder: str, ready: Connection) -> None:
    os.setsid()
    batches = stream(open_index(folder), data=replace(HERE, workers=2)).iterate(0)
    next(batches)
    ready.send(True)
    time.sleep(60)


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    write_lengths(tmp_path, UNEVEN)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_one_batch, args=(str(tmp_path), theirs))
    process.start()
    assert process.pid is not None
    assert ours.poll(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert group_is_empty(process.pid, 20)


def test_workers_stuck_in_a_read_do_not_hold_up_the_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")  # opening it blocks, for nobody writes
    index = ShardIndex("stuck", (Shard(str(tmp_path / "0.tar"), 10),))
    others = set(multiprocessing.active_children())
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        take(stream(index, data=replace(HERE, workers=3)), 1)
    end = time.monotonic() + 5  # by itself, torch waits 5 seconds for each of the three
    while set(multiprocessing.active_children()) - others and time.monotonic() < end:
        time.sleep(0.1)
    assert not set(multiprocessing.active_children()) - others
