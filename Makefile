# `make quickstart` and `make test` do their own set-up; everything lands in .venv, data/ and papermill_runs/.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
NUM_ROOMS ?= 150
DATA := $(or $(ROOMPLAN_DATA),data)

.PHONY: help install quickstart test test-slow lint lab browser screenshots example clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## build .venv with tested versions

# page_config.json: no dialog that asks to rebuild JupyterLab for dash, which Open3D brings along.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 install"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python venv is missing; run: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[cpu,distributed,export,notebooks,test]'
	@$(BIN)/python -m roomplan_lib.system
	@mkdir -p $(VENV)/etc/jupyter/labconfig && cp notebooks/.page_config.json $(VENV)/etc/jupyter/labconfig/page_config.json
	@touch $@

quickstart: install ## rooms -> training -> predictions -> scores -> picture, on the embedded rooms
	$(BIN)/roomplan rooms --output $(DATA)/raw/rooms --num-rooms $(NUM_ROOMS) --seed 0
	$(BIN)/roomplan prepare arkitscenes --root $(DATA)/raw/rooms --output $(DATA)/processed/rooms
	@for file in $(DATA)/processed/rooms/*.jsonl; do $(BIN)/roomplan validate $$file || exit 1; done
	@mkdir -p papermill_runs/quickstart
	$(BIN)/papermill notebooks/03_train.ipynb papermill_runs/quickstart/03_train.ipynb \
	  -f papermill_runs/params/tiny.yaml -p run_name quickstart --log-output --no-progress-bar
	$(BIN)/roomplan predict papermill_runs/params/tiny.yaml --run-name quickstart --checkpoint roomplan-tiny
	$(BIN)/roomplan score papermill_runs/params/tiny.yaml --run-name quickstart \
	  --predictions papermill_runs/quickstart/predictions/roomplan-tiny
	$(BIN)/python -m roomplan_lib.viz.readme $(DATA)/raw/rooms papermill_runs/quickstart figures
	@echo "papermill_runs/quickstart/: 03_train.ipynb run.yaml metrics.jsonl predictions.jsonl scores.json"
	@echo "papermill_runs/quickstart/predictions/roomplan-tiny/: the same of the model that comes with the package"
	@echo "figures/roomplan-tiny_anchors.png, quickstart_anchors.png: predicted (orange) and true (blue) anchors"

test: install lint ## the checks that CI runs
	$(BIN)/python -m pytest -q -m 'not slow'

test-slow: install lint ## all tests, also those that take minutes
	$(BIN)/python -m pytest -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

# The address with its token is printed; a browser opens where there is a display. A port that is taken is passed over.
lab: install ## JupyterLab on this machine, opened at the notebooks
	$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(if $(DISPLAY)$(WAYLAND_DISPLAY),,--no-browser)

browser: ## install Debian's Chromium, which the tests in JupyterLab and the screenshots need (as root)
	apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends chromium libegl1 libgl1-mesa-dri

RUN ?= papermill_runs/quickstart
screenshots: install ## the README's pictures of JupyterLab, of the run RUN
	$(BIN)/python tests/screenshots.py $(RUN) figures

example: install ## the executed notebooks 03, 04, 05 of the run RUN as pages that fit into git
	$(BIN)/python -m roomplan_lib.viz.pages $(RUN) figures/example

clean: ## remove .venv and caches; keeps data/ and papermill_runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
