# Both targets create .venv and install what they need by themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test
train: .venv/train
	$(BIN)/python -m kd.train recipe=resnet50_to_18

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov

# A stamp for each extra: pip runs again only when pyproject.toml changes.
.venv/train .venv/test: .venv/%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
