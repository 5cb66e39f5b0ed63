# Everything a newcomer needs: `make demo` and `make test` install into .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

define DEMO_ENDS

Everything lies in runs/demo: report.html to look at, recipe.yaml, environment.json, metrics.jsonl, model/ and eval/.
Type next, after `source .venv/bin/activate`:
  python eval/generate.py --run_dir runs/demo      talk to it
  isotune export runs/demo --merge                 one plain Hugging Face folder
  accelerate launch --config_file accelerate_configs/ddp.yaml train/sft_opt.py \\
      --config train/configs/demo.yaml --output_dir runs/demo-ddp     the same on two processes
  python train/sft_opt.py --help                   your own data and model
endef
export DEMO_ENDS

.PHONY: help install demo test test-all mutants lint bench report-picture clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP) ## make .venv with the versions of constraints.txt

demo: $(STAMP) ## train, evaluate and answer offline, in a few minutes on two cores
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

test: $(STAMP) ## every test this machine can run, but for the long proofs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow and not slurm"
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slurm and not slow" tests/slurm  # alone: a cluster has the machine for itself

test-all: $(STAMP) ## the long proofs too
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slurm"
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slurm tests/slurm

mutants: $(STAMP) ## change the code and see a test fail: changed lines (BASE=origin/main), or every line (ALL=1)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(if $(ALL),--all) $(if $(BASE),--base $(BASE))

lint: $(STAMP) ## style, types and the order of the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/shellcheck -x slurm/*.sh slurm/*.sbatch .ci/run

bench: $(STAMP) ## every benchmark; each prints one JSON line last
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	@for question in benchmarks/*.py; do echo "== $$question"; $(BIN)/python $$question || exit 1; done

report-picture: $(STAMP) ## docs/report.png anew, from what the demo left
	$(BIN)/python -m tests.browser runs/demo/report.html docs/report.png

clean: ## remove the environment and the runs
	rm -rf $(VENV) runs
