# Kaggle starter kit. `make help` lists the targets; each builds .venv by itself when requirements.txt has changed.

PYTHON ?= python3

# What make is given reaches Python by the environment as it was typed: $(value) keeps make from reading a $ in it, and
# no shell sees it. common/front.py checks the variables and makes the command.
override GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
export GIVEN PYTHON $(GIVEN)

# A line `name: ## what it does` makes a target of the verb `name` of `python -m common`.
override TARGETS := $(shell sed -n 's/^\([a-z]*\): \#\# .*/\1/p' Makefile)

.PHONY: help python checked $(TARGETS)
.DEFAULT_GOAL := help
.NOTPARALLEL: # the checks come before the installation, under make -j too

new: ## start competition COMP from a template: KIND=images, masks or table
train: ## train COMP, on demo data when there is no data, and write its submission (NPROC=2: two processes)
predict: ## write the submission of a finished RUN again (RUN=a,b averages runs)
tune: ## search for settings of COMP with Optuna: ARGS="--search lr=1e-4:1e-2:log" TRIALS=30
runs: ## all runs of COMP side by side, the best first
blend: ## combine the saved predictions of COMP's runs (RUN=a,b), with weights chosen out of fold
backtest: ## score forecasts of past days by models that have not seen them, where COMP has it
check: ## check COMP's images, ids, shapes and a row of the CSV, without training
data: ## download COMP's files into data/COMP
submit: ## send COMP's best checked submission to Kaggle and wait for the score
board: ## compare validation and leaderboard scores of all submissions of COMP
kernel: ## train COMP on Kaggle's GPUs and fetch the run
notebook: ## push RUN=a,b with a notebook that predicts offline on Kaggle (ARGS=--submit submits it)
test: ## the whole test suite on up to four cores, or pytest with ARGS="tests/common -k x"
bench: ## run a benchmark: BENCH=engine, loaders ...
lint: ## check the style of the code

$(filter-out new,$(TARGETS)): .venv/.installed
	@.venv/bin/python -m common.front $@

new: checked
	@"$$PYTHON" -m common.front $@

help: listed python ## this list
	@"$$PYTHON" -m common.front --recipes

listed:
	@echo 'make TARGET COMP=name [DATA=folder-or-zip] [RECIPE=best] [RUN=name] [FOLD=0|all|none] [ARGS="--epochs 3"]'
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' Makefile

checked: python
	@"$$PYTHON" -m common.front --check $(filter $(TARGETS),$(MAKECMDGOALS))

python:
	@"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, '$$PYTHON' is $$("$$PYTHON" --version 2>&1). Set PYTHON=/path/to/python3.11"; exit 1; }

# opencv-python needs libGL, the headless twin does not: both share one folder, so the headless files go last.
.venv/.installed: requirements.txt | checked
	@free=$$(df -Pk . | awk 'NR == 2 {print $$4}'); there=$$(du -sk .venv 2>/dev/null | cut -f 1); \
	  [ $$((free + $${there:-0})) -ge 7000000 ] || { \
	  echo "error: $$((free / 1000000)) GB are free for $$PWD/.venv, which takes 7 GB (and 3 GB more where pip keeps its downloads, TMPDIR and ~/.cache/pip). Free some, or clone to a larger disk"; exit 1; }
	@echo "installing requirements.txt into .venv (once; 6 GB, some minutes)"
	@"$$PYTHON" -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps $$(grep ^opencv-python-headless requirements.txt)
	@touch $@
