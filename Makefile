# Every target makes what it needs: a virtual environment with the versions of constraints.txt, and kdfast in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/* csrc/*/*) setup.py pyproject.toml constraints.txt

.PHONY: demo test lint format bench gpu-test gpu-bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that its pinned build is there before anything asks for torch. The extension is built
# again when a source changes.
$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,bench,dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python bench/demo.py

# The Triton interpreter is chosen when a process first imports a kernel, so its tests have a process of their own.
test: $(VENV)/installed
	$(BIN)/pytest tests
	TRITON_INTERPRET=1 $(BIN)/pytest tests/test_triton.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)

clean:
	rm -rf $(VENV) build dist *.egg-info kdfast/_C.*.so
