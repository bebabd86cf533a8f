"""Bytes nobody meant: configurations, overrides, shards, indexes and checkpoints give data or an error, never a
traceback, hang or stray file.

    FUZZ_EXAMPLES=1000 pytest tests/test_fuzz.py --hypothesis-seed=0 --hypothesis-show-statistics

FUZZ_EXAMPLES examples of each kind (40 unless set; `make test-faults` takes 1,000); hypothesis prints how to repeat one
that fails.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lte_scale.config import ConfigError, dump, load_config
from lte_scale.config.reference import markdown
from lte_scale.data import open_index
from lte_scale.run_dir import whole_checkpoints
from lte_scale.state import TrainState
from tests.saver import Run, relist
from tests.shard_files import sample_files
from tests.streams import stream, take

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=120_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    print_blob=True,
)

# Where and what to overwrite, to cut, to insert; places as a part of the whole.
PLACES = st.floats(0, 1, exclude_max=True)
EDITS = st.lists(st.tuples(st.sampled_from("ocid"), PLACES, st.binary(min_size=1, max_size=12)), max_size=4)
NAMES = st.text(max_size=20) | st.sampled_from(
    ["../../evil.png", "/tmp/evil.cls", "000001.png", "a\nb.cls", "\x1b[31m.png", "x" * 300 + ".png", "__x__/1.png"]
)
NUMBERS = st.sampled_from(
    [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000001\0", b"\0" * 12, b" " * 12]
)
FIELDS = {"size": 124, "type": 156, "link": 157, "checksum": 148, "mode": 100, "mtime": 136, "sparse": 386, "real": 483}


def edited(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, new in edits:
        at = int(place * len(content))
        end = {"o": at + len(new), "c": len(content), "i": at, "d": at + 512}[kind]
        content = content[:at] + (b"" if kind in "cd" else new) + content[end:]
    return content


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """A shard of a few samples whose names, kinds and headers are not what they should be."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    ) as tar:
        for identity in range(4):
            for name, content in sample_files(identity).items():
                header = tarfile.TarInfo(draw(NAMES) if draw(st.integers(0, 4)) == 0 else name)
                content = draw(st.binary(max_size=40)) if draw(st.integers(0, 4)) == 0 else content
                header.size = len(content)
                header.type = draw(
                    st.sampled_from([tarfile.REGTYPE] * 12 + [b"1", b"2", b"3", b"5", b"7", b"S", b"L", b"x"])
                )
                header.linkname = draw(st.sampled_from(["", "/etc/passwd", "../../up"]))
                tar.addfile(header, io.BytesIO(content))
    archive = bytearray(buffer.getvalue())
    for block, field, value in draw(
        st.lists(
            st.tuples(st.integers(0, 24), st.sampled_from(sorted(FIELDS)), NUMBERS | st.binary(max_size=3)), max_size=3
        )
    ):
        at = block * 512 + FIELDS[field]
        archive[at : at + len(value)] = value
        header_bytes = bytes(archive[block * 512 : block * 512 + 512])
        if draw(st.booleans()) and len(header_bytes) == 512:  # so that the header counts as one
            total = sum(header_bytes[:148]) + 8 * 32 + sum(header_bytes[156:])
            archive[block * 512 + 148 : block * 512 + 156] = b"%06o\0 " % total
    return edited(bytes(archive), draw(EDITS))


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def read_or_refused(folder: Path) -> None:
    """One line, or batches of whole images, whatever is in the shards."""
    before = names_below(folder.parent)
    with refused_in_one_line():
        batches = take(stream(open_index(str(folder)), batch_size=2), 6)
        assert all(name.isprintable() for batch in batches for name in batch.bad)
        assert all(batch.images.shape[0] == 2 and batch.images.isfinite().all() for batch in batches)
    assert names_below(folder.parent) == before


@fuzzed
@given(tars())
def test_any_shard_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    shards = tmp_path / "shards"
    shards.mkdir(exist_ok=True)
    (shards / "0.tar").write_bytes(content)
    read_or_refused(shards)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**15),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SHARDS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["0.tar", "../0.tar", "/etc/0.tar", "pipe:touch evil #0.tar", "gs://a'b/0.tar"])
            | st.text()
        },
        optional={"samples": st.integers(-1, 5) | JSON, "bytes": JSON, "sha256": JSON},
    )
    | JSON,
    max_size=3,
)
INDEXES = st.one_of(
    JSON,
    st.fixed_dictionaries({"format": st.just(1) | JSON, "classes": st.just(["a"] * 5) | JSON, "shards": SHARDS | JSON}),
    st.fixed_dictionaries({"filenames": st.lists(st.text()) | JSON, "shard_lengths": st.lists(st.integers()) | JSON}),
)


