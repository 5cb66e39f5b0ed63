# `make demo`, `make test` and `make docs` install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
STAMP := $(VENV)/.installed$(if $(LOCKED),-locked)
DOCS_STAMP := $(VENV)/.installed-docs

define DEMO_ENDS

The result is in runs/demo: report.html, recipe.yaml, environment.json, metrics.jsonl, model/ and eval/.
Next, after `source .venv/bin/activate`:
  python eval/generate.py --run_dir runs/demo      chat with the model
  isotune export runs/demo --merge                 export a plain Hugging Face folder
  accelerate launch --config_file accelerate_configs/ddp.yaml train/sft_opt.py \\
      --config train/configs/demo.yaml --output_dir runs/demo-ddp     the same on two processes
  python train/sft_opt.py --help                   your own data and model
endef
export DEMO_ENDS

.PHONY: help install demo test test-all test-lowest gpu mutants lock lint docs bench report-picture clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# LOCKED=1: every package but torch, which each machine has a build of, by the hashes of requirements.lock
$(STAMP): pyproject.toml constraints.txt $(if $(LOCKED),requirements.lock)
	$(PYTHON) -m venv $(if $(LOCKED),--clear) $(VENV)
	$(if $(LOCKED),$(BIN)/pip install --quiet --require-hashes --no-deps -r requirements.lock)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(if $(LOCKED),$(BIN)/pip install --quiet --no-deps -e . && $(BIN)/pip check, \
	  $(BIN)/pip install --quiet -c constraints.txt -e '.[all,dev]')
	@touch $@ $(VENV)/.installed

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

install: $(STAMP) ## create .venv with the versions of constraints.txt

demo: $(STAMP) ## train and evaluate offline, in a few minutes on two cores
	rm -rf runs/demo-base runs/demo
	@echo "== 1 of 5: a small base model learns the world's capitals" && \
	$(BIN)/python train/sft_opt.py --config train/configs/demo_base.yaml
	@echo "== 2 of 5: held-out questions, before" && \
	$(BIN)/python eval/generate.py --run_dir runs/demo-base --dataset_name builtin:pirate --max_new_tokens 32
	@echo "== 3 of 5: LoRA teaches it to answer as a pirate" && \
	$(BIN)/python train/sft_opt.py --config train/configs/demo.yaml
	@echo "== 4 of 5: held-out questions, after" && \
	$(BIN)/python eval/generate.py --run_dir runs/demo --dataset_name builtin:pirate --max_new_tokens 32
	@echo "== 5 of 5: do the two differ, beyond chance?" && \
	$(BIN)/isotune compare runs/demo-base runs/demo --examples 1
	@$(BIN)/isotune report runs/demo-base runs/demo --output runs/demo/report.html
	@echo "$$DEMO_ENDS"

# three workers for two cores: one computes while another waits for a server or a clock
test: $(STAMP) ## every test that this machine can run, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not slurm"
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slurm and not slow" tests/slurm  # alone: the cluster needs the whole machine

test-all: $(STAMP) ## the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slurm"
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slurm tests/slurm

test-lowest: $(STAMP) ## unit and numerics tests with the lowest versions that pyproject.toml allows; torch's is the tested one
	$(BIN)/pip install --quiet 'uv>=0.9'
	$(PYTHON) -m venv $(LOWEST)
	grep '^torch==' constraints.txt > $(LOWEST)/torch.txt
	$(BIN)/uv pip compile pyproject.toml --extra all --resolution lowest-direct -c $(LOWEST)/torch.txt \
	  --python $(LOWEST)/bin/python --no-annotate --no-header --quiet -o $(LOWEST)/versions.txt
	$(LOWEST)/bin/pip install --quiet -c $(LOWEST)/versions.txt torch
	$(LOWEST)/bin/pip install --quiet -c $(LOWEST)/versions.txt -e '.[all,dev]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest -n 2 --dist loadfile -m "not slow" tests/unit tests/numerics

gpu: ## on a CUDA machine with its own packages: tests, bits, speed and memory in eight minutes, into gpu-report/
	PYTHONPATH=src $(PYTHON) -m tests.gpu.report $(if $(STAGES),--stages $(STAGES))

mutants: $(STAMP) ## change the code and see a test fail: changed lines (BASE=origin/main), or every line (ALL=1)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(if $(ALL),--all) $(if $(BASE),--base $(BASE))

lock: $(STAMP) ## write requirements.lock: the versions of .venv with the hashes of their files
	$(BIN)/pip install --quiet 'uv>=0.9'
	$(BIN)/pip freeze --exclude-editable | sed 's/+.*//' > $(VENV)/versions.txt
	$(BIN)/uv pip compile pyproject.toml --extra all --extra dev -c constraints.txt -c $(VENV)/versions.txt \
	  --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet -o $(VENV)/all.lock
	awk '/^[a-z]/ { kept = !/^(torch|(cuda|nvidia)-[a-z0-9-]+)==/ } kept' $(VENV)/all.lock > requirements.lock

lint: $(STAMP) ## style, types and the import order of the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/shellcheck -x slurm/*.sh slurm/*.sbatch .ci/run
	$(BIN)/hadolint containers/Dockerfile

docs: $(DOCS_STAMP) ## build the documentation into site/, strictly; needs no network once installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@! grep -rnoE '<(script|link|img)[^>]+(src|href)="https?:[^"]+"' site --include='*.html'  # loads nothing from elsewhere

bench: $(STAMP) ## every benchmark; each prints one JSON line last
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	@for question in benchmarks/*.py; do echo "== $$question"; $(BIN)/python $$question || exit 1; done

report-picture: $(STAMP) ## take docs/report.png again, from the runs of the demo
	$(BIN)/python -m tests.browser runs/demo/report.html docs/report.png

clean: ## remove .venv, runs and the site
	rm -rf $(VENV) $(LOWEST) runs site
