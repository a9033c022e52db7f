# make demo: set up and run the example.   make test, make lint, make build, make clean.
# make sanitize, make sanitize-threads: the C++ code under the sanitizers of gcc.
# make test-gpu-interpreted, make test-gpu-compiled: the GPU kernels without a GPU, in Triton's interpreter and as objects
# whose registers and instructions are held to tests/kernels/locks.   make test-triton TRITON=3.9.0: with another Triton.
# make gpu-check: proves and measures everything on an NVIDIA GPU, with PYTHON and the packages it has; ARGS="--only decode"
# VENV: where the environment goes.  PYTHON: which Python makes it.  PIP_ARGS: more arguments for pip, for example
# --index-url with the address of an index that has CPU-only builds of torch.
VENV = .venv
PYTHON = python3
PIP_ARGS =
# which tests run: all of them, or a part: make test MARKS="not slow"
MARKS =
# how many processes share them
JOBS = 2
# what `make sanitize` runs under the sanitizers
SANITIZED = tests/ops/test_program.py tests/ops/test_program_memory.py tests/ops/test_program_refusals.py \
	tests/ops/test_sample_native.py tests/ops/test_sample_native_refusals.py tests/test_parity.py tests/test_expressible.py
SANITIZED_CASES = "refusals or regions or behind or (own_sequence and window) or (several_blocks_depend and long and not generic) or many_python or forked or strange or (every_cpu_path and random) or (test_expressible and cpu and (merged or widths or head_sizes or pivoted or triangular or shaped or alibi or learned)) or (test_sample_native and not 32000 and (equals or order or ends or overflow or token_logprobs))"
# the version that `make test-triton` tries: the oldest that pyproject.toml allows. Its interpreter needs this NumPy.
TRITON = 3.6.0
OLD_NUMPY = "numpy<2.4"
OTHER_TRITON = build/triton-$(TRITON)
# what it runs in the interpreter
TRITON_TESTS = tests/gpu/test_norm.py tests/gpu/test_linear.py tests/gpu/test_attention.py
# what `make gpu-check` is told, and whether it writes the table of fastest kernels: make gpu-check WRITE_CHOICES=1
ARGS =
WRITE_CHOICES =
# where `make build` leaves the archives
DIST = dist

PY = $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check --quiet
STAMP = $(VENV)/.installed
CXX_FILES := $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
INPUTS = pyproject.toml setup.py CMakeLists.txt constraints.txt $(CXX_FILES)

# configures a build of its own: $(call configure,name)
configure = mkdir -p build && $(PY) -m cmake -S . -B build/sanitize-$(1) -G Ninja \
	-DCMAKE_MAKE_PROGRAM="$$($(PY) -c 'import ninja; print(ninja.BIN_DIR)')/ninja" -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" \
	-Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)"

.PHONY: demo test lint build clean sanitize sanitize-threads test-gpu-interpreted test-gpu-compiled test-triton gpu-check

demo: $(STAMP)
	@$(PY) examples/demo.py

test: $(STAMP)
	@$(PY) -m pytest tests -q -ra -n $(JOBS) -m "$(MARKS)"

lint: $(STAMP)
	@echo "ruff check" && $(PY) -m ruff check .
	@echo "ruff format" && $(PY) -m ruff format --check .
	@echo "mypy" && $(PY) -m mypy
	@echo "clang-format" && $(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES) tests/native/teams.cpp

# A wheel and a source archive. setuptools would ship what an earlier build left in build/lib, so that goes first.
build: $(STAMP)
	@echo "building $(DIST)"
	@mkdir -p build $(DIST)
	@rm -rf build/lib* build/bdist*
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir $(DIST) .
	@$(PY) -c "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])" $(DIST) > build/sdist.log 2>&1 || { cat build/sdist.log; exit 1; }
	@ls $(DIST)

