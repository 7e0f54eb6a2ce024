# The interpreter is the system's: its site-packages hold python3-libnbd, which
# is not on PyPI. A python3 of pyenv or conda, first on PATH, would not see it.
PYTHON := /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
# The compiler's part of it, on two cores. (CFLAGS would take the place of -O2: tried.)
export DIST_EXTRA_CONFIG := $(CURDIR)/tests/setup/build.cfg
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
PAGES := $(patsubst man/%.scd,%,$(wildcard man/*.scd))
# PAGE:OTHER where a page stands for another, so that man healfs-VERB finds each verb.
ALIASES := healfs-umount.1:healfs-mount.1 healfs-list.1:healfs-status.1 \
	healfs-resume.1:healfs-pause.1 healfs-reconnect.1:healfs-recovery.1 \
	healfs-accept.1:healfs-recovery.1 healfs-fail.1:healfs-recovery.1 \
	healfs-demo.1:healfs-doctor.1 healfs@.service.8:healfs.toml.5
MAN := $(PAGES) $(foreach alias,$(ALIASES),$(firstword $(subst :, ,$(alias))))

.DEFAULT_GOAL := help
.PHONY: help setup demo guest test soak sim bench man install uninstall clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /    make \1\t/p' Makefile | expand -t 20

# What is compiled where there is a C compiler; see healfs/compiled.py.
COMPILED := $(wildcard healfs/*/*.pxd healfs/*/*.pyx)
COMPILED += $(patsubst %.pxd,%.py,$(filter %.pxd,$(COMPILED)))

# Installing with the test extra satisfies the plain stamp too, so demo after
# setup does nothing.
$(VENV)/.run: pyproject.toml tests/setup/packages $(COMPILED)
	tests/setup/packages run
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.test: pyproject.toml tests/setup/packages $(COMPILED)
	tests/setup/packages test
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PIP) --editable '.[test]'
	touch $(VENV)/.run $@

setup: $(VENV)/.test ## install what healfs and its tests need; leaves .venv/bin/healfs

demo: $(VENV)/.run ## a verified load through an outage, on a real NBD server
	$(BIN)/healfs demo

guest: $(VENV)/.run ## a tiny Linux for a virtual machine, in build/guest: README.md uses it
	tests/setup/packages guest
	$(BIN)/python -m tests.vm.image build/guest

# Most tests wait for a process, an outage or a guest: three at a time take half as long as one,
# on two cores. The longest files come first (tests/conftest.py).
SIDE_BY_SIDE := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m 'not soak'

test: setup ## lint, types, import rules, and all tests but those marked soak
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	HEALFS_PLAIN=1 $(SIDE_BY_SIDE) tests/unit tests/sim
	$(SIDE_BY_SIDE)

soak: setup ## the tests with full counts (long)
	$(BIN)/python -m pytest -m soak

SEEDS ?= 1000
sim: setup ## the engine in the simulator: make sim SEEDS=N
	$(BIN)/python -m tests.sim.run --log --seeds $(SEEDS)

bench: setup ## a table of ratios beside qemu-storage-daemon and nbdfuse
	$(BIN)/python -m tests.bench

man: ## the manual pages, in build/man: man -M build/man healfs
	tests/setup/packages man
	rm -rf build/man
	mkdir -p build/man/man1 build/man/man5 build/man/man7 build/man/man8
	for page in $(PAGES); do \
		scdoc <man/$$page.scd >build/man/man$${page##*.}/$$page || exit; done
	for alias in $(ALIASES); do page=$${alias%:*} other=$${alias#*:}; \
		echo ".so man$${other##*.}/$$other" >build/man/man$${page##*.}/$$page; done

PREFIX ?= /usr/local
LIB := $(DESTDIR)$(PREFIX)/lib/healfs
UNITS := $(DESTDIR)$(PREFIX)/lib/systemd/system
SHARE := $(DESTDIR)$(PREFIX)/share
MANUAL := $(SHARE)/man
BASH_COMPLETION := $(SHARE)/bash-completion/completions/healfs
ZSH_COMPLETION := $(SHARE)/zsh/site-functions/_healfs
FISH_COMPLETION := $(SHARE)/fish/vendor_completions.d/healfs.fish

# A virtual environment that may be moved: nothing in it names the place it was made in.
install: man ## for the whole system: make install DESTDIR= PREFIX=/usr/local
	tests/setup/packages run
	rm -rf $(LIB) build/lib* build/temp.* build/bdist.*
	$(PYTHON) -m venv $(LIB)
	$(LIB)/bin/python -m pip install --disable-pip-version-check -qq --no-compile .
	$(LIB)/bin/python -m pip uninstall -qq -y pip setuptools
	find $(LIB)/bin -mindepth 1 ! -name 'python*' -delete
	find $(LIB) \( -name direct_url.json -o -name __pycache__ \) -prune -exec rm -r {} +
	sed -i '/^command/d' $(LIB)/pyvenv.cfg
	$(LIB)/bin/python -m compileall -qq -s $(DESTDIR)/ -p / $(LIB)/lib
	chmod -R u=rwX,go=rX $(LIB)
	install -d $(DESTDIR)/etc/healfs
	install -D healfs/data/launcher $(DESTDIR)$(PREFIX)/bin/healfs
	install -D -m 644 healfs/data/healfs@.service $(UNITS)/healfs@.service
	sed -i 's|@PREFIX@|$(PREFIX)|' $(UNITS)/healfs@.service
	install -d $(dir $(BASH_COMPLETION) $(ZSH_COMPLETION) $(FISH_COMPLETION))
	$(LIB)/bin/python -I -m healfs.cli.completion bash >$(BASH_COMPLETION)
	$(LIB)/bin/python -I -m healfs.cli.completion zsh >$(ZSH_COMPLETION)
	$(LIB)/bin/python -I -m healfs.cli.completion fish >$(FISH_COMPLETION)
	for page in $(MAN); do page=man$${page##*.}/$$page; \
		install -D -m 644 build/man/$$page $(MANUAL)/$$page || exit; done

uninstall: ## remove what make install laid; /etc/healfs stays where it is not empty
	rm -rf $(LIB)
	rm -f $(DESTDIR)$(PREFIX)/bin/healfs $(UNITS)/healfs@.service
	rm -f $(BASH_COMPLETION) $(ZSH_COMPLETION) $(FISH_COMPLETION)
	for page in $(MAN); do rm -f $(MANUAL)/man$${page##*.}/$$page; done
	rmdir $(DESTDIR)/etc/healfs 2>/dev/null || true

clean: ## remove what make made
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find healfs -name '*.so' -delete -o -name '*.c' -delete
