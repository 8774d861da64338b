# `make book` builds the book, `make test` runs every test. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python
AXE := tests/browser/node_modules/axe-core/axe.min.js
STAMP := $(VENV)/.installed
SITE := _build/html
SOURCES := _config.yml _toc.yml $(shell find book drone notebooks -type f \
	-not -name '*.pyc' -not -path 'book/params/*')

# A relative folder means one relative to here, wherever a notebook runs.
# Python makes it so, for make's own abspath takes a path with a blank for two.
absolute = $(shell $(PYTHON) -c 'import os, sys; \
  print(os.path.abspath(os.path.expanduser(sys.argv[1].strip())))' "$(1)")
ifneq ($(strip $(DRONE_DATA)),)
override DRONE_DATA := $(call absolute,$(DRONE_DATA))
export DRONE_DATA
endif
ifneq ($(strip $(DRONE_MODELS)),)
override DRONE_MODELS := $(call absolute,$(DRONE_MODELS))
export DRONE_MODELS
endif
ifneq ($(strip $(DRONE_CACHE)),)
override DRONE_CACHE := $(call absolute,$(DRONE_CACHE))
export DRONE_CACHE
endif

# Torch and transformers are thousands of files: a Python that is told to keep no bytecode
# compiles them at every import, 25 seconds of one core instead of ten.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help book pdf epub whole linkcheck test test-fast models benchmark lighthouse lint run sweep lowest edition prose read evidence rename refresh models lock clean need-chapter assignments grade wheelhouse

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The lock names every package, so nothing is to be resolved; Python compiles what it imports.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; choose one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-deps --no-compile --requirement requirements.lock
	$(PY) -m pip install --quiet --no-deps --editable .
	@touch $@

book: $(SITE)/index.html ## set up if needed, build the book from nothing
	@echo "The book is built. Open it: $(SITE)/index.html"
	@echo "or serve it: $(PY) -m http.server --directory $(SITE)"

# An incremental build can hide a warning, so each build starts from nothing.
$(SITE)/index.html: $(STAMP) $(SOURCES)
	rm -rf _build
	$(BIN)/jupyter-book build . --warningiserror --keep-going
	@touch $@

pdf: $(SITE)/index.html ## print the whole book into _build/html/drone-book.pdf (needs Chromium)
	$(PY) -m book.make_pdf

epub: $(SITE)/index.html ## make the whole book _build/html/drone-book.epub (needs Chromium)
	$(PY) -m book.make_epub

whole: $(STAMP) ## pages, PDF and EPUB are there, and none is a stub
	$(PY) -m book.check_site

linkcheck: $(STAMP) ## does every address that the book leads to answer? (needs a network)
	$(BIN)/jupyter-book build . --builder linkcheck --path-output _build/links

# Two processes of one thread each take file after file: what takes minutes goes first, so
# that neither waits for the other's last one. The notebooks begin: a kernel is to start in
# a process that has no browser yet. Chapter 9 times two threads, so it is alone.
SLOW := notebooks tests/site tests/test_style.py tests/course tests/lab/test_sweep.py

# The site is that of `make book`.
test: $(STAMP) $(AXE) $(SITE)/index.html ## set up if needed, run all tests
	DRONE_SITE="$(SITE)" OMP_NUM_THREADS=1 $(BIN)/pytest $(SLOW) tests -n 2 \
	  --dist loadfile --no-loadscope-reorder --ignore-glob='*/09-*' --durations=30
	$(BIN)/pytest notebooks/09-*.ipynb

test-fast: $(STAMP) ## the mathematics, layers and whole models, in three minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q tests/math tests/layers tests/search \
	  tests/model/test_compress.py tests/model/test_walk.py tests/test_structure.py

# axe-core checks accessibility in the browser tests; without npm those tests skip.
$(AXE): tests/browser/package.json tests/browser/package-lock.json
	@if command -v npm >/dev/null; then \
	  npm ci --silent --no-audit --no-fund --prefix tests/browser && touch $@; \
	else echo "npm not found: the accessibility tests will be skipped"; fi

benchmark: $(STAMP) ## time what the library promises, as ratios
	$(BIN)/pytest tests/benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds

lighthouse: $(SITE)/index.html ## score three pages as on a phone (needs npm and Chromium)
	$(PY) tests/browser/lighthouse.py $(SITE)

lint: $(STAMP) ## check style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

need-chapter:
	@test -n "$(CHAPTER)" || { echo "which one? for example CHAPTER=01"; exit 1; }

run: need-chapter $(STAMP) ## rerun a chapter into runs/: CHAPTER=01 [PARAMS=file.yaml]
	$(PY) book/run.py "$(strip $(CHAPTER))" $(if $(strip $(PARAMS)),"$(PARAMS)")

sweep: need-chapter $(STAMP) ## run a chapter over a grid of parameters: CHAPTER=03 GRID=grid.yaml
	$(PY) book/sweep.py "$(strip $(CHAPTER))" "$(GRID)" $(if $(SCHEDULER),--scheduler "$(SCHEDULER)")

edition: need-chapter $(STAMP) ## run a chapter with the edition's parameters, publish it
	$(PY) book/publish.py edition "$(strip $(CHAPTER))"

prose: need-chapter $(STAMP) ## give a published chapter the new text; its results stay
	$(PY) book/publish.py prose "$(strip $(CHAPTER))"

read: need-chapter $(STAMP) ## its readings fit its results: set them in, stamp them
	$(PY) book/publish.py read "$(strip $(CHAPTER))"

evidence: $(STAMP) ## remake the numbers of the finished cases; DRONE_DATA must be set
	$(PY) book/evidence.py

rename: $(STAMP) ## give chapters the new names of book/renamed.yaml, without a run
	$(PY) book/rename.py

refresh: need-chapter $(STAMP) ## run a chapter with its defaults, store the outputs
	$(PY) book/publish.py default "$(strip $(CHAPTER))"

# uv takes the lowest release of each base dependency that pyproject.toml allows.
LOWEST := .venv-lowest
lowest: $(STAMP) ## the library's tests under the lowest versions it allows
	$(BIN)/uv venv --quiet --clear $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable .
	$(BIN)/uv pip install --quiet --python $(LOWEST) pytest hypothesis
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q \
	  -o addopts=--import-mode=importlib tests/math tests/layers tests/search tests/model

assignments: $(STAMP) ## students' notebooks, solutions and graders into runs/course
	$(PY) -m book.course.assign runs/course

grade: $(STAMP) ## grade a folder: AUTOGRADER=a.zip SUBMISSIONS=folder TABLE=marks.csv
	$(PY) -m book.course.grade "$(AUTOGRADER)" "$(SUBMISSIONS)" "$(TABLE)"

wheelhouse: $(STAMP) ## all packages and the book, for a room without a network
	$(PY) -m book.course.wheelhouse runs/wheelhouse

models: $(STAMP) ## try every family of models, write book/models.md
	$(PY) tests/model/families.py

lock: $(STAMP) ## make requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra test \
	  --no-annotate --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command "make lock" --output-file requirements.lock \
	  pyproject.toml

clean: ## remove what was built; keep .venv and runs/
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis
