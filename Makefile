# Both targets create .venv and install what they need by themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test torture
train: .venv/train
	$(BIN)/python -m kd.train recipe=resnet50_to_18

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov

# Promises tried hard, with the counts: under an hour on 2 cores; the same command goes on where it was stopped.
torture: .venv/test
	$(BIN)/python -m tests.torture

# A stamp for each extra: pip runs again only when pyproject.toml changes.
.venv/train .venv/test: .venv/%: pyproject.toml | .venv/bin/python
	@echo "installing into .venv; PyTorch is large, this takes a minute or more"
	@$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
