PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint train-demo schema clean

# Convert the embedded demo checkpoint.
demo: $(INSTALLED)
	$(BIN)/vlmconvert mllama --llm int4-awq --vision int8-ptq

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Train the embedded demo checkpoints again; it goes on where it was stopped.
train-demo: $(INSTALLED)
	$(BIN)/python -m vlmconvert.demo.train_mllama
	$(BIN)/python -m vlmconvert.demo.train_llava

# Write the manifest's JSON Schema again after a change of its model.
schema: $(INSTALLED)
	$(BIN)/python -m manifests.io

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build
