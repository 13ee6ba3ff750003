# Commands for a newcomer: `make demo`, `make test`, `make bench`. Each makes what it needs, from a fresh clone.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test quick bench lint tidy docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.segmentation demo

test: $(VENV)/.test
	PYTHON=$(BIN)/python tests/run.sh

quick: $(VENV)/.test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q tests --numprocesses auto --dist worksteal

# About twenty minutes on two cores, with nothing else running; `python -m benchmarks --quick` takes three minutes.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks --output benchmarks/results
	$(BIN)/python -m benchmarks table

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' '*.cc' | xargs -r $(BIN)/clang-format --dry-run --Werror

# clang-tidy over the C++ sources, as they were compiled: some minutes. Not in `make test`.
tidy: $(VENV)/.test
	$(BIN)/pip install --quiet clang-tidy
	$(BIN)/ninja -C build/temp.* -t compdb > build/compile_commands.json
	$(BIN)/clang-tidy --quiet -p build $$(git ls-files 'csrc/*.cpp')

# The documentation site, in site/: open site/index.html.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q docs site

# The extension is built against the torch of the environment, which is therefore installed first.
$(VENV)/.torch:
	@echo "Making $(VENV), and downloading PyTorch (some GB with its CUDA libraries) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "torch>=2.10" numpy "setuptools>=77" wheel ninja
	touch $@

SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

# The demo needs no CUDA kernels, which take minutes to compile; where the tests have compiled them, they stay.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	@echo "Compiling the CPU kernels (about a minute), and installing the demo's packages and data (60 MB) ..."
	$(if $(wildcard $(VENV)/.test),,PROAC_NO_CUDA=1) $(BIN)/pip install --quiet --no-build-isolation --editable ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	@echo "Compiling the kernels, those for CUDA too where nvcc is found (some minutes) ..."
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,study,dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[docs]"
	touch $@

$(VENV)/.bench: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench]"
	touch $@

clean:
	rm -rf build dist site *.egg-info proac_cuda/_C*.so $(VENV)