@fuzzed
@given(INDEXES, EDITS)
def test_any_index_is_read_or_refused(tmp_path: Path, index: object, edits: list[tuple[str, float, bytes]]) -> None:
    shards = tmp_path / "shards"
    if not shards.exists():
        shards.mkdir()
        with tarfile.open(shards / "0.tar", "w") as tar:
            for identity in range(4):
                for name, content in sample_files(identity).items():
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    (shards / "index.json").write_bytes(edited(json.dumps(index).encode(), edits))
    read_or_refused(shards)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run, and the directory it has saved a checkpoint in."""
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    saver = Run(run_dir)
    saver.train(2)
    saver.save(2)
    return saver, run_dir


def loads_or_refused(saver: Run, checkpoint: Path) -> None:
    """The list of sums agrees with the files, as an attacker's would."""
    relist(checkpoint)
    before = names_below(checkpoint.parent)
    with refused_in_one_line():
        TrainState.read(saver.checkpoints.load(checkpoint, saver.pieces), checkpoint)
    assert names_below(checkpoint.parent) == before


@fuzzed
@given(st.sampled_from([".metadata", "__0_0.distcp", "train_state.json"]), EDITS.filter(bool))
def test_any_file_of_a_checkpoint_is_loaded_or_refused(
    saved: tuple[Run, Path], tmp_path: Path, name: str, edits: list[tuple[str, float, bytes]]
) -> None:
    saver, run_dir = saved
    checkpoint = tmp_path / "copy"
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(whole_checkpoints(run_dir)[0], checkpoint)
    (checkpoint / name).write_bytes(edited((checkpoint / name).read_bytes(), edits))
    loads_or_refused(saver, checkpoint)


@fuzzed
@given(st.data())
def test_any_state_of_a_checkpoint_is_loaded_or_refused(
    saved: tuple[Run, Path], tmp_path: Path, data: st.DataObject
) -> None:
    saver, run_dir = saved
    checkpoint = tmp_path / "copy"
    if not checkpoint.exists():
        shutil.copytree(whole_checkpoints(run_dir)[0], checkpoint)
    state = json.loads((whole_checkpoints(run_dir)[0] / "train_state.json").read_text())
    keys = st.sampled_from([*state, "sent_bytes", "classes", "run"])
    changes = data.draw(st.dictionaries(keys, JSON, min_size=1, max_size=3))
    (checkpoint / "train_state.json").write_text(json.dumps(state | changes))
    loads_or_refused(saver, checkpoint)


KEYS = [line.split("`")[1] for line in markdown().splitlines() if line.startswith("| `")]
YAML_LIKE = st.text(alphabet="-+.0123456789eaxnl{}[]:,&*!<'\"|> \n\u2028éTrue", max_size=30)
TAGGED = st.tuples(st.sampled_from(["int", "float", "bool", "timestamp", "binary", "omap", "set", "x"]), YAML_LIKE)
VALUES = st.one_of(
    YAML_LIKE,
    TAGGED.map(lambda pair: f"!!{pair[0]} {pair[1]}"),
    st.integers().map(str),
    st.floats().map(str),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5).map(
        json.dumps
    ),
)


def attempt(path: Path | None, overrides: list[str], copy: Path) -> None:
    """Loading gives a configuration that comes back from its own file, or one line."""
    message = "one line"
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        message = str(error)
    else:
        copy.write_text(dump(config), encoding="utf-8")
        assert load_config(copy) == config
    assert len(message.splitlines()) == 1


@settings(max_examples=max(200, EXAMPLES), deadline=None, print_blob=True)  # quick ones
@given(st.text(max_size=80) | YAML_LIKE, st.sampled_from(KEYS), VALUES)
def test_any_text_is_a_configuration_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, text: str, key: str, value: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path, copy = folder / "fuzz.yaml", folder / "copy.yaml"
    for content in (text, f"{key.partition('.')[0]}: {value}", f"? {value}\n: {text}"):
        path.write_bytes(content.encode("utf-8", errors="surrogatepass"))
        attempt(path, [], copy)
    for override in (text, f"{key}={value}", f"{key}.{text}={value}", f"model.arguments.x={value}"):
        attempt(None, [override], copy)
