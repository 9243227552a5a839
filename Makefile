# Every target makes its own environment and installs what it needs, in the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-latest torture lock
train: .venv/train
	$(BIN)/python -m kd.train recipe=resnet50_to_18

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov

# The same tests with the newest release of everything but the tools that judge the code.
test-latest:
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade --editable '.[test]'
	KD_LATEST=1 .venv-latest/bin/python -m pytest -n 2 --dist worksteal

# Kills, full disks, flipped bits, hostile files, fuzzed recipes and slow tests: about 20 minutes on 2 cores.
# With KD_SEED=1 other kills, bytes and recipes are tried.
torture: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m torture --timeout=1800

# Refresh constraints.txt. CUDA's packages are left out: torch pins its own, and other builds of torch need others.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet --upgrade pip hatchling editables
	.venv-lock/bin/python -m pip install --quiet --editable '.[test]'
	.venv-lock/bin/python -m pip freeze --all --exclude-editable | grep -v -E '^(nvidia|cuda)-' | sed 's/+.*//' > constraints.txt
	rm -r .venv-lock

# One stamp for each extra: pip runs again when the versions change.
.venv/train .venv/test: .venv/%: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv; PyTorch is large, this takes a minute or more"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable '.[$*]'
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
