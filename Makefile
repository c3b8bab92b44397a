PYTHON ?= python3
BIN := .venv/bin
RUN := demo-run

.PHONY: demo test quick lint wheel clean

# Extract from real text, the source of the standard library's json package, with the model in the package.
demo: .venv/ready
	$(BIN)/headwater plan --config docs/demo.toml --text "$$($(BIN)/python -c 'import json; print(json.__path__[0])')"
	$(BIN)/headwater extract --config docs/demo.toml --out $(RUN) \
		--text "$$($(BIN)/python -c 'import json; print(json.__path__[0])')"
	$(BIN)/headwater verify $(RUN)
	$(BIN)/headwater info $(RUN)
	$(BIN)/python docs/read_xarray.py $(RUN)
	@echo "That was docs/read_xarray.py; docs/read_zarr.py and docs/read_tokens.py read the same run with zarr alone."

test: .venv/test
	$(BIN)/python -m pytest

# What starts no server, cluster, browser or crash: a first answer, not the whole one.
quick: .venv/test
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Build the wheel and use it in an environment of its own, away from this directory.
wheel: .venv/test
	bash .ci/wheel

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[plots,serve]'
	touch $@

.venv/test: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo-run
