# The commands for daily work. They install only into .venv, node_modules and the user's cache folder.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PYTHON := $(VENV)/bin/python
WEB := services/gateway/web
STATIC := services/gateway/static
# tests/install-servers puts programs for tests and lint into the cache.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH):$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/nanochat-tests/bin
# Some environments forbid Python to store compiled modules. Each process would then compile all of torch's Python again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run test test-unit test-model test-web test-cluster test-cluster-full test-numerics test-clients test-browsers chaos bench gpu lint lint-types lint-rules servers format docs manifests protos lock images release clean setup

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

run: setup $(STATIC)/index.html ## Serve the chat page (PORT=8000 to choose), and train the demo model if there is none
	@exec $(PYTHON) -m deploy.local

# Several processes run the tests, each a file at a time, in the order that tests/conftest.py sets. Many tests wait for
# servers, browsers or time limits, so there are twice as many processes as cores. There are at most four, because each
# takes up to 3 GB of memory.
TEST_PROCESSES := $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 2 ? 2 : 4)))
SIDE_BY_SIDE := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
test: setup $(STATIC)/index.html ## Lint, type checks and the tests that need neither Docker nor Kubernetes, except make test-model
	@$(MAKE) --no-print-directory --jobs=2 SERVERS=servers lint-types lint-rules test-web
	@$(PYTHON) -m pytest -m "not cluster and not browsers and not recipe" $(SIDE_BY_SIDE) --cov --cov-report=
	@echo "The test processes themselves run $$(coverage report --format=total) % of the lines; coverage html shows which"

test-unit: setup ## The unit tests that start no server and train nothing: run them often while you edit
	@$(PYTHON) -m pytest tests/unit -m "not slow" $(SIDE_BY_SIDE)

test-model: setup $(STATIC)/index.html ## Train the demo model with all steps of its recipe, and check what it can do and learn
	@$(PYTHON) -m pytest -m recipe tests/e2e

# The Kubernetes tests train the model and leave it in TEST_STORE; the Compose tests serve it from there. If only a certain
# command reaches the cluster, set NANOCHAT_CLUSTER_EXEC to it: this command then runs the Kubernetes tests.
TEST_STORE := $(CURDIR)/build/test-store
test-cluster: setup ## Tests of images, compose, chart and jobs; needs make images and a cluster that kubectl points at
	@rm -rf $(TEST_STORE) && mkdir -p $(TEST_STORE)
	@NANOCHAT_TEST_STORE=$(TEST_STORE) $(NANOCHAT_CLUSTER_EXEC) $(PYTHON) -m pytest -m cluster tests/cluster/test_kubernetes.py tests/cluster/test_jobs_on_s3.py tests/cluster/test_policies.py \
	  tests/cluster/test_sandbox.py
	@NANOCHAT_TEST_STORE=$(TEST_STORE) $(PYTHON) -m pytest -m cluster tests/cluster/test_compose.py

test-cluster-full: setup ## The slow tests on a cluster: install, upgrade, canary, deleted pods, lessons, alerts
	@NANOCHAT_TEST_FULL=1 $(NANOCHAT_CLUSTER_EXEC) $(PYTHON) -m pytest -m cluster tests/cluster/test_bootstrap.py tests/cluster/test_stages.py tests/cluster/test_kubernetes.py \
	  tests/cluster/test_monitoring.py tests/cluster/test_redis.py tests/cluster/test_gpu_pool.py tests/cluster/test_kueue.py \
	  tests/cluster/test_lessons_in_cluster.py
	@NANOCHAT_TEST_FULL=1 $(PYTHON) -m pytest -m cluster tests/cluster/test_compose_training.py

test-numerics: setup $(STATIC)/index.html ## Run the tests that train, with other seeds and the rounding of other CPUs
	@$(PYTHON) -m tests.support.numerics

