# Two commands for newcomers: `make quickstart` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
DATA ?= data/ml-100k
RUN ?= runs/quickstart
DTI := $(VENV)/bin/dti

.PHONY: quickstart test check install clean

quickstart: install
	test -f $(DATA)/stats.json || $(DTI) prepare ml-100k --out $(DATA)
	$(DTI) train --data $(DATA) --out $(RUN) --config configs/quickstart.yaml

test: install
	$(VENV)/bin/python -m pytest -n auto

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(VENV)/installed

# Where there is no NVIDIA GPU, the small CPU build of torch is asked for first: a plain `torch` brings gigabytes of CUDA.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null 2>&1 || $(VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) data runs
