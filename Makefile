# Every target makes .venv first when it is missing or older than the pinned versions.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# A path to real recordings for `make demo`; empty = synthesise a small corpus.
DATA ?=
OUT ?= demo
FOLDERS ?= 20

.PHONY: demo test slow soak check bench format clean
demo: $(VENV)/.ready
	$(BIN)/kymo demo --out $(OUT) $(if $(DATA),--data $(DATA))

# Two at a time, a file of tests never parted.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes more than half a minute each: the demo, clusters, workers that are killed.
slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

# What takes many minutes: five kills at random moments of a conversion into each of so many folders.
soak: $(VENV)/.ready
	KYMO_SOAK_FOLDERS=$(FOLDERS) $(BIN)/python -m pytest -m soak -s

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/signal_path.py --memory
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/adapt.py

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(OUT)

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