test-clients: setup ## Install client libraries of other projects outside .venv, and try them with the gateway
	@tests/install-clients
	@$(PYTHON) -m pytest tests/integration/test_clients.py -rs

test-browsers: setup $(STATIC)/index.html ## Install Firefox and WebKit, and try the chat page in them
	@tests/install-browsers
	@$(PYTHON) -m pytest tests/e2e/test_other_browsers.py -rfEs

# MINUTES and SEED may be set: make chaos MINUTES=1 SEED=7
MINUTES := 10
SEED := 1
chaos: setup ## Kill, stop and start all services under load, and count what clients see
	@$(PYTHON) -m tests.benchmarks.chaos --minutes $(MINUTES) --seed $(SEED)

# BENCH may hold flags: make bench BENCH="--peer PATH --only engine"
bench: setup ## Repeat all measurements of speed in the documentation, beside other projects; writes build/speed/speed.md
	@$(PYTHON) -m tests.benchmarks.speed $(BENCH)

# GPU may hold flags: make gpu GPU="--device cpu --output build/gpu". Without a .venv, the machine's Python runs it.
gpu: ## Check this machine's GPU and measure its speed; writes docs/gpu/<card>.md
	@$(if $(wildcard $(PYTHON)),$(PYTHON),python3) -m jobs.eval.gpu $(GPU)

lint: setup ## Style, types, import rules between packages, unused dependencies, workflows
	@$(MAKE) --no-print-directory --jobs=2 lint-types lint-rules

# The types take longest, so they are checked on a core of their own.
lint-types: setup
	@mypy

# actionlint is one of the programs that make test installs.
lint-rules: setup $(SERVERS)
	@ruff check . && ruff format --check .
	@lint-imports --no-logo && deptry .
	@if command -v actionlint >/dev/null; then actionlint; else echo "actionlint is not installed: the workflows are not checked"; fi

servers:
	@tests/install-servers

test-web: $(STATIC)/index.html
	@npm --prefix $(WEB) run --silent check && npm --prefix $(WEB) test --silent

format: setup ## Rewrite the code in the project's format
	@ruff check --fix . ; ruff format .

docs: setup ## Write docs/flags.md and docs/roofline.md again, from the programs' settings and from formulas
	@$(PYTHON) -m tests.support.flag_reference
	@$(PYTHON) -m tests.support.roofline_page

manifests: ## Build jobs/*/*.yaml again from deploy/kustomize; needs kustomize or kubectl
	@deploy/manifests

protos: setup ## Regenerate the gRPC stubs
	@$(PYTHON) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. nanochat_core/protos/*.proto

# The lock names no package index, so it also works with a mirror.
lock: setup ## Pin the dependencies again after a change to pyproject.toml (UPGRADE=--upgrade takes newer versions)
	@uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header $(UPGRADE) \
	  pyproject.toml $(addprefix --extra ,gateway engine sandbox tracing chat jobs) $(addprefix --group ,dev installer node sandbox-science) -o requirements.lock

images: ## Build nanochat-{gateway,engine,sandbox,jobs}:dev (BUILD_NETWORK=host where builds have no network)
	@REVISION=$$(git rev-parse HEAD 2>/dev/null) docker compose --profile train build gateway engine sandbox train

release: ## Show what a release of this version would do; YES=1 tags it and lets the workflow publish it
	@deploy/release

setup: $(VENV)/.installed

# uv comes from the package index, and so does Node if the machine has none.
$(VENV)/.installed: requirements.lock pyproject.toml
	@deploy/setup $(VENV)
	@touch $@

$(STATIC)/index.html: $(shell find $(WEB) -type f -not -path '*/node_modules/*' 2>/dev/null)
	@echo "Building the web page"
	@npm --prefix $(WEB) ci --silent --no-audit --no-fund && npm --prefix $(WEB) run --silent build

clean: ## Remove what was installed and built, not the trained models
	rm -rf $(VENV) $(STATIC) $(WEB)/node_modules
