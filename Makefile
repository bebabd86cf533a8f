# Every target sets itself up: a fresh machine needs Python 3.11, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help venv demo test test-pairs test-slow test-deepspeed test-faults test-slurm test-docker test-observability bench-engines bench-metrics bench-merge bench-quality bench-speed bench-loader soak lint format docs dashboards clean

help:
	@echo "make demo       train LTE on real images on this machine, to a picture"
	@echo "make test       run the tests"
	@echo "make test-pairs  tests on process groups with any two of their options together, not each once"
	@echo "make test-slow  emulated networks with throttled links (root), long runs"
	@echo "make test-deepspeed  DeepSpeed's launcher over ssh between emulated nodes, its compiled optimizers (root)"
	@echo "make test-faults  runs killed at random moments (KILLS=3 of each shape, SEED=0), cut networks, slow nodes, fuzzing"
	@echo "make test-slurm  the job scripts on a real Slurm of emulated nodes (root)"
	@echo "make test-docker  docker/Dockerfile.cpu followed in a clean Debian, and a training in it (root, no engine)"
	@echo "make test-observability  a real Prometheus on an emulated run, the report in a browser (root, apt)"
	@echo "make bench-merge     LTE against DDP, FSDP and DiLoCo on emulated nodes with slow links (root; hours)"
	@echo "make bench-speed     a step of LTE against one of full-rank training on this CPU (on a GPU: benchmarks/step.py)"
	@echo "make bench-loader    the loader against decoding and augmenting alone"
	@echo "make bench-quality   accuracy at equal samples: LTE, full-rank, DiLoCo, ReLoRA, LoRA (hours; goes on where it was)"
	@echo "make bench-metrics   what metrics cost a step"
	@echo "make bench-engines   step time, memory and merge time of the engines, side by side"
	@echo "make soak       an hour of training (MINUTES=60): do memory, open files or threads grow?"
	@echo "make lint       ruff, mypy, shellcheck"
	@echo "make docs       write the generated reference pages anew"
	@echo "make dashboards  write Grafana's dashboard anew"

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/python launchers/demo.py

test: venv
	$(BIN)/python -m pytest -m "not slow and not deepspeed and not slurm and not observability and not faults"

test-pairs: venv
	LTE_CASES=pairs $(BIN)/python -m pytest tests/dist -m "not deepspeed" --timeout 600

test-slow: venv
	$(BIN)/python -m pytest -m "slow and not deepspeed and not slurm and not faults" --timeout 900

test-deepspeed: venv
	(for tool in pdsh sshd ssh ip pkill; do command -v $$tool >/dev/null || exit 1; done) || \
	    { apt-get -qq update && apt-get -qq install -y openssh-server openssh-client pdsh iproute2 procps; } </dev/null
	$(BIN)/python -m pytest -m deepspeed --timeout 600

test-faults: venv
	$(BIN)/python -m pytest -m faults --timeout 3600 -s
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-1000} $(BIN)/python -m pytest tests/test_fuzz.py --timeout 3600 \
	    --hypothesis-seed=$${SEED:-0} --hypothesis-show-statistics

test-slurm: venv
	(export PATH=$$PATH:/usr/sbin; for tool in munged slurmctld slurmd sbatch ip tc; do command -v $$tool >/dev/null || exit 1; done) || \
	    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
	        slurm-wlm slurmctld slurmd slurm-client munge iproute2; } </dev/null
	$(BIN)/python -m pytest -m slurm --timeout 900

test-docker: venv
	(for tool in mmdebstrap unshare nsenter ip promtool; do command -v $$tool >/dev/null || exit 1; done) || \
	    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
	        mmdebstrap util-linux iproute2 prometheus; } </dev/null
	$(BIN)/python -m pytest tests/test_docker.py
	$(BIN)/python docker/check_cpu_image.py

test-observability: venv
	(for tool in prometheus promtool chromium; do command -v $$tool >/dev/null || exit 1; done) || \
	    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
	        prometheus chromium; } </dev/null
	REQUIRE_CHROMIUM=1 $(BIN)/python -m pytest -m observability --timeout 600
	$(BIN)/python -m pytest tests/test_dashboards.py

bench-engines: venv
	$(BIN)/python benchmarks/engines.py

bench-metrics: venv
	$(BIN)/python benchmarks/metrics.py

bench-speed: venv
	$(BIN)/python benchmarks/step.py

bench-loader: venv
	$(BIN)/python benchmarks/loader.py

bench-merge: venv
	(for tool in ip tc; do command -v $$tool >/dev/null || exit 1; done) || \
	    { apt-get -qq update && apt-get -qq install -y iproute2; } </dev/null
	$(BIN)/python benchmarks/merge.py

bench-quality: venv
	test -d /usr/share/datasets/fashion-mnist || { apt-get -qq update && apt-get -qq install -y dataset-fashion-mnist; } </dev/null
	$(BIN)/python benchmarks/quality.py

MINUTES ?= 60
soak: venv
	$(BIN)/python benchmarks/soak.py --minutes $(MINUTES)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x launchers/*.sh slurm/*.sh docker/*.sh .ci/run

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dashboards: venv
	$(BIN)/python docker/grafana/build.py

docs: venv
	$(BIN)/python -m lte_scale.config.reference > docs/configuration.md
	$(BIN)/python -m lte_scale.metrics.catalogue > docs/metrics.md
	$(BIN)/python benchmarks/scaling.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
