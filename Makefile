# Every target makes what it needs: a virtual environment with the versions of constraints.txt, and kdfast in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/* csrc/*/*) setup.py pyproject.toml constraints.txt
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/emulated_device/*)

.PHONY: demo test lint format bench gpu-test gpu-test-plain gpu-test-sanitized gpu-bench gpu-bench-chunk gpu-tune clean

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
	$(BIN)/python bench/demo_tinybert.py

# A process per core, whose threads do not spin while they wait for each other. The Triton interpreter is chosen when a
# process first imports a kernel, so its tests have processes of their own.
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/installed
	$(BIN)/pytest tests -n auto --dist loadfile
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto --dist worksteal tests/test_triton_*.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# pytest-benchmark leaves an old file in place when it measures nothing.
bench: $(VENV)/installed
	mkdir -p .benchmarks && rm -f .benchmarks/run.json
	$(BIN)/pytest bench --benchmark-json=.benchmarks/run.json --benchmark-columns=median,iqr,rounds
	$(BIN)/python bench/report.py .benchmarks/run.json --into docs/benchmarks.md --headline README.md

# On a GPU machine whose own Python has PyTorch, that Python is used where there is no .venv. A folder kdfast/ is not yet an
# installation: from the root of a checkout it is found without one.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_SETUP = $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
    || { echo "no CUDA device found: nothing to run"; exit 0; }; \
    $(GPU_PYTHON) -c 'import kdfast._C, kdfast.kernels' 2>/dev/null \
    || $(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable . || exit 1;

# The CUDA kernels' memory accesses, races and barriers are checked where there is a sanitizer that works. Without PyTorch's
# cache of memory every tensor is an allocation, whose ends it sees. Exit code 5: the device has no CUDA kernels to check.
SANITIZER = $(or $(shell command -v compute-sanitizer),/usr/local/cuda/bin/compute-sanitizer)
SANITIZED = PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --error-exitcode 1 --tool

# Most of the time is Triton's compiler. The largest tests of three processes fit on a device of 80 GB together.
GPU_PARALLEL = $(shell $(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses 3 --dist loadfile)

# What needs a device stands in files of its own: the others ask for packages that such a machine may not have. TESTS names
# some of them.
TESTS ?= $(sort $(wildcard tests/test_gpu*.py))

gpu-test: gpu-test-plain gpu-test-sanitized

gpu-test-plain:
	@$(GPU_SETUP) $(GPU_PYTHON) -m pytest $(TESTS) -m gpu $(GPU_PARALLEL)

gpu-test-sanitized:
	@$(GPU_SETUP) $(SANITIZED) memcheck $(GPU_PYTHON) -c 'import torch; torch.ones(2, device="cuda").sum().item()' >/dev/null 2>&1 \
	    || { echo "compute-sanitizer is not here or does not work here: not run"; exit 0; }; \
	for tool in memcheck synccheck racecheck; do \
	    echo "compute-sanitizer, $$tool"; \
	    $(SANITIZED) $$tool $(GPU_PYTHON) -m pytest tests/test_gpu_cuda.py -k for_the_sanitizer \
	        || test $$? -eq 5 || exit 1; \
	done

# Processes of at most 8 minutes, each of which goes on where the last one ended, however it ended. `make gpu-bench-chunk`
# is one of them. OPERATION=kd_loss measures bench/bench_kd_loss.py alone. What began within MINUTES has two more. Results
# are kept in the folder KEEP.
MINUTES ?= 6
KEEP ?= bench/results
GPU_BENCH = timeout $$(($(MINUTES) * 60 + 120)) $(GPU_PYTHON) -m pytest $(if $(OPERATION),bench/bench_$(OPERATION).py,bench) --device cuda \
    --keep $(KEEP) --minutes $(MINUTES) --benchmark-columns=median,iqr,rounds

gpu-bench:
	@$(GPU_SETUP) while $(GPU_BENCH); test $$? -eq 75; do :; done; $(GPU_PYTHON) bench/side_by_side.py --results $(KEEP)

gpu-bench-chunk:
	@$(GPU_SETUP) $(GPU_BENCH); $(GPU_PYTHON) bench/side_by_side.py --results $(KEEP)

# Which launches of the Triton kernels this GPU likes best, of one TABLE of kernels/tuning.py or of all.
gpu-tune:
	@$(GPU_SETUP) $(GPU_PYTHON) bench/tune.py --results $(KEEP) $(if $(TABLE),--table $(TABLE))

clean:
	rm -rf $(VENV) build dist *.egg-info kdfast/_C.*.so
