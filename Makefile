# make demo   set up, then distil handwritten digits with four networks on Ray (ARGS="--steps 20" passes flags)
# make test   set up, then run the quick tests          (ARGS="-k posterior" passes flags to pytest; WORKERS=8)
# make test-full  set up, then run all tests, the quick ones and the rest (make test-rest), and report the coverage
# make lint   set up, then ruff and pyright
# make docs   set up, install the documentation tools, then write the site of docs/ to site/; warnings are errors
# make bench  set up, then time an outer step         (ARGS="--data parquet:PATH"; DEVICE=cuda; --peer CHECKOUT in ARGS)
# make browser  install what the browser tests need and are skipped without: Debian's package chromium, by apt-get
# make setup  only the environment, in .venv
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-rest test-full lint docs bench browser clean
setup: .venv/ready

# uv installs everything in half a minute; plain pip, which takes a few, stands in where uv can't be had.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fbpc-ray needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet uv || echo "no uv here: using pip"
	@if [ -x $(BIN)/uv ]; then \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; \
	else \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $@
	@echo "ready: . .venv/bin/activate && fbpc doctor"

demo: setup
	$(BIN)/python jobs/distill_multi.py $(ARGS)

# Two tiers of tests, each test in one of them: the quick one, and what is slow or starts a Ray cluster. loadfile: the
# tests of a file share fixtures, so one worker runs them all; the files come in the order of tests/support/tiers.py.
QUICK := "not slow and not ray and not gpu"
REST := "(slow or ray) and not gpu"
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) -m $(QUICK) $(COVERAGE) $(ARGS)

test-rest: setup
	$(PYTEST) -m $(REST) $(COVERAGE) $(ARGS)

# Coverage counts the lines that run in pytest's own processes, not those in Ray's workers and other children.
test-full: setup
	$(BIN)/coverage erase
	$(MAKE) test COVERAGE="--cov --cov-report="
	$(MAKE) test-rest COVERAGE="--cov --cov-append --cov-report=term"

DEVICE ?= cpu
bench: setup
	$(BIN)/python jobs/benchmark.py --device $(DEVICE) $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# mkdocs-material announces its successor at every start, unless NO_MKDOCS_2_WARNING is set.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/ready
	@if [ -x $(BIN)/uv ]; then \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[docs]'; \
	else \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'; \
	fi
	@touch $@

browser:
	@if command -v chromium; then :; \
	elif ! command -v apt-get > /dev/null; then \
	  echo "no apt-get here: install Chromium so that 'chromium' is on the PATH; the browser tests are skipped without it"; \
	  exit 1; \
	else \
	  echo "installing the package chromium and the libraries it needs (apt-get, some hundred megabytes)"; \
	  $$(test "$$(id -u)" = 0 || echo sudo) apt-get -qq update && \
	  $$(test "$$(id -u)" = 0 || echo sudo) env DEBIAN_FRONTEND=noninteractive \
	    apt-get -qq install --yes --no-install-recommends chromium > /dev/null && command -v chromium; \
	fi

clean:
	rm -rf .venv .pytest_cache .ruff_cache .coverage *.egg-info site
