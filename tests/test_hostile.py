"""What attackers would put into a shard, an index or a checkpoint: refused or damage, nothing is run or filled."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from lte_scale.data import open_index
from lte_scale.run_dir import whole_checkpoints
from lte_scale.state import TrainState
from tests.saver import Run, relist
from tests.shard_files import png, sample_files, write_lengths, write_tar
from tests.streams import HERE, identities, stream, take


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.path,)  # type: ignore[return-value]


def changed_table(tmp_path: Path, kind: str) -> Path:
    """A checkpoint whose table of tensors is of its own classes alone, and leads elsewhere."""
    saver = Run(tmp_path / "run")
    saver.save(1)
    checkpoint = whole_checkpoints(tmp_path / "run")[0]
    metadata = FileSystemReader(checkpoint).read_metadata()
    key = next(index for index in metadata.storage_data if index.fqn.startswith("head/1/"))
    if kind == "pickle":  # torch would read the entry by pickle
        metadata.state_dict_metadata[key.fqn] = BytesStorageMetadata()
        payload = pickle.dumps(Payload(tmp_path / "executed"))
        (checkpoint / "__0_1.distcp").write_bytes(payload)
        entry = replace(metadata.storage_data.pop(key), relative_path="__0_1.distcp", offset=0, length=len(payload))
        metadata.storage_data[type(key)(key.fqn)] = entry
    else:
        metadata.storage_data[key].relative_path = f"../{checkpoint.name}/__0_0.distcp"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    relist(checkpoint)
    return checkpoint


@pytest.mark.parametrize("kind", ["pickle", "elsewhere"])
def test_a_table_of_allowed_classes_neither_runs_code_nor_leaves_its_directory(tmp_path: Path, kind: str) -> None:
    checkpoint = changed_table(tmp_path, kind)
    with pytest.raises(ValueError, match=r"no part of a checkpoint|it is no table of tensors"):
        Run(tmp_path / "other").load(checkpoint)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pipe:touch {}/executed; cat 0.tar", "a pipe runs a shell command"),
        ("../0.tar", "not beside the index"),
        ("a\\n0.tar", "is no .tar|not beside the index"),
    ],
)
def test_an_index_names_shards_beside_it_alone(tmp_path: Path, name: str, said: str) -> None:
    write_lengths(tmp_path, [4])
    shard = {"name": name.format(tmp_path).replace("\\n", "\n"), "samples": 4}
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "classes": ["a"] * 5, "shards": [shard]}))
    with pytest.raises(ValueError, match=said):
        take(stream(open_index(str(tmp_path))), 1)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("samples", [-1, 10**15, 1.5, True, "4", float("inf")])
def test_an_index_whose_counts_are_none_is_refused(tmp_path: Path, samples: object) -> None:
    write_lengths(tmp_path, [4])
    shard = {"name": "00000.tar", "samples": samples}
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "classes": ["a"] * 5, "shards": [shard]}))
    with pytest.raises(ValueError, match=r"index.json: is no index of shards \(ValueError: .* is no whole number"):
        open_index(str(tmp_path))


def test_a_pattern_of_more_shards_than_there_can_be_is_refused_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    for pattern in ("{0..99999999999}.tar", "{0..9999}{0..9999}.tar", "{a,b}" * 40 + ".tar"):
        with pytest.raises(ValueError, match="stands for more than 1000000 shards"):
            open_index(str(tmp_path / pattern))
    assert time.monotonic() - began < 1


def with_member(path: Path, header: tarfile.TarInfo, content: bytes) -> None:
    """A shard of two good samples with something else between them."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for identity in (0, 1):
            for name, data in sample_files(identity).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            if not identity:
                tar.addfile(header, io.BytesIO(content))


def test_a_file_with_terabytes_of_holes_is_damage(tmp_path: Path) -> None:
    header = tarfile.TarInfo("0000005.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 512
    with_member(tmp_path / "0.tar", header, bytes(512))
    content = bytearray((tmp_path / "0.tar").read_bytes())
    at = next(at for at in range(0, len(content), 512) if content[at : at + 11] == b"0000005.png")
    content[at + 386 : at + 410] = b"%011o\0%011o\0" % (0, 512)
    content[at + 483 : at + 495] = b"\x80" + (1 << 42).to_bytes(11, "big")
    content[at + 148 : at + 156] = b"%06o\0 " % (sum(content[at : at + 148]) + 256 + sum(content[at + 156 : at + 512]))
    (tmp_path / "0.tar").write_bytes(bytes(content))
    index = open_index(str(tmp_path))
    assert index.samples == 1, "what comes after is not read"


def test_links_are_no_samples_and_nothing_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    header = tarfile.TarInfo("../../000007.png")
    header.type, header.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
    (tmp_path / "shards").mkdir()
    with_member(tmp_path / "shards" / "0.tar", header, b"")
    index = open_index(str(tmp_path / "shards"))
    batch = take(stream(index, batch_size=2, data=replace(HERE, shuffle_buffer=1)), 1)[0]
    assert identities(batch.images) == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.png", "shards"]


@pytest.mark.parametrize("name", ["png", "cls"])
def test_what_looks_like_an_image_or_label_is_damage(tmp_path: Path, name: str) -> None:
    """EPS would start another program; a number of 5,000 digits is more than Python reads."""
    content = {"png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "cls": b"1" * 5000}[name]
    files = {**sample_files(0), **sample_files(1), f"000001.{name}": content}
    write_tar(tmp_path / "0.tar", files)
    batch = take(stream(open_index(str(tmp_path)), batch_size=2, data=replace(HERE, shuffle_buffer=1)), 1)[0]
    assert identities(batch.images) == [0, 0] and batch.damaged == 1
    assert f"000001.{name}" in batch.bad[0]


def test_names_from_an_archive_do_not_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    files = {**sample_files(0), "a\n\x1b[2J.png": png(1), "a\n\x1b[2J.cls": b"x"}
    write_tar(tmp_path / "0.tar", files)
    batch = take(stream(open_index(str(tmp_path)), batch_size=2, data=replace(HERE, shuffle_buffer=1)), 1)[0]
    assert len(batch.bad) == 1 and batch.bad[0].isprintable()


@pytest.mark.parametrize("values", [{"sent_bytes": "\r"}, {"run": "\x1b[2J"}, {"a\nb": 1}])
def test_nor_do_texts_from_a_checkpoint(tmp_path: Path, values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"its state has .* = .*; name another checkpoint") as refusal:
        TrainState.read(values, tmp_path)
    assert str(refusal.value).isprintable()
