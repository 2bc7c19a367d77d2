PYTHON ?= python3
BIN := .venv/bin

demo: .venv/ready  ## meta-train, personalize, sample and score with the toy model, offline; results in out/demo
	$(BIN)/python tiny/demo.py --out out/demo

test: .venv/ready-dev  ## parity with independent implementations, and everything else
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo test
