"""The direction of the code: a module imports only from earlier layers, and those of the fifth not one another."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lte_scale"

LAYERS: dict[int, set[str]] = {
    0: {"cadence", "config", "schedules", "scaling_rule", "log", "quantities"},
    1: {"topology", "timing", "precision", "collectives", "bandwidth", "apex"},
    2: {"adapters", "codec", "low_rank", "initial", "live", "model", "cost"},
    3: {
        "archive",
        "augment",
        "batches",
        "damage",
        "data",
        "evaluation_data",
        "index",
        "loader",
        "order",
        "reading",
        "shards",
        "sources",
    },
    4: {"engines", "adam", "averaging", "checksums", "moments", "optim", "storage"},
    5: {"merge", "evaluate", "checkpoint", "metrics", "report", "preemption", "health", "watchdog", "profiling"},
    6: {
        "assemble",
        "trainer",
        "recorder",
        "top",
        "state",
        "launch",
        "plan",
        "preflight",
        "estimate",
        "link",
        "fit",
        "suggest",
        "tune",
        "export",
        "cli",
        "__main__",
        "__init__",
    },
}
# Parts of a module of the fifth layer, which it alone and later layers may import.
PARTS = {
    "merge": {"apart", "contents", "divergence"},  # of a checkpoint: the masters
    "divergence": {"contents"},
    "contents": {"checkpoint", "run_dir"},
    "agreement": {"apart", "merge", "launch"},
    "apart": set[str](),
    "arrangement": {"apart", "merge", "copies", "products", "dense", "traffic", "memory", "baselines"},
    "copies": {"merge"},
    "dense": {"apart", "merge", "products"},
    "exchange": {"apart", "merge", "products", "health"},
    "feedback": {"dense", "replicas"},
    "flight": {"merge"},
    "outer": {"merge", "replicas"},
    "products": {"merge"},
    "quorum": {"apart"},
    "run_dir": {"checkpoint"},
    "replicas": {"merge"},
    "traffic": {"memory", "baselines"},
    "memory": {"baselines"},
    "baselines": set[str](),
    "flat": {"contents"},
}  # fmt: skip
CHECKED_FIRST = {"topology"}  # config checks what a topology allows with the topology's own arithmetic


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(module: str) -> int:
    if module in PARTS:
        return 5
    found = [layer for layer, modules in LAYERS.items() if module in modules]
    assert found, f"lte_scale.{module} has no layer: give it one in tests/test_layers.py"
    return found[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: a relative import hides its layer; write lte_scale.NAME"
            names = [node.module] if node.module != "lte_scale" else [f"lte_scale.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("lte_scale.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_to_earlier_layers(path: Path) -> None:
    module = module_of(path)
    layer = layer_of(module)
    for imported in imports(path) - {module}:
        other = layer_of(imported)
        if module == "config" and imported in CHECKED_FIRST:
            continue
        if layer == other == 5:
            assert module in PARTS.get(imported, set()), f"{module} and {imported} are both of layer 5"
        else:
            assert other <= layer, f"{module} (layer {layer}) imports {imported} (layer {other})"


def test_only_its_engine_and_its_adam_import_deepspeed() -> None:
    """Where a run has neither, DeepSpeed need not be installed; so `adam` imports it inside functions."""
    allowed = {PACKAGE / "engines" / "deepspeed.py", PACKAGE / "adam.py"}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "deepspeed" for name in names):
                assert path in allowed and node not in tree.body, path


def test_the_first_layer_needs_no_torch() -> None:
    modules = ", ".join(f"lte_scale.{name}" for name in sorted(LAYERS[0]))
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert 'torch' not in sys.modules"], check=True)
