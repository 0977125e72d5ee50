# Everything starts here: `make demo` and `make test` set up what they need. `make help` lists the rest.
PYTHON ?= python3
VENV   ?= .venv
STUDY  ?= demo
NAMESPACE ?= moelib
SAMPLE ?= 0
BIN    := $(VENV)/bin
WORKFLOW := .venv-workflow
PROFILE ?= local

.DEFAULT_GOAL := help
.PHONY: help setup engine shimmy workflow demo test quick faults cluster forgeries hubfaults lint docs validation cards residuals rehearsal mutation lab layers doctor bench runners scale training-data trained clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moelib needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1): install one and run make PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	@echo "setting up $(VENV) (about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[test]'
	@touch $@

setup: $(VENV)/.ready ## virtual environment with moelib and its dependencies

engine: setup ## llama.cpp's tools: show which are used; if there are none, download the matching release archive or build them
	@$(BIN)/python tools/build_engine.py

shimmy: setup ## shimmy 1.9.0, another server: built from its crate, about 4 minutes (Rust, cmake, libclang)
	@$(BIN)/python tools/build_shimmy.py $(ARGS)

$(WORKFLOW)/.ready: workflow/requirements.txt | setup
	@echo "setting up $(WORKFLOW): Snakemake, 300 MB"
	@test -x $(WORKFLOW)/bin/python || $(PYTHON) -m venv $(WORKFLOW)
	@$(WORKFLOW)/bin/python -m pip install -qq --disable-pip-version-check -r workflow/requirements.txt
	@touch $@

workflow: $(WORKFLOW)/.ready engine ## STUDY cell by cell with Snakemake: PROFILE=local (GPUS=2 of one host) or slurm (CPUS=32 of a node)
	@test -d workflow/profiles/$(PROFILE) || { echo "moelib: no profile '$(PROFILE)'; there are: $$(ls -m workflow/profiles)"; exit 2; }
	@test "$(PROFILE)$(CPUS)" != slurm || { echo "moelib: say how many CPUs a node has, as a cell is given no more: CPUS=32"; exit 2; }
	@$(WORKFLOW)/bin/snakemake -s workflow/Snakefile --profile workflow/profiles/$(PROFILE) --config study=$(STUDY) moelib=$(abspath $(BIN)/moelib) $(if $(CPUS),cpus=$(CPUS)) \
	  $(if $(GPUS),--resources gpu=$(GPUS)) $(ARGS)

demo: ## the whole demo study: from nothing to its document
	@echo "demo: two small trained MoE models, six quantised files, 60 measured runs, 38 comparisons of what they say, two notebooks, one document."
	@echo "On 2 cores: about 1 minute to set up, 3 to measure, and 7 to build llama.cpp where no build or release archive can be used."
	@echo "Ctrl-C is safe; run again to continue."
	@$(MAKE) --no-print-directory engine
	@$(BIN)/moelib study run demo

$(VENV)/.servers: $(VENV)/.ready
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --only-binary :all: -e '.[servers]' 2>/dev/null || \
	  echo "no wheel of xllamacpp for this machine: its tests skip"
	@touch $@

test: engine lint $(VENV)/.servers $(WORKFLOW)/.ready ## the test suite: what is timed alone, all else side by side
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not alone"; others=$$?; \
	  $(BIN)/python -m pytest -m alone && exit $$others

quick: setup ## the fast tests that need no engine: under two minutes
	@MOELIB_LLAMA_CPP=/nowhere $(BIN)/python -m pytest -q -m "not engine and not slow"

faults: engine ## the fault campaign, long form with a new seed, about 10 minutes (ARGS="--seed N" repeats one)
	@$(BIN)/python tests/faults.py --rounds 10 $(ARGS)

forgeries: setup ## the forging campaign: audit 2,000 falsified records of the committed study, about 5 minutes (ARGS="--seed N")
	@$(BIN)/python tests/forgeries.py $(ARGS)

hubfaults: engine ## the fault campaign of publishing: every request fails in every way, about half an hour
	@$(BIN)/python tests/publishing.py $(ARGS)

