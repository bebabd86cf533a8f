"""Whether NVIDIA's image has what the project takes from it: torch new enough, and apex with its kernels.

python3 check_cuda_image.py                 of the image as it comes
python3 check_cuda_image.py BROUGHT         and, after installing: nothing that it brought (a list of NAME==VERSION) was
                                            replaced, and DeepSpeed's optimizer is compiled

Runs while the image is built, where no GPU is seen: the kernels are loaded, not run.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from requirements import package, project

# optimizer.name: apex, and train.norm: apex
KERNELS = ("amp_C", "fused_layer_norm_cuda")


def release(text: str) -> tuple[int, ...]:
    """2.14.0a0+b2c75dd062.nv26.09 and 2.14.0 are both of release (2, 14): NVIDIA builds just before a release."""
    found = re.search(r"\d+\.\d+", text)
    assert found, text
    return tuple(int(part) for part in found[0].split("."))


def of_the_image() -> Iterator[str]:
    required = project()["dependencies"]
    assert isinstance(required, list)
    wanted = next(line for line in required if package(line) == "torch")
    if release(version("torch")) < release(wanted):
        yield f"torch {version('torch')}: {wanted} is needed; take a later image (--build-arg BASE=...)"
    importlib.import_module("torch")  # apex's kernels are linked against it
    for name in ("apex.optimizers", "apex.normalization", *KERNELS):
        try:
            importlib.import_module(name)
        except ImportError as error:
            yield f"apex: {name} does not load ({error})"


def of_the_installed(brought: list[str]) -> Iterator[str]:
    for line in brought:
        name, _, before = line.partition("==")
        try:
            after = version(name)
        except PackageNotFoundError:
            after = "removed"
        if after != before:
            yield f"{name} {before} of the image: {after} now"
    installed = importlib.import_module("deepspeed.git_version_info")
    if not installed.installed_ops.get("fused_adam") or installed.accelerator_name != "cuda":
        yield f"DeepSpeed's fused_adam is not compiled for CUDA (accelerator {installed.accelerator_name})"


def main() -> None:
    problems = list(of_the_image())
    if sys.argv[1:]:
        problems += of_the_installed(Path(sys.argv[1]).read_text().split())
    if problems:
        sys.exit("\n".join(problems))
    print(f"torch {version('torch')}, apex with {', '.join(KERNELS)}")


if __name__ == "__main__":
    main()
