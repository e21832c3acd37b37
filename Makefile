# Two commands, for a machine with Python 3.11, pip, git and make:
#
#     make demo    install, then run the main job on data that the package makes itself
#     make test    install with the test tools, then run the tests
#
# Both work in $(VENV) and are instant the second time. Whatever the constraints do not suit (another Python,
# another CUDA build) is an argument:  make demo PYTHON=python3.12 CONSTRAINTS=my.txt PIP_ARGS='...'

PYTHON ?= python3.11
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=
DEMO ?= runs/demo

BIN := $(VENV)/bin
SHELL := bash
export HF_HUB_OFFLINE := 1

.PHONY: help demo test lint clean
.NOTPARALLEL:

help:
	@sed -n 's/^#     //p' Makefile

demo: $(VENV)/installed
	$(BIN)/rtb-rl run rtb_iql --budget demo --out $(DEMO)

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if command -v node > /dev/null; then $(BIN)/pyright; else echo 'pyright left out: it needs Node.js'; fi

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find rtb_rl agents benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# pip warns of each package that a folder of packages, where one is configured, does not have: that is left out.
FILTER := 2>&1 | { grep -v 'Location .* is ignored' || true; }

$(VENV)/installed: REQUIREMENT := .
$(VENV)/installed-test: REQUIREMENT := .[test]
$(VENV)/installed-dev: REQUIREMENT := .[test,dev]

$(addprefix $(VENV)/,installed installed-test installed-dev): pyproject.toml $(CONSTRAINTS) | $(BIN)/pip
	@echo 'Installing into $(VENV): a minute or two'
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check -q \
		-c $(CONSTRAINTS) $(PIP_ARGS) -e '$(REQUIREMENT)' $(FILTER)
	@touch $@

# Some systems ship Python without the part of venv that brings pip; their own pip can then fill the environment.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
		echo 'error: $(PYTHON) does not run here, or is older than 3.11.' >&2; \
		echo 'Install Python 3.11, or name another one:  make PYTHON=/path/to/python3 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) > /dev/null 2>&1 || { set -o pipefail; $(PYTHON) -m venv --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install -q pip $(FILTER); }