# The C++ code with gcc's AddressSanitizer and UndefinedBehaviorSanitizer: an extension that a part of the tests runs on.
# Python has no C++ library of its own, and the sanitizer must find one when an exception is thrown.
sanitize: $(STAMP)
	@echo "building with address and undefined"
	@$(call configure,address) -DPYRUNTIME_SANITIZE=address,undefined > build/sanitize-address.log 2>&1 && $(PY) -m cmake --build build/sanitize-address --target _C >> build/sanitize-address.log 2>&1 || { cat build/sanitize-address.log; exit 1; }
	@LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	    $(PY) tests/sanitize.py "$$(echo $$PWD/build/sanitize-address/_C.*.so)" $(SANITIZED) -q -k $(SANITIZED_CASES) -p no:cacheprovider

# Teams of threads and a small program with ThreadSanitizer, without Python.
sanitize-threads: $(STAMP)
	@echo "building with thread"
	@$(call configure,thread) -DPYRUNTIME_SANITIZE=thread > build/sanitize-thread.log 2>&1 && $(PY) -m cmake --build build/sanitize-thread --target teams >> build/sanitize-thread.log 2>&1 || { cat build/sanitize-thread.log; exit 1; }
	@build/sanitize-thread/teams

test-gpu-interpreted: $(STAMP)
	@TRITON_INTERPRET=1 $(PY) -m pytest tests/gpu -q -ra -n $(JOBS)

test-gpu-compiled: $(STAMP)
	@$(PY) -m tests.kernels.lock --processes $(JOBS)
	@if command -v nvcc > /dev/null; then $(PY) -m tests.kernels.lock --cuda --processes $(JOBS); else echo "no nvcc: the CUDA C++ kernels are not compiled"; fi

# A folder in front of the environment. Registers differ between versions, so nothing is held to the lock files. Not for
# sm_100: Triton 3.6 fails on loops with two products there (its pipeliner; 3.7 and later do not).
test-triton: $(STAMP) $(OTHER_TRITON)/.installed
	@echo "Triton $(TRITON)"
	@PYTHONPATH=$(OTHER_TRITON) $(PY) -c 'import sys, triton; sys.exit(triton.__version__ != "$(TRITON)" and f"this is Triton {triton.__version__}, not $(TRITON)")'
	@PYTHONPATH=$(OTHER_TRITON) $(PY) -m tests.kernels.lock --processes $(JOBS) --arch 80 90 --model llama-3-8b
	@PYTHONPATH=$(OTHER_TRITON) TRITON_INTERPRET=1 $(PY) -m pytest $(TRITON_TESTS) -q -ra -n $(JOBS) -p no:cacheprovider --disable-warnings

$(OTHER_TRITON)/.installed: $(STAMP)
	@rm -rf $(OTHER_TRITON)
	@$(PIP) install $(PIP_ARGS) --no-deps --target $(OTHER_TRITON) triton==$(TRITON) $(OLD_NUMPY)
	@touch $@

# No environment of its own: the machine's PyTorch and Triton are what it measures. Nothing is installed or fetched.
gpu-check:
	@$(PYTHON) -m benchmarks.gpu.check $(if $(WRITE_CHOICES),--write-choices) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f pyruntime/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# the last step is written down only when all steps went well, so a broken set-up is done again
$(STAMP): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is missing or older than Python 3.11; name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "$(PYTHON) cannot make environments; install the package python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "the headers of $(PYTHON) are missing; install the package python3-dev"; exit 1; }
	@command -v "$${CXX:-c++}" > /dev/null || { echo "no C++ compiler; install the package g++ or set CXX"; exit 1; }
	@echo "[1/3] environment in $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] build tools"
	@$(PIP) install $(PIP_ARGS) -c constraints.txt setuptools pybind11 cmake ninja
	@echo "[3/3] pyruntime and what it needs (the first time this takes minutes)"
	@$(PIP) install $(PIP_ARGS) -c constraints.txt --no-build-isolation -e ".[test,dev]"
	@touch $(STAMP)
