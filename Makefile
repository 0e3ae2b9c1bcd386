# `make train` and `make test` each set up .venv on first use. PYTHON=python3.12 takes another
# interpreter, in a virtual environment of its own.
PYTHON ?= python3
# What `make test` and `make long` run; empty for all.
TESTS ?=
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
# -qq shows errors and leaves out warnings.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
PYTEST := $(BIN)/python -m pytest -q -n 2
# A file's tests share what they compile, so they stay on one worker.
BY_FILE := --dist loadfile --no-loadscope-reorder
# What computes through JAX's newer or internal interfaces, or reads what it compiles to.
VERSIONED := tests/kernels tests/test_golden.py tests/launch/test_ahead_of_time.py \
	tests/launch/test_collectives.py tests/run/test_compile.py tests/train/test_step.py \
	tests/parallel/pipeline/test_programs.py tests/parallel/test_composition.py \
	tests/checkpoint/test_manager.py tests/models/test_by_row.py tests/ops/test_cache_kernels.py

# The compiler for TPUs that goes with the jax that is installed.
LIBTPU := "from importlib import metadata; names = metadata.requires('jax'); \
	print(next(name.split(';')[0] for name in names if name.startswith('libtpu')))"

.PHONY: train test long versions tpu faults docs lint clean

train: $(VENV)/.installed
	$(BIN)/python experiments/main_job.py

test: $(VENV)/.installed-test
	$(PYTEST) $(BY_FILE) $(TESTS)

# Of the tests without `long`, those that another version of Python or jax could fail.
versions: $(VENV)/.installed-test
	$(PYTEST) $(BY_FILE) $(VERSIONED)

long: $(VENV)/.installed-test
	$(PYTEST) --maxschedchunk 1 -m 'long and not gpu' $(TESTS)

# Compiles train steps for TPUs. Their compiler lies in a folder of its own: beside jax every process
# would load it and complain that there is no TPU. Only one process at a time may use it.
tpu: $(VENV)/.installed-test
	@test -d $(VENV)/tpu || $(PIP) --no-deps --target $(VENV)/tpu "$$($(BIN)/python -c $(LIBTPU))"
	PYTHONPATH=$(VENV)/tpu $(BIN)/python -m pytest -q -m '' tests/launch/test_tpu.py

# Puts faults into copies of the code and says which tests catch them.
faults: $(VENV)/.installed-test
	$(BIN)/python -m tests.faults

# The pages, into build/docs/index.html; a broken link fails.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --quiet --strict

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "jaxscale needs Python 3.11 or newer; $(PYTHON) is not. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version); this takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Adding what the tests need."
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .ruff_cache .jax_cache
