PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-fast test-realistic test-all fuzz lint train-demo schema clean

# Convert the embedded demo checkpoint.
demo: $(INSTALLED)
	$(BIN)/vlmconvert mllama --llm int4-awq --vision int8-ptq

test: $(INSTALLED)
	$(BIN)/python -m pytest

# A first answer: without the tests that take long beside what they tell.
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not exhaustive and not realistic"

# Also the further cases of what other tests show.
test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m ""

# What precisions lose on real weights, which a package of 90 MB brings.
test-realistic: $(INSTALLED)
	$(BIN)/python -m pytest -m realistic tests/realistic

# Look for new inputs that a reader takes badly: make fuzz TARGET=header SECONDS=60
fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python -m tests.fuzz $(or $(TARGET),header) -max_total_time=$(or $(SECONDS),60)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

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
