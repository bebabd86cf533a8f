"""What is said where a package that a run asks for is missing, another one, or broken; and apex's LayerNorm."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lte_scale import apex
from lte_scale.adam import build_adam
from lte_scale.adapters import Layout, ReplicaNorm
from lte_scale.cli import main
from tests.test_optimizers import case

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def words(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    """A run of two steps."""
    fixed = [f"data.train={data / 'train'}", "data.val=", f"run_dir={run_dir}", "train.device=cpu", "train.duration=2"]
    return ["train", str(ROOT / "configs" / "demo.yaml"), *fixed, "metrics.port=0", "data.workers=0", *overrides]


def test_auto_compiles_nothing_and_says_what_it_is(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert main(words(digits, tmp_path / "run", "optimizer.name=auto", "train.norm=auto")) == 0
    events = (tmp_path / "run" / "events.log").read_text()
    assert "optimizer.name: auto is adamw" in events
    assert "train.norm: auto is torch" in events
    assert not list((tmp_path / "extensions").rglob("*.so"))


def package(folder: Path, *modules: str, init: str = "") -> None:
    """A package called apex in a folder of its own, with these modules in and next to it."""
    for module in ("apex", *modules):
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").write_text(init)


WEB_TOOLKIT = "raise ImportError(\"No module named 'pyramid_mailer'\")\n"  # what the other apex does on import
BUILD = "build github.com/NVIDIA/apex with --cpp_ext --cuda_ext"


@pytest.mark.parametrize(
    ("modules", "key", "said"),
    [
        (("apex/lib", "apex/ext"), "optimizer.name", ["is not the package at", "toolkit for Pyramid", BUILD]),
        (("apex/lib", "apex/ext"), "train.norm", ["is not the package at", "toolkit for Pyramid", BUILD]),
        (("apex/optimizers",), "optimizer.name", ["was built without amp_C", BUILD]),
        (("apex/optimizers",), "train.norm", ["was built without fused_layer_norm_cuda", BUILD]),
        (("apex/optimizers", "amp_C"), "optimizer.name", ["runs on CUDA alone, and this run is on cpu"]),
        (("apex/optimizers", "fused_layer_norm_cuda"), "train.norm", ["runs on CUDA alone, and this run is on cpu"]),
    ],
)
def test_another_apex_is_refused_in_one_line(
    tmp_path: Path,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    modules: tuple[str, ...],
    key: str,
    said: list[str],
) -> None:
    package(tmp_path / "site", *modules, init=WEB_TOOLKIT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for module in ("apex", "amp_C", "fused_layer_norm_cuda"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert main(words(digits, tmp_path / "run", f"{key}=apex")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    instead = "adamw" if key == "optimizer.name" else "torch"
    for part in (f"lte-scale: {key}: NVIDIA's apex", f"or use {key}={instead}", *said):
        assert part in line
    assert "apex" not in sys.modules


def test_an_apex_for_another_torch_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import fails on a symbol that this torch lacks."""
    package(tmp_path / "site", "apex/optimizers", "amp_C", init="raise ImportError('amp_C.so: undefined symbol: x\\n')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for module in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, module)
    groups = [{"params": [nn.Parameter(torch.zeros(3))], "weight_decay": 0.0}]
    with pytest.raises(ValueError, match=r"^optimizer.name: .*undefined symbol: x\); build it anew for torch .*$"):
        build_adam("apex", groups, betas=(0.9, 0.999), eps=1e-8, device=CPU)


def lte_scale(*arguments: str, flags: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-m", "lte_scale", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.parametrize(
    ("override", "otherwise"),
    [("optimizer.name=deepspeed", "; or use optimizer.name=adamw"), ("engine.name=deepspeed", ", or use engine=fsdp")],
)
def test_deepspeed_not_installed_is_one_line(tmp_path: Path, digits: Path, override: str, otherwise: str) -> None:
    """In an environment of all the packages of this one but DeepSpeed."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("deepspeed"):
            (site / entry.name).symlink_to(entry)
    run = words(digits, tmp_path / "run", override)
    done = lte_scale(*run, flags=("-S",), PYTHONPATH=str(site))
    assert done.returncode == 2, done.stderr
    key = override.partition("=")[0]
    assert done.stderr == (
        f"lte-scale: {key}: 'deepspeed' needs the package deepspeed; install it with pip install "
        f"'lte-scale[deepspeed]'{otherwise}\n"
    )


@pytest.mark.parametrize(("name", "device"), [case("deepspeed", "cpu")])
def test_deepspeed_that_does_not_compile_is_one_line(
    tmp_path: Path, digits: Path, name: str, device: torch.device
) -> None:
    run = words(digits, tmp_path / "run", f"optimizer.name={name}")
    done = lte_scale(*run, CXX="false", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert done.returncode == 2, done.stderr
    assert "compiling DeepSpeed's Adam in" in (tmp_path / "run" / "events.log").read_text()
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lte-scale: optimizer.name: DeepSpeed's Adam does not compile here (")
    assert last.endswith("it needs ninja, g++ and on CUDA nvcc; or use optimizer.name=adamw")


NORM = apex.lacking("fused_layer_norm_cuda", torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(bool(NORM), reason=f"NVIDIA's apex {NORM}")
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_apex_layer_norm_equals_torchs(heads: int, bias: bool) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    x, cotangent = torch.randn(2, 6, 5, 48, device=device).unbind()
    outcomes = []
    for name in ("torch", "apex"):
        norm = ReplicaNorm(Layout(heads), torch.ones(48), torch.zeros(48) if bias else None, eps=1e-6, rms=False)
        norm.to(device).layer_norm = apex.layer_norm(name, device, compiled=False)
        with torch.no_grad():
            for index, parameter in enumerate(norm.parameters()):
                parameter.add_(torch.linspace(0, 0.5 + index, parameter.numel(), device=device).view_as(parameter))
        into = x.clone().requires_grad_()
        y = norm(into)
        y.backward(cotangent)
        outcomes.append([y.detach(), into.grad, *(p.grad for p in norm.parameters())])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-5)


def test_norms_are_torchs_unless_asked() -> None:
    for name in ("torch", "auto"):
        assert apex.layer_norm(name, CPU, compiled=False) is F.layer_norm
