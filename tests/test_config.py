"""Good configurations load, bad ones end with one line that helps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lte_scale.cli import main
from lte_scale.config import (
    Config,
    ConfigError,
    check_topology,
    check_training,
    differences,
    dump,
    load_config,
    to_dict,
)
from lte_scale.config.reference import markdown

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_load_and_come_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(config))
    assert load_config(copy) == config
    assert config.data.train


def test_overrides_win_and_numbers_read_as_people_write_them() -> None:
    config = load_config(
        ROOT / "configs" / "demo.yaml",
        ["merge.every=40", "optimizer.lr=1e-3", "engine=fsdp", "train.duration=12", "model.arguments.depth=2",
         "adapters.rank_by_layer={blocks.0.*: 4}", "adapters.rank_by_layer.blocks.1.*=8", "base={gather: pass}"],
    )  # fmt: skip
    assert config.merge.every == 40
    assert config.merge.local_every == 5
    assert config.optimizer.lr == 1e-3
    assert config.engine.name == "fsdp"
    assert config.train.duration == "12"
    assert config.model.arguments["depth"] == 2
    assert config.model.arguments["embed_dim"] == 64
    assert config.adapters.rank_by_layer == {"blocks.0.*": 4, "blocks.1.*": 8}
    assert config.base.gather == "pass"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("merge.every=1e3", ("merge", "every"), 1000),
        ("merge.every=1e20", ("merge", "every"), 10**20),
        ("merge.every='20'", ("merge", "every"), 20),
        ("optimizer.lr=1", ("optimizer", "lr"), 1.0),
        ("run_dir=010", ("run_dir",), "010"),
        ("run_dir=2026-11-23", ("run_dir",), "2026-11-23"),
        ("run_dir='1e3'", ("run_dir",), "1e3"),
        ("run_dir='no'", ("run_dir",), "no"),
        ("model.arguments.init_values=1e-5", ("model", "arguments", "init_values"), 1e-5),
        ("model.arguments={'1e3': '1e-5', b: [null, true, {c: '010'}]}", ("model", "arguments"),
         {"1e3": "1e-5", "b": [None, True, {"c": "010"}]}),
        ("augment.mean=[0, 1, 1e-1]", ("augment", "mean"), [0.0, 1.0, 0.1]),
        ("engine=none", ("engine", "name"), "none"),
        ("engine=", ("engine", "name"), "fsdp"),
    ],
)  # fmt: skip
def test_values_have_the_type_of_their_key_and_come_back(
    tmp_path: Path, override: str, key: tuple[str, ...], value: object
) -> None:
    config = load_config(None, [override])
    found: Any = to_dict(config)
    for word in key:
        found = found[word]
    assert found == value
    assert type(found) is type(value)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(config), encoding="utf-8")
    assert load_config(copy) == config


def test_files_take_the_shorthand_anchors_and_no_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", "elsewhere")
    path = tmp_path / "c.yaml"
    path.write_text(
        "engine: none\nrun_dir: $RUNS/${RUNS}/é\nevaluate: &both {every: 2ep}\ncheckpoint: {<<: *both, keep_last: 4}\n",
        encoding="utf-8",
    )
    config = load_config(path)
    assert config.engine.name == "none"
    assert config.run_dir == "$RUNS/${RUNS}/é"
    assert config.checkpoint.every == "2ep"
    assert config.checkpoint.keep_last == 4


def test_loading_needs_no_torch() -> None:
    code = "import sys, lte_scale.config; lte_scale.config.load_config(None); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_differences_name_keys_and_values() -> None:
    old = Config()
    new = load_config(None, ["merge.every=7", "seed=3"])
    assert differences(old, new) == ["seed: 0 -> 3", "merge.every: 50 -> 7"]


def test_the_reference_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), "run make docs"


# Overrides of the defaults, and what the one line of the error says.
BAD = [
    ("merge.evry=50", ["merge.evry", "50", "did you mean merge.every?", "local_every"]),
    ("merg.every=50", ["merg", "did you mean merge?"]),
    ("every=50", ["every", "did you mean merge.every?"]),
    ("lr=1", ["lr", "did you mean optimizer.lr?"]),
    ("merge.every", ["write key=value"]),
    ("=5", ["write key=value"]),
    ("merge.every=0", ["merge.every: is 0", "at least 1"]),
    ("merge.every=1.5", ["1.5", "whole number"]),
    ("merge.every=ten", ["'ten'", "whole number"]),
    ("merge.every=true", ["True", "whole number"]),
    ("merge.every=", ["empty"]),
    ("merge.every=[1]", ["[1]", "whole number"]),
    ("merge.every.x=1", ["merge.every is a value"]),
    ("merge=3", ["merge: is 3", "section"]),
    ("merge={every: 4, evry: 5}", ["merge.evry", "did you mean merge.every?"]),
    ("merge.local_every=7", ["7", "merge.every 50", "nearest: 5"]),
    ("merge.path=factors", ["'factors'", "auto, factor, dense", "did you mean factor?"]),
    ("merge.outer_lr=0.5", ["merge.outer=nesterov"]),
    ("merge.outer_momentum=1", ["at most 0.9999"]),
    ("merge.bucket_mb=0", ["above 0"]),
    ("base.scope=globl", ["'globl'", "did you mean global?"]),
    ("base.gather=node", ["base.gather=pass"]),
    ("base={scope: global}|merge.local_every=10", ["merge.local_every", "cannot differ"]),
    ("engine=fspd", ["engine.name", "did you mean fsdp?"]),
    ("engine=none|base.gather=window", ["base.gather", "window", "engine=fsdp"]),
    ("engine=[fsdp]", ["engine", "section"]),
    ("optimizer.lr=0", ["optimizer.lr: is 0", "above 0"]),
    ("optimizer.lr=-1e-3", ["above 0"]),
    ("optimizer.lr=nan", ["a number, above 0"]),
    ("optimizer.lr=.inf", ["a number, above 0"]),
    ("optimizer.lr=fast", ["'fast'", "a number"]),
    ("optimizer.beta2=1.0", ["optimizer.beta2", "at most 0.99999"]),
    ("optimizer.name=adam", ["did you mean adamw?"]),
    ("adapters.rank=0", ["adapters.rank", "at least 1"]),
    ("adapters.mode=resetles", ["did you mean resetless?"]),
    ("adapters.rank_by_layer={a: 0}", ["whole numbers of at least 1"]),
    ("adapters.rank_by_layer=[a]", ["a mapping"]),
    ("adapters.dense=head", ["adapters.dense", "a list"]),
    ("topology.heads_per_node=-1", ["at least 0"]),
    ("model.channels=2", ["1, 3"]),
    ("model.arguments={img_size: 8}", ["model.arguments.img_size", "model.image_size"]),
    ("model.drop_path=1", ["at most 0.9"]),
    ("schedule.name=cosin", ["did you mean cosine?"]),
    ("schedule.warmup=2 epochs", ["schedule.warmup", "`2ep`"]),
    ("schedule.decay=2ep", ["schedule.name=wsd"]),
    ("schedule.name=wsd", ["schedule.decay"]),
    ("train.duration=0", ["train.duration", "trains nothing"]),
    ("train.duration=2.5", ["train.duration", "write steps as"]),
    ("train.precision=fp16", ["train.precision", "bf16, fp32"]),
    ("train.compile=maybe", ["true or false"]),
    ("augment.mixup=0.2|train.batch_size=7", ["train.batch_size: 7", "use 8"]),
    ("augment.mean=[0.5]", ["1 values for 3 channels"]),
    ("augment.std=[1, 0, 1]", ["numbers above 0"]),
    ("data.train=pipe:cat x.tar", ["data.allow_pipe=true"]),
    ("data.max_bad_ratio=2", ["at most 1"]),
    ("run_dir=", ["run_dir", "empty"]),
    ("resume=atuo", ["did you mean auto?"]),
    ("metrics.port=70000", ["at most 65535"]),
    ("metrics.address=my host", ["metrics.address"]),
    ("augment.std=[.nan, 1, 1]", ["augment.std", "nan", "a list of numbers"]),
    ("model.arguments.init_values=.inf", ["model.arguments", "inf", "finite numbers"]),
    ("model.arguments={1: 2}", ["model.arguments", "{1: 2}", "a mapping from names"]),
    ("model.arguments=&a {x: *a}", ["model.arguments", "a mapping from names"]),
    ("adapters.mode=", ["adapters.mode: is empty", "reset, resetless"]),
    ("train.duration=9999999999999999ep", ["train.duration", "9999999999999999ep", "beyond 1e+12"]),
    (f"seed=-1{'0' * 999}", ["seed", "'-1000000", "too large"]),
    ("seed=!!int ''", ["seed", "'' is no valid int"]),
    ("seed=!!bool x", ["seed", "'x' is no valid bool"]),
    ("seed=!!timestamp x", ["seed", "'x' is no valid timestamp"]),
    ("merge.e\nvery=3", ["merge.e\\nvery=3", "write key=value"]),
    ("seed={", ["no valid YAML"]),
    ("seed={a: 1, a: 2}", ["given twice"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[overrides for overrides, _ in BAD])
def test_bad_overrides_say_what_would_be_right(overrides: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides.split("|"))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty", "not a mapping"]),
        ("- a\n", ["not a mapping"]),
        ("merge:\n  every: 5\n  every: 6\n", ["line 3", "given twice"]),
        ("merge: {every: 5\n", ["line 2", "no valid YAML"]),
        ("merge: !!python/object/apply:os.system [ls]\n", ["no valid YAML"]),
        ("merge:\n  evry: 5\n", ["merge.evry", "did you mean merge.every?"]),
        ("? {a: 1}\n: 2\n", ["line 1", "plain word"]),
        ('"a\\nb": 2\n', ["line 1", "plain word"]),
        ("seed: 1\nmerge: {every: !!int ''}\n", ["line 2", "'' is no valid int"]),
        ("engine: [fsdp]\n", ["engine", "['fsdp']", "section"]),
        ("seed: 1\n---\nseed: 2\n", ["line 2", "another document"]),
    ],
)
def test_bad_files_say_where(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for word in ["bad.yaml", *words]:
        assert word in str(caught.value)


def test_a_missing_file_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"demos\.yaml: cannot be read .*did you mean .*demo\.yaml\?"):
        load_config(ROOT / "configs" / "demos.yaml")


@pytest.mark.parametrize(
    ("overrides", "nodes", "ranks", "words"),
    [
        (["topology.heads_per_node=3"], 2, 4, ["3 heads", "1, 2, 4 or a multiple of 4"]),
        (["engine=none"], 1, 2, ["engine.name", "1 x 2", "engine=fsdp"]),
        (["topology.nodes_per_region=3", "merge.region_every=10"], 4, 2, ["topology.nodes_per_region", "3", "4 nodes"]),
        (["topology.heads_per_node=1", "train.batch_size=6"], 1, 4, ["6 images", "4 ranks", "use 8"]),
        (["topology.heads_per_node=1", "train.batch_size=4", "augment.cutmix=1"], 1, 4, ["mixup", "use 8"]),
    ],
)
def test_what_does_not_fit_the_ranks_is_refused(overrides: list[str], nodes: int, ranks: int, words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as caught:
        check_topology(load_config(None, overrides), nodes, ranks)
    for word in words:
        assert word in str(caught.value)


def test_training_needs_data() -> None:
    config = load_config(ROOT / "configs" / "demo.yaml")
    check_training(config)
    with pytest.raises(ConfigError, match=r"data\.train: is empty"):
        check_training(replace(config, data=replace(config.data, train="")))


def test_the_command_line_prints_one_line_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(ROOT / "configs" / "demo.yaml"), "merge.evry=50"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "did you mean merge.every?" in errors
    assert main(["train", str(ROOT / "configs" / "demo.yaml"), "--print-config", "merge.every=60"]) == 0
    assert "every: 60" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), ["Is a directory"]),
        (lambda path: path.write_bytes(b"seed: \xff"), ["not UTF-8 text"]),
    ],
)
def test_what_is_no_text_file_is_refused(tmp_path: Path, make: Callable[[Path], object], words: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    make(path)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for word in ["bad.yaml: cannot be read", *words]:
        assert word in str(caught.value)
