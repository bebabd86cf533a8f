"""docs/scaling.md says what the formulas say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import scaling  # noqa: E402


def test_the_page_is_what_the_script_writes() -> None:
    page = scaling.PAGE.read_text()
    assert scaling.rewritten(page) == page, "run `make docs`"


def test_bytes_of_a_node_do_not_grow_with_the_nodes_beyond_the_crossing() -> None:
    for model in scaling.models():
        weights = sum(layer.values for layer in model.shapes.layers.values())
        for precision, bytes_of_value in (("fp32", 4), ("int8", 1 + 2 / 64)):
            sent = [model.demands(gpus)[f"LTE {precision}"].exchange_bytes for gpus in scaling.GPUS]
            bound = 2 * bytes_of_value * weights + 2 * 4 * model.shapes.replica_values
            assert max(sent) < 1.01 * bound
            assert sent[-1] < 1.05 * sent[-3]  # 16 times the nodes


def test_a_page_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="crossing"):
        scaling.rewritten("<!-- table models -->\n<!-- end -->")


@pytest.mark.slow
@pytest.mark.parametrize("name", scaling.MODELS)
def test_the_figures_of_the_models_are_those_of_plan(name: str) -> None:
    assert json.loads(json.dumps(scaling.trace(name))) == json.loads(scaling.FIGURES.read_text())[name]
