# `make train` and `make test` each set up .venv on first use. PYTHON=python3.12 takes another interpreter, in a
# virtual environment of its own.
PYTHON ?= python3
# What `make long` runs.
TESTS ?= tests
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
# -qq shows errors and leaves out warnings.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq

.PHONY: train test long lint clean

train: $(VENV)/.installed
	$(BIN)/python experiments/main_job.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

long: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 -m long $(TESTS)

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

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .ruff_cache
