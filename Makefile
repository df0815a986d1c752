# make demo    the whole loop on bundled images, ending in a table and pictures in runs/demo
# make test    style, types and tests
# make setup   .venv with everything in it; does nothing when all is in place
# make lint | format | bench | lock | clean

PYTHON ?= python3
PYTEST_ARGS ?=
LOCK := requirements/ci.txt
VENV := .venv
BIN := $(VENV)/bin
BUILT_FROM := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test setup lint format bench lock clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/genkl demo

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

setup: $(VENV)/built

# The stamps are newer than what they were made from: the lock, then the native sources.
$(VENV)/installed: $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement $(LOCK)
	touch $@

$(VENV)/built: $(VENV)/installed $(BUILT_FROM)
	$(BIN)/python -m pip install --no-build-isolation --no-deps --editable .
	$(BIN)/genkl info
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: setup
	$(BIN)/genkl bench

# Writes the versions now in .venv into the lock, keeping its opening comment.
lock:
	grep '^#' $(LOCK) > $(LOCK).new
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip >> $(LOCK).new
	mv $(LOCK).new $(LOCK)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache genkl_ext/*.so $(VENV)/built
