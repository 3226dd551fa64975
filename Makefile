# Sets up its own virtual environment; needs Python 3.10-3.13 and a C compiler, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= out
# Optional: `make test TORCH=torch` also runs the tests that need PyTorch, `make compare TORCH=torch`
# compares with it.
TORCH ?=
# Test files that run side by side; each compiles on one core and runs kernels on two. In the order
# of their names: with the longest lists of tests first, those that take longest would come last.
JOBS ?= 2

.PHONY: demo test lint results compare clean

demo: $(VENV)/.demo
	$(BIN)/python -m tvm_lowrank.tune -o $(OUT)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: $(VENV)/.bench
	$(BIN)/python benchmarks/results.py

# For example `make compare NETWORKS="resnet18 model.onnx --batch 1 16"`; without, every network.
compare: $(VENV)/.bench
	$(BIN)/python benchmarks/compare.py $(NETWORKS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]' $(TORCH)
	touch $@

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[bench]' $(TORCH)
	touch $@

clean:
	rm -rf $(VENV) $(OUT) *.egg-info
