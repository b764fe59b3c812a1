# Imprint. Needs CPython 3.11 and make; everything else goes into .venv.
#
#   PYTHON=/path/to/python3.11  which interpreter to use
#   ENGINE=cpu|gpu              which vLLM to install; by default gpu where nvidia-smi sees a GPU, else cpu
#   TORCH_INDEX=URL             where the CPU build of torch comes from if pip's own indexes do not have it
#   CONFIG=FILE                 what `make serve` starts
#   PYTEST_ARGS="-k name"       handed to pytest
#   POSTGRESQL_BIN=DIR          PostgreSQL's server programs for test-system, if they are in no usual place

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ENGINE := $(or $(ENGINE),$(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu))
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
CONFIG ?= configs/nano.yaml
VENV ?= .venv
PYTEST_ARGS ?=

LOCK := constraints/$(ENGINE).txt
STAMP := $(VENV)/.installed-$(ENGINE)
OTHER_STAMP := $(VENV)/.installed-$(if $(filter gpu,$(ENGINE)),cpu,gpu)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' $(LOCK))

.PHONY: help install serve test test-system test-long lint clean
.NOTPARALLEL:

help:
	@echo "make serve        install into $(VENV) if needed, then start on the address of $(CONFIG)"
	@echo "make test         the test suite that needs pip packages alone"
	@echo "make test-system  tests that need packages of the operating system (installs them, where it runs as root)"
	@echo "make test-long    soak and scale tests"
	@echo "make lint         ruff and mypy"
	@echo "make clean        remove $(VENV) and caches; a server's data (.imprint) stays"

install: $(STAMP)

serve: $(STAMP)
	$(BIN)/imprint serve $(CONFIG)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-system: $(STAMP)
	scripts/install-system-packages
	$(BIN)/python -m pytest -m system $(PYTEST_ARGS)

# pytest exits with 5 when a selection is empty, which is no failure here.
test-long: $(STAMP)
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS) || test $$? -eq 5

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find hypernet router serve tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is written last, so an interrupted installation is taken up again. --no-deps: the lock is complete, and
# vLLM's own requirements would bring torchvision, torchaudio and torchcodec (see the lock's first lines).
$(STAMP): $(LOCK) pyproject.toml
	@test ! -e $(OTHER_STAMP) || { echo "$(VENV) holds the other engine; run 'make clean' first, then again."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
		{ echo "Imprint needs CPython 3.11, but PYTHON is '$(PYTHON)'. Try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "==> Installing Imprint with the $(ENGINE) engine into $(VENV). Once, several minutes and gigabytes."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "==> 1/4 $(TORCH)"
ifeq ($(ENGINE),cpu)
	@$(PIP) install --no-deps "$(TORCH)" 2>/dev/null || \
		{ echo "    not where pip looks by itself; taking it from $(TORCH_INDEX)"; \
		  $(PIP) install --no-deps --index-url "$(TORCH_INDEX)" "$(TORCH)"; }
else
	@$(PIP) install --no-deps "$(TORCH)"
endif
	@echo "==> 2/4 $$(grep -c '^[^#].*==' $(LOCK)) packages of $(LOCK)"
	@$(PIP) install --no-deps --requirement $(LOCK)
	@echo "==> 3/4 Imprint itself"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@echo "==> 4/4 Checking that it loads"
	@$(BIN)/python -c "import importlib.util as u, ray, torch, transformers, vllm; \
		extra = [n for n in ('torchvision', 'torchaudio', 'torchcodec') if u.find_spec(n)]; \
		assert not extra, f'remove {extra} from $(VENV): Imprint runs without them'; \
		print('    vllm', vllm.__version__, '/ torch', torch.__version__, '/ ray', ray.__version__, '/ transformers', transformers.__version__)"
	@touch $@
	@echo "==> Installed."
