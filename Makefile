# make demo: set up and run the example.   make test, make lint, make build, make clean.
# VENV: where the environment goes.  PYTHON: which Python makes it.  PIP_ARGS: more arguments for pip, for example
# --index-url with the address of an index that has CPU-only builds of torch.
VENV = .venv
PYTHON = python3
PIP_ARGS =
# which tests run: all of them, or a part: make test MARKS="not slow"
MARKS =
# where `make build` leaves the archives
DIST = dist

PY = $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check --quiet
STAMP = $(VENV)/.installed
CXX_FILES := $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
INPUTS = pyproject.toml setup.py CMakeLists.txt constraints.txt $(CXX_FILES)

.PHONY: demo test lint build clean

demo: $(STAMP)
	@$(PY) examples/demo.py

test: $(STAMP)
	@$(PY) -m pytest tests -q -ra -m "$(MARKS)"

lint: $(STAMP)
	@echo "ruff check" && $(PY) -m ruff check .
	@echo "ruff format" && $(PY) -m ruff format --check .
	@echo "mypy" && $(PY) -m mypy
	@echo "clang-format" && $(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

# A wheel and a source archive. setuptools would ship what an earlier build left in build/lib, so that goes first.
build: $(STAMP)
	@echo "building $(DIST)"
	@mkdir -p build $(DIST)
	@rm -rf build/lib* build/bdist*
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir $(DIST) .
	@$(PY) -c "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])" $(DIST) > build/sdist.log 2>&1 || { cat build/sdist.log; exit 1; }
	@ls $(DIST)

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
