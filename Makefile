# `make demo` and `make test` work on a fresh machine with Python 3.11 or later and nothing else of ours.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
USERS := .venv/.for-users

.PHONY: demo check quick test machines docs bench format clean

demo: $(USERS)  ## train on the built-in scenes and write runs/demo/report.html
	$(BIN)/dino train demo --out runs/demo --overwrite

check: $(STAMP)  ## format, lint, import layers, types, line budget: no tests, seconds
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python tools/count_lines.py

quick: $(STAMP)  ## the tests that take no time and start no process: under a minute on two cores
	$(BIN)/pytest -n auto --dist worksteal --quick

test: check  ## every check, then every test
	$(BIN)/pytest -n auto --dist worksteal

machines: $(STAMP)  ## Slurm, torchrun over several machines, killed ones and pulled cables: half an hour
	[ "$$(id -u)" != 0 ] || tests/slurm/cluster.sh install
	$(BIN)/pytest --machines -m machines

BENCH_DATA ?=
BENCH := $(BIN)/python benchmarks

SHORT := benchmarks/results/short

bench: $(STAMP)  ## every benchmark, short; BENCH_DATA=folder for real JPEGs; JSON in benchmarks/results/short/
	$(BENCH)/views.py --num 32 --pairs 3 --json $(SHORT)/views.json $(if $(BENCH_DATA),--images "$(BENCH_DATA)")
	$(BENCH)/step.py --batch 2 --pairs 3 --json $(SHORT)/step.json
	$(BENCH)/memory.py --json $(SHORT)/memory.json
	$(BENCH)/knn.py --bank 50000 --queries 2000 --pairs 3 --json $(SHORT)/knn.json
	$(BENCH)/davis.py --pairs 3 --json $(SHORT)/davis.json
	$(BENCH)/search.py --rows 100000 --pairs 10 --json $(SHORT)/search.json
	$(if $(BENCH_DATA),$(BENCH)/features.py --images "$(BENCH_DATA)" --num 32 --pairs 3 --json $(SHORT)/features.json)
	! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || $(BENCH)/gpu.py $(if $(BENCH_DATA),--images "$(BENCH_DATA)")

docs: $(STAMP)  ## the documentation as pages to open in a browser: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open build/site/index.html in a browser. The search needs a server: $(BIN)/python -m http.server -d build/site"

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What a user needs, for the demo, and what a developer needs beside it. PyTorch from the package index brings CUDA along, 5 GB
# of it, on Linux; with PIP_INDEX_URL and PIP_EXTRA_INDEX_URL pip takes the CPU build that pytorch.org/get-started names.
$(USERS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dino needs Python 3.11 or later; set PYTHON=...")'
	@echo "Installing PyTorch and what else dino needs into .venv: once, some minutes, up to 8 GB."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@bash -o pipefail -c "$(BIN)/python -m pip install --editable . | \
		grep --line-buffered -oE '^(Collecting [A-Za-z0-9_-]+|Installing collected packages|Successfully installed)'"
	@touch $(USERS)

$(STAMP): $(USERS)
	@echo "Installing what the tests need, too."
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv
