# Kaggle starter kit. `make help` lists the targets; each builds .venv by itself when requirements.txt has changed.

PYTHON ?= python3
PY     := .venv/bin/python

# One process by default; NPROC=2 starts two on this machine, NNODES=2 MASTER=host:port joins machines.
LAUNCH := $(PY) -m common
ifneq ($(NPROC)$(NNODES),)
RENDEZVOUS := $(if $(NNODES),--nnodes $(NNODES) --rdzv-backend c10d --rdzv-endpoint $(MASTER),--standalone)
LAUNCH := $(PY) -m torch.distributed.run $(RENDEZVOUS) --nproc-per-node $(or $(NPROC),1) -m -- common
endif

# `make train COMP=clouds RECIPE=best ARGS="--epochs 3"` -> `python -m common train clouds --recipe best --epochs 3`
FLAGS = $(foreach name,DATA RECIPE RUN FOLD FILE MSG FORCE,$(if $($(name)),--$(call lower,$(name))='$(subst ','\'',$($(name)))')) $(ARGS)
lower = $(shell echo $(1) | tr A-Z a-z)
BENCHES = $(patsubst benchmarks/%.py,%,$(filter-out %/__init__.py,$(wildcard benchmarks/*.py)))

.PHONY: help train predict backtest test check data submit board kernel bench lint python name
.DEFAULT_GOAL := help
.NOTPARALLEL: # the checks come before the installation, under make -j too

help: ## this list
	@echo "make TARGET COMP=name [DATA=folder-or-zip] [RECIPE=best] [RUN=name] [FOLD=0|all|none] [ARGS=\"--epochs 3\"]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "competitions: $(notdir $(patsubst %/task.py,%,$(wildcard competitions/*/task.py)))"

train: name .venv/.installed ## train COMP, on demo data when there is no data, and write its submission (NPROC=2: two processes)
	@$(LAUNCH) train $(COMP) $(FLAGS)

predict: name .venv/.installed ## write the submission of a finished RUN again (RUN=a,b averages runs)
	@$(PY) -m common predict $(COMP) $(FLAGS)

test: python .venv/.installed ## the whole test suite
	@$(PY) -m pytest $(ARGS)

backtest: name .venv/.installed ## forecast past days with models that know nothing of them, where COMP has that
	@$(PY) -m common backtest $(COMP) $(FLAGS)

check: name .venv/.installed ## look for unreadable images in COMP's data
	@$(PY) -m common check $(COMP) $(FLAGS)

data: name .venv/.installed ## download COMP's files into data/COMP
	@$(PY) -m common data $(COMP) $(FLAGS)

submit: name .venv/.installed ## send COMP's best checked submission to Kaggle and wait for the score
	@$(PY) -m common submit $(COMP) $(FLAGS)

board: name .venv/.installed ## validation against leaderboard for every submission of COMP
	@$(PY) -m common board $(COMP) $(FLAGS)

kernel: name .venv/.installed ## train COMP on Kaggle's GPUs and fetch the run
	@$(PY) -m common kernel $(COMP) $(FLAGS)

bench: python .venv/.installed ## side-by-side measurements: BENCH=engine, loaders ...
	@$(PY) -m benchmarks.$(or $(filter $(BENCHES),$(BENCH)),$(error BENCH=$(BENCH): expected one of $(BENCHES))) $(ARGS)

lint: python .venv/.installed ## style of the code
	@$(PY) -m ruff check .

name: python
	@$(PYTHON) -m common name '$(COMP)' $(firstword $(MAKECMDGOALS))

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Set PYTHON=/path/to/python3.11"; exit 1; }

# opencv-python needs libGL, the headless twin does not: both share one folder, so the headless files go last.
.venv/.installed: requirements.txt
	@free=$$(df -Pk . | awk 'NR == 2 {print $$4}'); there=$$(du -sk .venv 2>/dev/null | cut -f 1); \
	  [ $$((free + $${there:-0})) -ge 7000000 ] || { \
	  echo "error: $$((free / 1000000)) GB are free for $(CURDIR)/.venv, which takes 7 GB (and 3 GB more where pip keeps its downloads, TMPDIR and ~/.cache/pip). Free some, or clone to a larger disk"; exit 1; }
	@echo "installing requirements.txt into .venv (once; 6 GB, some minutes)"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps $(shell grep ^opencv-python-headless requirements.txt)
	@touch $@
