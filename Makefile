# Every target makes what it needs first. Python 3.11 or newer, make and access to PyPI are enough.
SHELL := /bin/sh
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup model demo test crash check lock upgrade bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup:
	@./tools/setup.sh

model: setup
	@$(BIN)/motorpool models pull smollm2-135m-instruct --quiet-if-present
	@$(BIN)/motorpool models pull all-minilm-l6-v2 --quiet-if-present

demo: setup ## Run a batch of real documents on three parked vehicles, one of which drives off
	@$(BIN)/motorpool demo

test: setup model ## Run the tests
	@$(BIN)/python -m pytest

crash: setup ## Kill every kind of process at random moments, 200 seeded runs
	@MOTORPOOL_CRASH_RUNS=$${MOTORPOOL_CRASH_RUNS:-200} $(BIN)/python -m pytest tests/test_crash.py -s

check: setup ## Lint, types, imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --config pyproject.toml

COMPILE = $(BIN)/uv pip compile pyproject.toml --universal --generate-hashes --python-version 3.11 --all-extras --no-emit-index-url --no-annotate --custom-compile-command "make lock" -q -o requirements/dev.lock

lock: ## Lock what pyproject.toml asks for; versions that still fit stay
	@$(COMPILE)

upgrade: ## The same with the newest versions of everything
	@$(COMPILE) --upgrade

clean: ## Remove what make made
	@rm -rf .venv demo-output bench/.envs bench/.work

.PHONY: bench-batch bench-gateway bench-growth bench-lock
bench: bench-batch bench-gateway bench-growth ## Measure against peers (makes their environments first, 1.3 GB)

bench-batch: setup ## Batch throughput and memory beside Ray, Dask, Celery, procrastinate
	@$(BIN)/python -m bench.run_batch $(BENCH_FLAGS)
	@$(BIN)/python -m bench.report --markdown
	@$(BIN)/python -m bench.summary

bench-gateway: setup ## Gateway overhead beside LiteLLM and vllm-router
	@$(BIN)/python -m bench.run_gateway $(BENCH_FLAGS)
	@$(BIN)/python -m bench.report --markdown
	@$(BIN)/python -m bench.summary

bench-growth: setup ## How both grow with lines and vehicles
	@$(BIN)/python -m bench.run_growth $(BENCH_FLAGS)
	@$(BIN)/python -m bench.report --markdown
	@$(BIN)/python -m bench.summary

bench-lock: setup ## Renew the locked versions of the peers
	@$(BIN)/python -m bench.env --lock

.PHONY: bench-yield
bench-yield: setup model ## From the owner's hand to an engine that computes no more
	@$(BIN)/python -m bench.run_yield $(BENCH_FLAGS)
	@$(BIN)/python -m bench.report --markdown
	@$(BIN)/python -m bench.summary

.PHONY: bench-agent
bench-agent: setup ## What the agent itself takes while its car may not work
	@$(BIN)/python -m bench.run_agent $(BENCH_FLAGS)
	@$(BIN)/python -m bench.report --markdown
	@$(BIN)/python -m bench.summary

.PHONY: bench-cell bench-streams
bench-cell: setup ## What the scheduler harvests, wastes and promises, beside other policies and the best possible
	@$(BIN)/python -m bench.run_cell $(BENCH_FLAGS)
	@$(BIN)/python -m bench.report --markdown
	@$(BIN)/python -m bench.summary

bench-streams: setup model ## Streams while their vehicles are killed, frozen, cut off and driven away
	@$(BIN)/python -m bench.run_streams $(BENCH_FLAGS)
	@$(BIN)/python -m bench.report --markdown
	@$(BIN)/python -m bench.summary

.PHONY: check-deep wear-table departures-check
check-deep: setup model ## Ten thousand examples of each invariant, 20,000 worlds of faults, every fault at every step (hours)
	@MOTORPOOL_EXAMPLES=10000 $(BIN)/python -m pytest tests/test_invariants.py tests/test_invariant_*.py tests/test_trust_*.py -p no:cacheprovider
	@MOTORPOOL_SEEDS=20000 $(BIN)/python -m pytest tests/test_sim_faults.py -p no:cacheprovider
	@MOTORPOOL_CHAOS=200 $(BIN)/python -m pytest tests/test_stream_chaos.py -s -p no:cacheprovider
	@MOTORPOOL_SWEEP=all $(BIN)/python -m pytest tests/test_fault_sweep.py -s

wear-table: setup ## Run the battery models again and write the wear table
	@$(BIN)/python tools/wear_table.py

departures-check: setup ## How well the forecast does on recorded sessions: make departures-check SESSIONS=FILE
	@$(BIN)/python tools/departures_check.py --sessions $(SESSIONS)

.PHONY: owner-year
owner-year: setup ## A year of an owner with and without Motorpool, and its picture: make owner-year SESSIONS=FOLDER
	@$(BIN)/motorpool sim year --sessions $(SESSIONS)
