# make setup | demo | test | docs | readme | clean: each does its own set-up, once, into .venv
PYTHON  ?= $(shell for p in python3 python3.12 python3.11 python3.10; do $$p tools/check_python.py 2>/dev/null && echo $$p && break; done)
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.ready
CORES   := $(shell getconf _NPROCESSORS_ONLN)
WORKERS ?= $(shell n=$(CORES); echo $$((n<8 ? n : 8)))
OUT     ?= demo_out
ACTIVE  := PATH="$(CURDIR)/$(BIN):$$PATH"
PIP     := $(BIN)/python -m pip -qq --disable-pip-version-check

.PHONY: setup demo test docs readme clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): constraints.txt settings.ini setup.py
	@$(or $(PYTHON),python3) tools/check_python.py
	@{ $(BIN)/python tools/check_python.py && $(BIN)/python -m pip --version; } >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Filling $(VENV), $$($(BIN)/python --version): torch ..."
	@$(PIP) install -c constraints.txt torch
	@echo "... and the other $$(grep -c == constraints.txt) packages ..."
	@$(PIP) install --no-deps -r constraints.txt
	@$(PIP) install --no-deps --no-build-isolation --use-pep517 -e .
	@touch $@
	@echo "$(VENV) is ready."

demo: $(STAMP)
	$(BIN)/lipsync_demo --out $(OUT)

# The sample that many chapters use; then one thread for each notebook, as many notebooks at a time as there are cores; then, in the same way, the files of tests/.
test: $(STAMP)
	$(ACTIVE) LIPSYNC_QUIET=1 python -m lipsync_nb.sample
	$(ACTIVE) OMP_NUM_THREADS=1 nbdev_test --n_workers $(WORKERS) --timing
	$(ACTIVE) OMP_NUM_THREADS=1 python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

readme: $(STAMP)
	$(BIN)/python tools/readme.py

docs: $(STAMP)
	@command -v quarto >/dev/null || { echo "The docs need Quarto on PATH: get it with \`$(BIN)/nbdev_install_quarto\` or from quarto.org."; exit 1; }
	$(BIN)/python tools/readme.py
	$(ACTIVE) nbdev_docs

clean:
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .hypothesis demo_out
	find lipsync_nb nbs tests tools -name __pycache__ -prune -exec rm -rf {} +
