# Each target is a thin alias of one command. `make demo` and `make test` set up their own .venv when needed.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
WORKERS := -n auto --maxprocesses 4 --dist loadfile

.PHONY: setup demo smoke tables status docs test test-all bench bench-solvers bench-metrics lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found. Install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/evodiff table demo

smoke: $(READY)
	$(BIN)/evodiff table smoke

table-%: $(READY)
	$(BIN)/evodiff table $*

# one that fails does not keep the others from being made
tables: $(READY)
	@$(MAKE) --no-print-directory --keep-going $(patsubst configs/table/%.yaml,table-%,$(wildcard configs/table/*.yaml))

status: $(READY)
	$(BIN)/evodiff status

test: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest $(WORKERS)

docs: $(READY)
	$(BIN)/python scripts/figures_method.py
	$(BIN)/evodiff docs solvers
	$(BIN)/python scripts/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python scripts/bench.py $(if $(OFFICIAL),--official $(OFFICIAL))

bench-solvers: $(READY)
	$(BIN)/python scripts/bench_solvers.py $(if $(OFFICIAL),--official $(OFFICIAL))

bench-metrics: $(READY)
	$(BIN)/python scripts/bench_metrics.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# sampled images stay: results/runs may hold days of work
clean:
	rm -rf .venv results/tables/demo results/tables/smoke
