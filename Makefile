# make help tells the targets. PYTHON is the interpreter that the environments are made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests wait for processes more than they compute: three workers for two CPUs.
WORKERS ?= $(shell $(PYTHON) -c "import os; print((os.cpu_count() or 1) * 3 // 2)")

# Where it is set, every process that a test starts compiles the package again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: serve test test-long lint bench help clean

help:  ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/serve.done  ## install, then serve the demo model on http://127.0.0.1:8080
	$(BIN)/python -m handler serve $(ARGS)

test: $(VENV)/test.done  ## install, then run the tests (8 minutes at most on 2 cores)
	$(BIN)/python -m pytest -m "not long" -n $(WORKERS) --dist worksteal $(ARGS)

test-long: $(VENV)/test-long.done  ## the tests that take longer
	$(BIN)/python -m pytest -m long $(ARGS)

lint: $(VENV)/test.done  ## format, lint, types, containers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/shellcheck docker/run.sh
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

bench: $(VENV)/bench.done  ## time a server of the demo under load, beside static batches and transformers
	$(BIN)/python benchmarks/serve.py $(ARGS)

clean:  ## remove what the other targets made
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The server's packages, then the tests' on top: the same environment serves both.
$(VENV)/serve.done: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e .
	@touch $@

$(VENV)/test.done: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e '.[transformers,test,lint]'
	@touch $@ $(VENV)/serve.done

$(VENV)/test-long.done: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e '.[transformers,test,lint,lm-eval]'
	@touch $@ $(VENV)/test.done $(VENV)/serve.done

$(VENV)/bench.done: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e '.[bench]'
	@touch $@ $(VENV)/serve.done
