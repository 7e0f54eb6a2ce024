# The interpreter is the system's: its site-packages hold python3-libnbd, which
# is not on PyPI. A python3 of pyenv or conda, first on PATH, would not see it.
PYTHON := /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
MAN := $(patsubst %.scd,build/%,$(wildcard man/*.scd))

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak sim bench man clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /    make \1\t/p' Makefile | expand -t 20

# Installing with the test extra satisfies the plain stamp too, so demo after
# setup does nothing.
$(VENV)/.run: pyproject.toml tests/setup/packages
	tests/setup/packages run
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.test: pyproject.toml tests/setup/packages
	tests/setup/packages test
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PIP) --editable '.[test]'
	touch $(VENV)/.run $@

setup: $(VENV)/.test ## install what healfs and its tests need; leaves .venv/bin/healfs

demo: $(VENV)/.run ## a verified load through an outage, on a real NBD server
	$(BIN)/healfs demo

test: setup ## lint, types, import rules, and all tests but those marked soak
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m 'not soak'

soak: setup ## the tests with full counts (long)
	$(BIN)/python -m pytest -m soak

SEEDS ?= 1000
sim: setup ## the engine in the simulator: make sim SEEDS=N
	$(BIN)/python -m tests.sim.run --log --seeds $(SEEDS)

bench: setup ## a table of ratios beside qemu-storage-daemon and nbdfuse
	$(BIN)/python -m tests.bench

man: $(MAN) ## the manual pages, in build/man

build/man/%: man/%.scd
	@mkdir -p $(@D)
	scdoc <$< >$@

clean: ## remove what make made
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
