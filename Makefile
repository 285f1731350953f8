# emupmem: `make demo` shows it in a throw-away virtual machine, `make test` proves it.
# Both install what they need (root or sudo, package registries reachable).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PREFIX ?= /opt/emupmem
SHARE := /usr/local/share
MAN := $(SHARE)/man/man8
BASH := $(SHARE)/bash-completion/completions/emupmem
ZSH := $(SHARE)/zsh/site-functions/_emupmem
FISH := $(SHARE)/fish/vendor_completions.d/emupmem.fish
MINUTES ?= 2
NICE ?= 5
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# The tests start Python hundreds of times: what it compiles is kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz check bench picture install uninstall fixtures deb collection deps lint clean

help: ## Show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP) ## Show the main job in a throw-away virtual machine (no risk for this one)
	$(SUDO) $(BIN)/emupmem demo --cache $(HOME)/.cache/emupmem/demo

test: $(STAMP) lint ## Every test, the virtual machines included: about 35 minutes
	$(BIN)/pytest -n 2 --dist load --maxschedchunk 1 tests

fuzz: $(STAMP) ## Fuzz all that reads what others wrote, with new inputs each time (MINUTES=60 for longer)
	nice -n $(NICE) $(BIN)/python -m tests.fuzz --minutes $(MINUTES)

check: $(STAMP) lint ## The quick inner loop, about a minute: lint, types, unit tests
	$(BIN)/pytest -n 2 --dist worksteal --quick tests

bench: $(STAMP) ## Measure every figure that README and the manual quote, as one table: start-up, parser, a guest…
	$(BIN)/python -m tests.bench

picture: $(STAMP) ## Make README's picture anew from the log of a virtual machine
	$(BIN)/python -m emupmem suggest --size 1G --from tests/fixtures/boot/6.1-bios/dmesg --svg .github/suggest.svg >/dev/null

fixtures: $(STAMP) ## Print the fixtures anew in virtual machines
	$(BIN)/python -m tests.vm.fixtures

install: ## Install emupmem for this machine: /usr/local/bin/emupmem
	$(SUDO) sh tests/vm/deps.sh build
	$(SUDO) $(PYTHON) -m venv $(PREFIX)
	$(SUDO) $(PREFIX)/bin/pip install --quiet .
	$(SUDO) ln -sf $(PREFIX)/bin/emupmem /usr/local/bin/emupmem
	$(SUDO) mkdir -p $(MAN)
	$(PREFIX)/bin/python -m emupmem.cli.manual | $(SUDO) tee $(MAN)/emupmem.8 >/dev/null
	$(SUDO) mkdir -p $(dir $(BASH) $(ZSH) $(FISH))
	$(PREFIX)/bin/python -m emupmem.cli.completion bash | $(SUDO) tee $(BASH) >/dev/null
	$(PREFIX)/bin/python -m emupmem.cli.completion zsh | $(SUDO) tee $(ZSH) >/dev/null
	$(PREFIX)/bin/python -m emupmem.cli.completion fish | $(SUDO) tee $(FISH) >/dev/null

uninstall: ## Take it away again (reservations stay: emupmem remove first)
	$(SUDO) rm -rf $(PREFIX) /usr/local/bin/emupmem $(MAN)/emupmem.8 $(BASH) $(ZSH) $(FISH)

collection: $(STAMP) ## Build the Ansible collection into dist/
	mkdir -p dist
	$(BIN)/python -m tests.fleet.build dist

deb: ## Build the Debian package (Debian 13 and newer) into dist/, tested and checked there
	sh tests/vm/deps.sh
	$(SUDO) env EMUPMEM_CACHE="$${EMUPMEM_CACHE:-$$HOME/.cache/emupmem}" sh .packaging/deb.sh

lint: $(STAMP)
	$(BIN)/ruff check emupmem tests
	$(BIN)/ruff format --check emupmem tests
	$(BIN)/mypy

deps: ## Install the system packages that tests and demo need
	sh tests/vm/deps.sh

$(STAMP): pyproject.toml tests/requirements.txt
	sh tests/vm/deps.sh
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --requirement tests/requirements.txt && \
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable . || \
	{ echo "emupmem: pip could not install the Python packages of tests/requirements.txt (its words are above);" \
	"is the package index reachable?" >&2; exit 1; }
	@touch $@

clean: ## Remove the virtual environment (the cache of images is ~/.cache/emupmem)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
