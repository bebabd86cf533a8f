"""Writing shards from every source, finding them again, and saying what is wrong with a location."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from lte_scale import archive, shards
from lte_scale.archive import beside, members, open_tar, read_samples, shard_name
from lte_scale.index import open_index
from lte_scale.shards import write_shards
from tests.shard_files import sample_files, write_lengths, write_tar


def content(split: Path) -> list[tuple[bytes, int, str]]:
    """Image, label and image's extension of all samples of a split, in order."""
    found = []
    for shard in open_index(str(split)).shards:
        for _, _, files in read_samples(shard.url, range(shard.samples)):
            label = int(files.pop("cls"))
            ((extension, image),) = files.items()
            found.append((image, label, extension))
    return found


def pixels(image: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(image)))


def image_file(path: Path, seed: int, mode: str = "RGB") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(0, 256, (6, 5, 3)).astype(np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path.read_bytes()


def checksums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_digits_are_split_stratified_and_keep_their_pixels(tmp_path: Path) -> None:
    write_shards("digits", tmp_path / "out", samples_per_shard=300)
    data = load_digits()
    expected = Counter((np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
                       for image, label in zip(data.images, data.target, strict=True))  # fmt: skip
    train, val = content(tmp_path / "out" / "train"), content(tmp_path / "out" / "val")
    assert Counter((pixels(image).tobytes(), label) for image, label, _ in train + val) == expected
    assert {extension for *_, extension in train} == {"png"}
    assert (len(train), len(val)) == (1438, 359)
    for label, held_out in Counter(label for _, label, _ in val).items():
        assert held_out == round(0.2 * np.count_nonzero(data.target == label))
    index = open_index(str(tmp_path / "out" / "train"))
    assert index.classes == tuple("0123456789")
    assert index.lengths == (300, 300, 300, 300, 238)
    raw = json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    assert (raw["format"], raw["channels"]) == (1, 1)
    for entry in raw["shards"]:
        shard = (tmp_path / "out" / "train" / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(shard), hashlib.sha256(shard).hexdigest())
    first = [label for _, label, _ in train[:300]]
    assert min(Counter(first).values()) > 15, "classes are mixed within a shard"


def test_the_bytes_depend_on_source_and_seed_alone(tmp_path: Path) -> None:
    write_shards("digits", tmp_path / "one", samples_per_shard=400, workers=1)
    write_shards("digits", tmp_path / "two", samples_per_shard=400, workers=3)
    write_shards("digits", tmp_path / "other", samples_per_shard=400, workers=1, seed=1)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")
    assert checksums(tmp_path / "one") != checksums(tmp_path / "other")
    with tarfile.open(tmp_path / "one" / "train" / "00000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files(tmp_path: Path, compressed: bool) -> None:
    rng = np.random.RandomState(0)
    expected: dict[str, Counter[tuple[bytes, int]]] = {}
    source = tmp_path / "fashion-mnist"
    source.mkdir()
    for split, name, count in (("train", "train", 50), ("val", "t10k", 20)):
        images = rng.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        expected[split] = Counter((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
        for kind, values in (("images", images), ("labels", labels)):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            data = header + values.tobytes()
            path = source / f"{name}-{kind}-idx{values.ndim}-ubyte"
            if compressed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    write_shards(str(source), tmp_path / "out", samples_per_shard=20)
    for split in ("train", "val"):
        written = content(tmp_path / "out" / split)
        assert Counter((pixels(image).tobytes(), label) for image, label, _ in written) == expected[split]
    assert open_index(str(tmp_path / "out" / "train")).classes[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), "has no t10k-labels-idx1-ubyte"),
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(b"hello"), "is no IDX file"),
        (lambda folder: (folder / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x05ab"), "announces 5"),
        (lambda folder: (folder / "train-images-idx3-ubyte.gz").write_bytes(b"ab"), "cannot be read"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, damage: object, message: str) -> None:
    folder = tmp_path / "idx"
    folder.mkdir()
    for name in ("train", "t10k"):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x01" * 3 + b"x")
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + b"\0\0\0\x01" + b"\0")
    damage(folder)  # type: ignore[operator]
    refused(message, str(folder), tmp_path / "out")


def refused(message: str, source: str, out: Path, **options: float) -> None:
    with pytest.raises(ValueError, match=message) as error:
        write_shards(source, out, workers=1, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")], "nothing half-written"


def test_image_folder_with_splits_keeps_original_bytes(tmp_path: Path) -> None:
    source = tmp_path / "images"
    expected: dict[str, list[tuple[bytes, int, str]]] = {"train": [], "val": []}
    for split, names in (("train", ("cat", "dog", "eel")), ("val", ("cat", "eel"))):
        for name in names:
            label = ("cat", "dog", "eel").index(name)
            for number, suffix in enumerate((".jpg", ".JPEG", ".png")):
                data = image_file(source / split / name / "deep" / f"a.b.{number}{suffix}", seed=number)
                expected[split].append((data, label, suffix[1:].lower()))
    (source / "train" / "cat" / "notes.txt").write_text("no image")
    image_file(source / "train" / "cat" / ".hidden.png", 0)
    write_shards(str(source), tmp_path / "out", samples_per_shard=4)
    for split in ("train", "val"):
        assert sorted(content(tmp_path / "out" / split)) == sorted(expected[split])
    assert open_index(str(tmp_path / "out" / "val")).classes == ("cat", "dog", "eel")


def test_image_folder_without_splits_is_split_and_other_formats_become_png(tmp_path: Path) -> None:
    source = tmp_path / "images"
    for name, count in (("a", 20), ("b", 10), ("c", 1)):
        for number in range(count):
            image_file(source / name / f"{number}.bmp", seed=number, mode="L")
    write_shards(str(source), tmp_path / "out", val_ratio=0.2)
    train, val = content(tmp_path / "out" / "train"), content(tmp_path / "out" / "val")
    assert Counter(label for _, label, _ in train) == {0: 16, 1: 8, 2: 1}
    assert Counter(label for _, label, _ in val) == {0: 4, 1: 2}
    assert {extension for *_, extension in train + val} == {"png"}
    original = {pixels((source / "a" / f"{number}.bmp").read_bytes()).tobytes() for number in range(20)}
    assert {pixels(image).tobytes() for image, label, _ in train + val if label == 0} == original
    assert json.loads((tmp_path / "out" / "val" / "index.json").read_text())["channels"] == 1


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("no such folder", str(tmp_path / "nothing"), out)
    (tmp_path / "empty").mkdir()
    refused("has no class directories", str(tmp_path / "empty"), out)
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    refused("hollow/cat: a class directory without images", str(tmp_path / "hollow"), out)
    for split, name in (("train", "cat"), ("val", "dog")):
        image_file(tmp_path / "odd" / split / name / "0.png", 0)
    refused("val/dog: train has no class dog", str(tmp_path / "odd"), out)
    image_file(tmp_path / "bad" / "cat" / "0.png", 0)
    (tmp_path / "bad" / "cat" / "1.bmp").write_bytes(b"no image")
    (tmp_path / "bad" / "cat" / "2.bmp").write_bytes(b"no image")
    refused(r"bad/cat/[12].bmp: cannot be read as an image", str(tmp_path / "bad"), out)
    refused("--val-ratio: 1.5", "digits", out, val_ratio=1.5)
    refused("--samples-per-shard: 0", "digits", out, samples_per_shard=0)


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_shards("digits", tmp_path / "empty", samples_per_shard=2000)
    before = checksums(tmp_path / "empty")
    with pytest.raises(ValueError, match="exists and is not empty; name a new directory"):
        write_shards("digits", tmp_path / "empty")
    assert checksums(tmp_path / "empty") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: exists and is not empty"):
        write_shards("digits", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match="cannot be written"):
        write_shards("digits", Path("/proc/none/out"))


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_write_index", interrupted)
    parser = argparse.ArgumentParser()
    shards.add_arguments(parser)
    arguments = parser.parse_args(["digits", str(tmp_path / "out"), "--workers", "1", "--quiet"])
    assert shards.run(arguments) == 130
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    shards.add_arguments(parser)
    options = ["--val-ratio", "0.5", "--samples-per-shard", "500", "--seed", "3"]
    assert shards.run(parser.parse_args(["digits", str(tmp_path / "out"), *options])) == 0
    train, val = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r".*/out/train: 899 samples, 10 classes, 2 shards", train)
    assert re.fullmatch(r".*/out/val: 898 samples, 10 classes, 2 shards", val)


def test_existing_shards_are_indexed_in_place_or_elsewhere(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_lengths(tmp_path / "mine" / split, (3, 7))
    with (tmp_path / "mine" / "train" / "00001.tar").open("r+b") as file:
        file.truncate(4 * 2048 + 700)
    before = checksums(tmp_path / "mine")
    write_shards(str(tmp_path / "mine"), tmp_path / "index", workers=1)
    assert checksums(tmp_path / "mine") == before
    assert sorted(checksums(tmp_path / "index")) == ["train/index.json", "val/index.json"]
    index = open_index(str(tmp_path / "index" / "train"))
    assert index.lengths == (3, 5)
    assert index.num_classes == 5
    assert Path(index.shards[0].url) == (tmp_path / "mine" / "train" / "00000.tar").resolve()
    write_shards(str(tmp_path / "mine"), tmp_path / "mine", workers=1)
    assert open_index(str(tmp_path / "mine" / "val")).lengths == (3, 7)
    raw = json.loads((tmp_path / "mine" / "val" / "index.json").read_text())
    assert [shard["name"] for shard in raw["shards"]] == ["00000.tar", "00001.tar"]
    with pytest.raises(ValueError, match=r"have an index.json already"):
        write_shards(str(tmp_path / "mine"), tmp_path / "again")


# ----------------------------------------------------------------------------------------------------- locations


def test_patterns_take_their_counts_from_the_index_or_the_headers(tmp_path: Path) -> None:
    for part in ("a", "b"):
        write_lengths(tmp_path / part, (2, 4, 6))
    pattern = f"{tmp_path}/{{a,b}}/{{00001..00002}}.tar"
    assert open_index(pattern).lengths == (4, 6, 4, 6)
    for part in ("a", "b"):
        write_shards(str(tmp_path / part), tmp_path / part, workers=1)
    index = open_index(pattern)
    assert index.lengths == (4, 6, 4, 6)
    assert index.num_classes == 5
    assert index.offsets == (0, 4, 10, 14)
    assert all(shard.sha256 for shard in index.shards)


def test_timms_info_file_is_read(tmp_path: Path) -> None:
    write_lengths(tmp_path, (2, 3))
    splits = {
        "train": {"filenames": ["00000.tar"], "shard_lengths": [2], "num_samples": 2},
        "validation": {"filenames": ["00001.tar"], "shard_lengths": [30], "num_samples": 30},
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    assert open_index(f"{tmp_path}/00001.tar").lengths == (30,)
    assert open_index(str(tmp_path)).lengths == (2, 30)


def test_members_group_as_in_webdataset(tmp_path: Path) -> None:
    names = ("./a/1.png", "./a/1.cls", "b/1.JPG", "b/1.cls", "b/1.meta.json", "2.cls", "noextension", "__meta__/x.json")
    write_tar(tmp_path / "0.tar", dict.fromkeys(names, b""))
    with open_tar(str(tmp_path / "0.tar")) as tar:
        found = [(number, key, extension) for number, key, extension, _ in members(tar)]
    assert found == [
        (0, "./a/1", "png"), (0, "./a/1", "cls"), (1, "b/1", "jpg"), (1, "b/1", "cls"), (1, "b/1", "meta.json"),
        (2, "2", "cls"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "name", "index"),
    [
        ("data/train/000.tar", "000.tar", "data/train/index.json"),
        ("000.tar", "000.tar", "index.json"),
        ("http://host/a/000.tar?key=1", "000.tar", "http://host/a/index.json?key=1"),
        ("s3://bucket/a.tar/000.tar", "000.tar", "s3://bucket/a.tar/index.json"),
        ("pipe:aws s3 cp 's3://b/000.tar' -", "000.tar", "pipe:aws s3 cp 's3://b/index.json' -"),
        ("data/train", "", None),
    ],
)
def test_the_index_is_beside_the_shard(url: str, name: str, index: str | None) -> None:
    assert shard_name(url) == name
    if index is not None:
        assert beside(url, "index.json") == index


def test_locations_that_cannot_be_used_say_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "BACKOFF_SECONDS", (0.01, 0.02))
    write_lengths(tmp_path / "data" / "train", (2, 2))
    cases = {
        "": "set data.train",
        f"{tmp_path}/data/trian": f"no such directory or shard; the nearest that exists is {tmp_path}/data/train",
        f"{tmp_path}/dat/train": f"the nearest that exists is {tmp_path}/data",
        f"{tmp_path}/data": f"neither index.json nor .tar files; did you mean {tmp_path}/data/train",
        f"{tmp_path}/data/train/{{00000..00002}}.tar": "00002.tar: no such shard; the nearest that exists is",
        f"{tmp_path}/data/train/{{00000..00001.tar": "unbalanced braces",
        "http://127.0.0.1:9/data/{0..1}.tar": "no index.json beside the shards",
    }
    for location, message in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            open_index(location)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no index of shards"),
        ('{"format": 2, "shards": [], "classes": []}', "format 2 is not 1"),
        ('{"format": 1, "classes": []}', "is no index of shards"),
        ('{"format": 1, "classes": [], "shards": [{"name": "x", "samples": 1}]}', "'x' is named twice or is no .tar"),
        ('{"format": 1, "classes": [], "shards": []}', "did you mean|holds no samples|neither"),
        ("[]", "is no index of shards"),
    ],
)
def test_damaged_indexes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        open_index(str(tmp_path))
    assert "\n" not in str(error.value)


def test_local_shards_without_an_index_are_counted_as_far_as_they_can_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "0.tar", sample_files(0) | sample_files(1))
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:1600])
    (tmp_path / "2.tar").write_bytes(b"")
    assert open_index(str(tmp_path)).lengths == (2, 1, 0)
    assert "2.tar is damaged after 0 samples" in caplog.text