cluster: $(WORKFLOW)/.ready engine ## the campaign of many machines: a real Slurm of two nodes here (root; apt-get install slurmctld slurmd slurm-client munge), 15 minutes
	@$(BIN)/python tests/many_machines.py $(ARGS)

lint: setup ## ruff, types, and notebooks without outputs
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/nbstripout --verify --extra-keys "metadata.papermill cell.metadata.papermill" notebooks/*.ipynb

docs: setup ## rebuild the document of STUDY from its records alone
	@$(BIN)/moelib report $(STUDY)

validation: setup ## rebuild docs/MOE-TECHNICAL-VALIDATION.md and the other committed studies' documents from their records
	@$(BIN)/moelib report h200 --into docs
	@for study in h100 h100-prompts h100-threads h100-least-vram h200-context h200-cold h100-twins h200-twins two-gpus-alone two-gpus two-gpus-divided two-gpus-lone local-12gib trained demo-shimmy demo-shimmy-generate; do $(BIN)/moelib report $$study || exit 1; done

cards: setup ## rebuild the model cards of the committed studies from their records (NAMESPACE=user on the Hub)
	@$(BIN)/moelib card h200 --namespace $(NAMESPACE)
	@MOELIB_OUTPUTS=docs/example $(BIN)/moelib card demo --namespace $(NAMESPACE)

residuals: engine ## rebuild docs/PLANNER.md, docs/PREVIEW.md, docs/QUALITY.md, docs/FLEET.md and docs/SHARING.md from the committed records behind them
	@$(BIN)/python benchmarks/plan_residuals.py show outputs/planner > docs/PLANNER.md
	@$(BIN)/python benchmarks/preview_residuals.py show outputs/preview > docs/PREVIEW.md
	@$(BIN)/python benchmarks/scoreboard.py outputs/trained outputs/h100-trained > docs/QUALITY.md
	@$(BIN)/python benchmarks/fleet.py > docs/FLEET.md
	@$(BIN)/python benchmarks/sharing.py > docs/SHARING.md

rehearsal: engine ## publish the committed demo study to a Hub on loopback, with an interruption; writes its transcript
	@for model in trained-phimoe trained-deepseek; do for quant in Q4_K_M Q2_K Q8_0; do \
	  $(BIN)/moelib quantize $$model $$quant --real > /dev/null || exit 1; done; done
	@MOELIB_OUTPUTS=docs/example $(BIN)/python tests/rehearsal.py demo docs/example/publication.md

mutation: engine ## mutation testing of the code that decides whether a number is accepted, hours (SAMPLE=N for a part)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[test,mutation]'
	@$(BIN)/python tools/mutation.py --sample $(SAMPLE)

lab: setup ## open JupyterLab at an index of the notebooks (ARGS="--no-browser --port 9999" passes flags on)
	@$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/notebooks/index.ipynb $(ARGS)

layers: setup ## draw moelib's packages and modules on their floors: layers.png, packages.png
	@$(BIN)/python tools/layers.py --out layers.png
	@$(BIN)/python tools/layers.py --packages --out packages.png

doctor: setup ## show what is installed, what is missing, and how to fix it
	@$(BIN)/moelib doctor

scale: setup ## how status, audit and report grow with the number of records, about 15 minutes
	@$(BIN)/python benchmarks/scale.py $(ARGS)

bench: demo ## the benchmarks: ratios within one run
	@$(BIN)/python benchmarks/twin_write.py
	@$(BIN)/python benchmarks/run_overhead.py outputs/$(STUDY)
	@$(BIN)/python benchmarks/overhead.py

runners: engine shimmy ## shimmy against llama-server on one file, in turns: how long an answer takes, a minute
	@$(BIN)/python benchmarks/runners.py

$(VENV)/.training: $(VENV)/.ready
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[test,training]'
	@touch $@

training-data: $(VENV)/.training ## texts, tokenizer and token ids of the small trained models, about 2 minutes
	@$(BIN)/python training/prepare.py

trained: training-data engine ## train both small models, export, check, and write their cards: minutes with a GPU, days without
	@for model in phi deepseek; do for step in train export check card; do \
	  $(BIN)/python training/$$step.py $$model || exit 1; done; done

clean: ## remove the environment, models and the demo's products
	rm -rf $(VENV) models outputs/demo
