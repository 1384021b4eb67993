# Everything sets itself up: python3, its venv module and headers, a C++20 compiler and make are enough.
# VENV=dir uses another place for the virtual environment, PYTHON=python3.12 another interpreter to make it with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := build/native
CONFIGURE = $(BIN)/cmake --log-level=WARNING -S asyncload_native -G Ninja \
	-D CMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -D Python_EXECUTABLE=$(abspath $(BIN)/python) \
	-D CMAKE_COMPILE_WARNING_AS_ERROR=ON -D ASYNCLOAD_TESTS=ON
# Tests run in as many processes as there are cores, four at most; what one takes from the tests of the others, they
# cannot see.
PARALLEL := -n auto --maxprocesses=4 --dist=worksteal
# What runs under the sanitizers: the tests of the C++ engine, on one event loop, but for those that hold ggml's values
# against Numba's, and those that interrupt an interpreter of their own.
SANITIZED = tests/native tests/loader tests/layers tests/source --ignore=tests/loader/test_every_type.py \
	-m 'native and not gpu and not demo' -k 'not uvloop and not trio and not interrupt'
# Thread-local variables in the static block: of one that was allocated, at 16 bytes behind the begin of a page,
# ThreadSanitizer takes what stands before it for its size, and ends with "failed to allocate" (GCC 12's runtime).
SANITIZE = -O1 -g1 -fno-omit-frame-pointer -ftls-model=initial-exec
CXX_SOURCES := $(wildcard asyncload_native/src/*.h asyncload_native/src/*.cpp tests/native/*.cpp)

# No falling back to the Python engine: where the C++ engine does not build or import, these targets fail.
export ASYNCLOAD_REQUIRE_NATIVE = 1

.PHONY: help setup native demo examples test test-sanitize sanitize stubs format bench clean
.PHONY: check check-format check-types check-pyright check-docs
.DEFAULT_GOAL := help

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: native ## the virtual environment with everything for development

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

native: $(READY) ## the C++ engine, compiled into asyncload_native/
	$(CONFIGURE) -B $(NATIVE) -D CMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build $(NATIVE)
	$(BIN)/cmake --install $(NATIVE) --prefix . >/dev/null

demo: native ## fetch a real model, load it, check its values
	$(BIN)/python -m bench.demo

examples: native ## torch, for the examples and for their tests
	$(BIN)/python -m pip install --quiet --editable '.[examples]'

test: native ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

test-sanitize: test-sanitize-thread test-sanitize-address ## the C++ engine under ThreadSanitizer and AddressSanitizer

test-sanitize-%: native
	$(CONFIGURE) -B build/$* -D CMAKE_BUILD_TYPE=Sanitize -D CMAKE_CXX_FLAGS="$(SANITIZE) -fsanitize=$*"
	$(BIN)/cmake --build build/$*
	$(BIN)/cmake --install build/$* --prefix build/$*/install >/dev/null
	cp asyncload_native/*.py build/$*/install/asyncload_native/
	ASYNCLOAD_EXAMPLES=25 $(BIN)/python -m tests.native.sanitize $* build/$* -q $(PARALLEL) $(SANITIZED)

sanitize: $(READY) ## the CUDA kernels under compute-sanitizer: needs a GPU and the CUDA toolkit
	for tool in memcheck initcheck synccheck racecheck; do \
		PYTHONPATH=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') ASYNCLOAD_REQUIRE_GPU=1 \
		compute-sanitizer --tool $$tool --error-exitcode 9 $(BIN)/python -m pytest -q -o timeout=0 -k any_number \
		tests/quant/cuda/test_cuda_decode.py || exit 1; done

check: check-format check-types check-pyright check-docs ## format, lint, types, import contracts, docs; in parallel by -j

check-format: native
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-logo

check-types: native
	$(BIN)/mypy

check-pyright: native
	$(BIN)/pyright --pythonpath $(BIN)/python

check-docs: native
	$(BIN)/python -m pytest -q tests/house

stubs: native ## what type checkers know of the C++ engine
	$(BIN)/python -m nanobind.stubgen -q -m asyncload_native._native --exclude-values -o asyncload_native/_native.pyi

format: $(READY) ## put format and imports in order
	$(BIN)/clang-format -i $(CXX_SOURCES)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: native ## the benchmarks, at a size for a laptop
	for name in start load overlap latency chunks memory dequant; do $(BIN)/python -m bench.$$name || exit 1; done

clean: ## remove everything that was made here
	rm -rf $(VENV) build dist asyncload_native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
