"""Good configurations load, bad ones end with one line that helps."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lte_scale.cli import main
from lte_scale.config import Config, ConfigError, check_topology, check_training, differences, dump, load_config
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
    ("seed={", ["no valid YAML"]),
    ("seed={a: 1, a: 2}", ["given twice"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[overrides for overrides, _ in BAD])
def test_bad_overrides_say_what_would_be_right(overrides: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides.split("|"))
    message = str(caught.value)
    assert "\n" not in message
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


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_a_configuration_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    for attempt in (
        lambda: load_config(path),
        lambda: load_config(None, [text]),
        lambda: load_config(None, [f"seed={text}"]),
    ):
        with contextlib.suppress(ConfigError):
            assert isinstance(attempt(), Config)
