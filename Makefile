# Start with `make demo` or `make test-quick`. Requires Python 3.10 to 3.13, make and a C compiler.
#
# TORCH_INDEX: package index for torch. On Linux, torch from PyPI includes several gigabytes of CUDA libraries. On a
# machine without a GPU:
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# If TORCH_INDEX is empty, pip uses its configured index.

PYTHON ?= python3
VENV ?= .venv
VENV_NEWEST ?= .venv-newest
VENV_ROBOFLOW ?= .venv-roboflow
VENV_INTEGRATIONS ?= .venv-integrations
TORCH_INDEX ?=

PYTEST_WORKERS ?= auto
PYTEST_ARGS ?=
TRAIN_ARGS ?= runs/tiny

# `make bench` runs the benchmarks that need no GPU, download or argument. parity.py needs a checkout of the published
# implementation (see its --help), ray_labeling.py the environment of `make venv-integrations`, and workflows.py that of
# `make bench-roboflow`.
BENCHMARKS ?= $(filter-out benchmarks/parity.py benchmarks/ray_labeling.py benchmarks/workflows.py benchmarks/_%, \
  $(wildcard benchmarks/*.py))

PY := $(VENV)/bin/python
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
NEWEST := $(VENV_NEWEST)/.installed
ROBOFLOW := $(VENV_ROBOFLOW)/.installed
INTEGRATIONS := $(VENV_INTEGRATIONS)/.installed
NPM := tests/npm/node_modules/.package-lock.json

# One torch thread per pytest worker, because more would compete for the cores. All tests of a file run in one worker.
PYTEST = OMP_NUM_THREADS=1 $(1) -m pytest -n $(PYTEST_WORKERS) --maxprocesses 8 --dist loadfile

comma := ,

.PHONY: help venv venv-roboflow venv-integrations demo test-quick test test-package test-newest test-roboflow \
  test-integrations lint docs format bench bench-roboflow release-check soak resolve constraints train-tiny clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH_INDEX=$(TORCH_INDEX)"
	@echo "On Linux without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids the CUDA libraries."

# --- Environments ---------------------------------------------------------------------------------------------------

# $(call create,FOLDER): create a virtual environment with pip, or print the missing requirement.
define create
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Python 3.10 to 3.13 is required; PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)"; \
	  echo "Choose another interpreter: make PYTHON=python3.12 ..."; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$$($(PYTHON) --version 2>&1) has no module ensurepip, which virtual environments require."; \
	  echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; } >&2
	$(PYTHON) -m venv $(1)
endef

# $(call install,PYTHON,CONSTRAINTS,REQUIREMENTS): install torch from TORCH_INDEX if that is set, then everything else
# from pip's configured index. --no-deps, because an index of torch builds may lack the pinned dependencies.
define install
	@$(1) -m pip --version >/dev/null 2>&1 || $(1) -m ensurepip
	$(if $(TORCH_INDEX),$(1) -m pip install --no-deps --index-url $(TORCH_INDEX) -c $(2) torch)
	$(1) -m pip install -c $(2) $(3)
endef

$(VENV)/bin/python:
	$(call create,$(VENV))

$(BASE): pyproject.toml constraints/default.txt | $(VENV)/bin/python
	$(call install,$(PY),constraints/default.txt,-e .)
	@touch $@

# Without the extra "workflows": its engine requires openai below 2, and the tests use the current client.
# Moondream's client is installed without its requirements, which include an inference engine that HTTP does not need.
$(DEV): $(BASE)
	$(call install,$(PY),constraints/default.txt,-e ".[roboflow$(comma)server$(comma)finetune$(comma)clients$(comma)dev$(comma)docs$(comma)notebooks]")
	$(PY) -m pip install --no-deps moondream==2.6.1
	@touch $@

# JavaScript clients, if npm is installed. Without them, their tests are skipped.
$(NPM): tests/npm/package.json tests/npm/package-lock.json
	@if command -v npm >/dev/null; then cd tests/npm && npm ci --no-audit --no-fund --loglevel=error && touch -c ../../$@; \
	  else echo "npm is not installed: the tests of the JavaScript clients will be skipped."; fi

$(VENV_NEWEST)/bin/python:
	$(call create,$(VENV_NEWEST))

$(NEWEST): pyproject.toml constraints/newest.txt | $(VENV_NEWEST)/bin/python
	$(call install,$(VENV_NEWEST)/bin/python,constraints/newest.txt,-e ".[server$(comma)finetune$(comma)dev$(comma)examples]")
	$(VENV_NEWEST)/bin/python -m pip install --no-deps moondream==2.6.1
	@touch $@

$(VENV_ROBOFLOW)/bin/python:
	$(call create,$(VENV_ROBOFLOW))

# tests/roboflow/test_older_engine.py uses an inference-core from before the engine became a separate distribution.
$(ROBOFLOW): pyproject.toml constraints/roboflow.in constraints/roboflow.txt constraints/roboflow_newer.txt \
  | $(VENV_ROBOFLOW)/bin/python
	$(call install,$(VENV_ROBOFLOW)/bin/python,constraints/roboflow.txt,-e ".[all$(comma)dev]" \
	  -r constraints/roboflow.in)
	$(VENV_ROBOFLOW)/bin/python -m pip install --no-deps -r constraints/roboflow_newer.txt
	$(VENV_ROBOFLOW)/bin/python -m pip install --no-deps --upgrade --target $(VENV_ROBOFLOW)/older-engine inference-core==1.5.2
	@touch $@

$(VENV_INTEGRATIONS)/bin/python:
	$(call create,$(VENV_INTEGRATIONS))

$(INTEGRATIONS): pyproject.toml constraints/integrations.in constraints/integrations.txt | $(VENV_INTEGRATIONS)/bin/python
	$(call install,$(VENV_INTEGRATIONS)/bin/python,constraints/integrations.txt,-e ".[labeling$(comma)server]" \
	  -r constraints/integrations.in)
	@$(VENV_INTEGRATIONS)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "X-AnyLabeling requires Python 3.11: the test of its client will be skipped."; exit 0; } && \
	  $(VENV_INTEGRATIONS)/bin/python -m pip install --no-deps x-anylabeling-cvhub==4.2.1
	@touch $@

venv: $(DEV) ## Create the virtual environment for development

venv-roboflow: $(ROBOFLOW) ## Create an environment with Roboflow's workflows engine and inference server (3 GB)

venv-integrations: $(INTEGRATIONS) ## Create an environment with labeling tools and Ray (3 GB)

# --- Use ------------------------------------------------------------------------------------------------------------

demo: $(BASE) ## Run the tiny model on rendered scenes; writes images and videos to demo/
	$(VENV)/bin/moondream-cv demo

test-quick: $(DEV) ## Run the tests that start no server, browser or other process (2 minutes)
	$(call PYTEST,$(PY)) -m "not system and not slow and not download and not gpu and not roboflow and not integrations \
	  and not soak" --cpu-limit 10 --durations 5 $(PYTEST_ARGS)

test: test-package test-roboflow test-integrations ## Run all tests

test-package: $(DEV) $(NPM) ## Run the tests that need neither Roboflow's engine and server nor labeling tools and Ray
	$(call PYTEST,$(PY)) $(PYTEST_ARGS)

# Without the HTTP tests: they use neither supervision nor transformers, and need clients that are not installed here.
test-newest: $(NEWEST) ## Run the tests marked "compat" with the newest supervision and transformers
	@$(VENV_NEWEST)/bin/python -c 'from importlib.metadata import version as v; \
	  print(*(f"{n} {v(n)}" for n in ("supervision", "transformers", "torch", "numpy", "opencv-python")), sep=", ")'
	$(call PYTEST,$(VENV_NEWEST)/bin/python) -m "compat and not download and not soak" \
	  --ignore=tests/server --ignore=tests/backends --ignore=tests/roboflow $(PYTEST_ARGS)

# Only tests/roboflow: other tests fail to import in this environment because of torchvision
# (see tests/helpers/roboflow_app.py). --disable-warnings, because the server emits thousands of warnings.
test-roboflow: $(ROBOFLOW) ## Run the tests marked "roboflow" with Roboflow's workflows engine and server
	$(call PYTEST,$(VENV_ROBOFLOW)/bin/python) -m "roboflow and not download and not soak" --disable-warnings \
	  $(PYTEST_ARGS) tests/roboflow

# Only the tests that import nothing that is missing in this environment.
test-integrations: $(INTEGRATIONS) ## Run the tests marked "integrations" with labeling tools and Ray
	$(call PYTEST,$(VENV_INTEGRATIONS)/bin/python) -m "integrations and not download and not soak" --disable-warnings \
	  $(PYTEST_ARGS) tests/integrations tests/labeling tests/server/test_ray_serve.py

lint: $(DEV) ## Check style, formatting, types, prose and the documentation site
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) scripts/check_prose.py
	if [ -x $(VENV)/bin/hadolint ]; then $(VENV)/bin/hadolint docker/Dockerfile; fi
	$(MAKE) --no-print-directory docs

# The variable turns off an announcement of the theme's successor.
docs: $(DEV) ## Build the documentation site in build/site, and check its links
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	$(PY) scripts/check_links.py

format: $(DEV) ## Format the code and apply ruff's fixes
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

bench: $(DEV) ## Run the benchmarks that only need a CPU
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(PY) "$$script"; done

bench-roboflow: $(ROBOFLOW) ## Run the benchmark of the workflow blocks
	$(VENV_ROBOFLOW)/bin/python -W ignore benchmarks/workflows.py

release-check: ## Build the distributions, install the wheel in new environments, and run the demo there
	$(PYTHON) scripts/release_check.py

soak: $(DEV) ## Run the tests marked "soak" (minutes to hours)
	$(PY) -m pytest -m soak $(PYTEST_ARGS)

train-tiny: $(BASE) ## Train the tiny model, or resume its training (hours on 2 cores; arguments: TRAIN_ARGS="...")
	$(PY) -m moondream_cv.training.tiny $(TRAIN_ARGS)

# --- Versions -------------------------------------------------------------------------------------------------------

UV = $(PY) -m uv --quiet pip compile --no-header --no-annotate
EXTRAS = --extra roboflow --extra server --extra finetune --extra dev --extra docs --extra notebooks
WITH_CLIENTS = $(EXTRAS) --extra clients

# A dry run for each Python version and platform. uv resolves for interpreters that are not installed, and reads only
# metadata, so torch's CUDA libraries are never downloaded. --only-binary proves that nothing has to be compiled. The
# wheels of PyAV require macOS 14, and those of llguidance glibc 2.31.
RESOLVE_PYTHONS ?= 3.10 3.11 3.12 3.13
RESOLVE_PLATFORMS ?= x86_64-manylinux_2_31 aarch64-apple-darwin x86_64-pc-windows-msvc
CUDA_ONLY := ^(cuda-|nvidia-|triton)

resolve: $(DEV) ## Check that the constraints resolve on Python 3.10 to 3.13 (dry run)
	@set -e; for python in $(RESOLVE_PYTHONS); do for platform in $(RESOLVE_PLATFORMS); do \
	  found=$$(MACOSX_DEPLOYMENT_TARGET=14.0 $(UV) $(WITH_CLIENTS) --only-binary :all: --python-version $$python \
	    --python-platform $$platform -c constraints/default.txt pyproject.toml); \
	  loose=$$(echo "$$found" | grep -vE '$(CUDA_ONLY)' | while read -r pin; do \
	    grep -q "^$$pin\( \|$$\)" constraints/default.txt || echo "$$pin"; done); \
	  test -z "$$loose" || { echo "Not pinned in constraints/default.txt on Python $$python, $$platform: $$loose"; exit 1; }; \
	  echo "Python $$python $$platform: $$(echo "$$found" | grep -cvE '$(CUDA_ONLY)') packages," \
	    $$(echo "$$found" | grep -E '^(torch|transformers|supervision|numpy)=='); \
	done; done

CONSTRAINTS_HEADER = \# Exact versions for Python 3.10 to 3.13. Written by \`make constraints\`
WITHOUT_CUDA = grep -vE '$(CUDA_ONLY)'

# default.txt takes two passes: the first resolves the package with constraints/default.in, the second removes Roboflow's
# engine, which requires openai below 2, and adds the clients of the tests. Roboflow's server pins its engine itself.
# CUDA libraries are removed, so that a CPU build of torch has no conflict with their pins. integrations.txt has the
# versions of default.txt, except that FiftyOne requires an older graphql-core and roboflow an older typer, and that Ray
# requires pydantic 2.13 from Python 3.14 on.
constraints: $(DEV) ## Update the pinned versions in constraints/
	@mkdir -p build
	$(UV) $(EXTRAS) --universal --python-version 3.10 pyproject.toml constraints/default.in -o build/with-engine.txt >/dev/null
	sed -i.old /^openai==/d build/with-engine.txt
	$(UV) $(WITH_CLIENTS) --universal --python-version 3.10 pyproject.toml -c build/with-engine.txt \
	  -o build/pinned.txt >/dev/null
	{ echo "$(CONSTRAINTS_HEADER) from pyproject.toml and constraints/default.in."; \
	  $(WITHOUT_CUDA) build/pinned.txt; } > constraints/default.txt
	echo "supervision>=0.31" > build/newest.in
	grep '^torch==' constraints/default.in >> build/newest.in
	$(UV) --extra server --extra finetune --extra dev --extra examples --universal --python-version 3.10 pyproject.toml \
	  -c build/newest.in -o build/newest.txt >/dev/null
	{ echo "$(CONSTRAINTS_HEADER): the newest of everything but torch."; \
	  $(WITHOUT_CUDA) build/newest.txt; } > constraints/newest.txt
	sed -E '/^(roboflow-workflows|streamvision)==/d' constraints/default.in > build/with-server.in
	$(UV) --extra all --extra dev --universal --python-version 3.10 \
	  pyproject.toml build/with-server.in constraints/roboflow.in -o build/roboflow.txt >/dev/null
	{ echo "$(CONSTRAINTS_HEADER) from pyproject.toml, constraints/default.in and constraints/roboflow.in."; \
	  $(WITHOUT_CUDA) build/roboflow.txt; } > constraints/roboflow.txt
	sed -E "/^(graphql-core|typer)==/d; s/^pydantic(-core)?==[^ ]+$$/& ; python_version < '3.14'/" constraints/default.txt \
	  > build/for-integrations.txt
	$(UV) --extra labeling --extra server --universal --python-version 3.10 pyproject.toml constraints/integrations.in \
	  -c build/for-integrations.txt -o build/integrations.txt >/dev/null
	{ echo "$(CONSTRAINTS_HEADER) from pyproject.toml, default.txt and constraints/integrations.in."; \
	  $(WITHOUT_CUDA) build/integrations.txt; } > constraints/integrations.txt

clean: ## Remove environments, caches and build output
	rm -rf $(VENV) $(VENV_NEWEST) $(VENV_ROBOFLOW) $(VENV_INTEGRATIONS)
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
