# Two commands for newcomers: `make quickstart` and `make test`. Both make .venv and install what they need.
# `make test-floors` and `make test-newest` test the oldest and the newest versions that pyproject.toml allows, each in a venv of its own.
PYTHON ?= python3
VENV ?= .venv
DATA ?= data/quickstart
RUN ?= runs/quickstart
# What the quickstart's prompts say of a film beside its title and genres.
FACTS = {item_ctr}; {affinity}
# The versions that the suite was last run with (constraints/README.md). CONSTRAINTS= installs the newest.
CONSTRAINTS ?= constraints.txt
PYTEST ?= -n auto
PIP = $(VENV)/bin/python -m pip
PINNED = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS),--upgrade --upgrade-strategy eager)
TORCH_CPU = https://download.pytorch.org/whl/cpu

.PHONY: quickstart test check install test-floors test-newest clean

quickstart: install
	@case "$$($(VENV)/bin/python -c 'from dti_model.data import PreparedData; print((PreparedData.open("$(DATA)").context_rule or {}).get("text"))' 2>/dev/null)" in \
	  "$(FACTS)") ;; \
	  "") $(VENV)/bin/dti prepare ml-100k --out $(DATA) --context-text "$(FACTS)" ;; \
	  *) echo "$(DATA) does not say $(FACTS) of every film, which this quickstart reads: delete it, or name another folder: make quickstart DATA=data/another" >&2; exit 1 ;; \
	esac
	@if test -f $(RUN)/metrics.json; then \
	  echo "$(RUN) holds a finished run: delete it, or name another folder: make quickstart RUN=runs/another"; \
	else \
	  $(VENV)/bin/dti train --data $(DATA) --out $(RUN) --config configs/quickstart.yaml && \
	  echo "$(RUN): model/, predictions (Parquet), metrics.json, report.png"; \
	fi

test: install
	$(VENV)/bin/python -m pytest $(PYTEST)

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test-floors:
	$(MAKE) test VENV=.venv-floors CONSTRAINTS=constraints/floors.txt

test-newest:
	rm -f .venv-newest/installed
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.13" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(install_torch)
	$(PIP) install --quiet $(PINNED) --editable '.[test]'
	touch $@

# Without an NVIDIA GPU, PyTorch's index of CPU builds is asked for torch first: the ordinary index has the CUDA build, gigabytes
# more. The ordinary index is the fallback where that one cannot be reached, and serves where there is a GPU. A torch of this version that is
# in the environment already, such as a ROCm build, stays.
define install_torch
if nvidia-smi --list-gpus >/dev/null 2>&1; then \
  echo "torch: the build for NVIDIA GPUs, from the ordinary index"; \
elif $(PIP) install --quiet $(PINNED) --no-deps --index-url $(TORCH_CPU) --timeout 10 --retries 0 torch 2>/dev/null; then \
  echo "torch: the CPU build"; \
else \
  echo "torch: $(TORCH_CPU) has none or cannot be reached, so the ordinary index is asked, whose build may bring gigabytes of CUDA"; \
fi
endef

clean:
	rm -rf $(VENV) .venv-floors .venv-newest data runs
