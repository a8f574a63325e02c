# pairmill: `make help` lists the targets.
PYTHON ?= python3
RECIPE ?= recipes/pretrain.yaml
WORKSPACE ?=
BIN := .venv/bin
RUN := $(BIN)/pairmill
AT := $(if $(WORKSPACE),--workspace $(WORKSPACE),)
export NO_ALBUMENTATIONS_UPDATE := 1
export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help setup lock demo pretrain curate report serve test test-all check bench docs clean

help: ## explain every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  RECIPE=…, WORKSPACE=… choose another recipe and where its results lie"

setup: .venv/.ready ## make .venv from pinned, hashed requirements (nothing to do: under 2 s)

.venv/.ready: requirements.lock requirements-setup.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit(f"expected Python 3.11, found {v[0]}.{v[1]}: make setup PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-setup.lock
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

lock: setup ## compile requirements.in anew (pins and hashes, no addresses)
	$(BIN)/uv pip compile requirements.in --override overrides.txt --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --python-version 3.11 --upgrade -o requirements.lock --quiet
	$(BIN)/uv pip compile requirements-setup.in --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --python-version 3.11 -o requirements-setup.lock --quiet

demo: setup ## the whole flywheel on a small web of our own: pages, pairs, filters, two rounds, report
	$(RUN) demo $(AT)

pretrain: setup ## run RECIPE up to its trained and evaluated model; whatever upstream is missing comes first
	$(RUN) pretrain $(RECIPE) $(AT)

curate: setup ## run RECIPE up to its selection
	$(RUN) curate $(RECIPE) $(AT)

report: setup ## write RECIPE's report anew and say where it is
	$(RUN) report $(RECIPE) $(AT)

serve: setup ## start the orchestration server and serve RECIPE's schedule (see `pairmill deploy --help`)
	$(RUN) deploy $(RECIPE) $(AT)

test: setup ## the tests that take seconds (at most 8 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" tests

test-all: setup ## all tests
	$(BIN)/python -m pytest -m "not gpu or gpu" --timeout 900 tests

check: setup ## lint, format, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell $$(git ls-files ':!*.lock')

bench: setup ## the long measurements: kills, and whether curation helps (an hour); results go to workspace/bench
	mkdir -p workspace/bench
	$(BIN)/python benchmarks/kills.py workspace/bench/kills | tee workspace/bench/kills.txt
	$(BIN)/python benchmarks/curation.py workspace/bench/curation | tee workspace/bench/curation.txt
	$(BIN)/python benchmarks/curation.py workspace/bench/curation --clean | tee workspace/bench/curation-clean.txt

docs: setup ## check that every link inside docs/ and README.md leads somewhere
	$(BIN)/python -m pytest tests/test_docs.py

clean: ## remove what a build leaves behind (.venv and workspaces stay)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .mypy_cache .ruff_cache .hypothesis .pytest_cache
