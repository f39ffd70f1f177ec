# Two commands: `make demo` runs the whole chain on real data, `make test` runs the tests. Both install what they need in .venv.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
export JAX_COMPILATION_CACHE_DIR ?= $(HOME)/.cache/beitv2_jax/xla

.PHONY: demo demo-full test test-parity test-all browser docs notebooks release lint clean
demo: $(VENV)/ready
	$(VENV)/bin/python -m beitv2_jax demo $(ARGS)

demo-full: $(VENV)/ready
	$(VENV)/bin/python -m beitv2_jax demo --full $(ARGS)

test: $(VENV)/ready
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -m "not parity and not slow" $(ARGS)

# Against torch, timm and Hugging Face, which come into the same environment; torch stays out of everything else.
test-parity: $(VENV)/ready-parity
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -m parity $(ARGS)

# A Chromium for the tests of pages, which are skipped without one. Debian's or Ubuntu's package; elsewhere install one by hand.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$name && exit 0; done; \
	apt-get update -q && apt-get install -q -y --no-install-recommends chromium

# Also what is slow and rarely tells anything that the others do not.
test-all: $(VENV)/ready-parity
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -m "" $(ARGS)

# The documentation site, in build/docs; warnings are errors.
docs: $(VENV)/ready-docs
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs build/docs && echo build/docs/index.html

# notebooks/NAME.ipynb and its text NAME.py, made equal again: the newer one counts.
notebooks: $(VENV)/ready-docs
	$(VENV)/bin/jupytext --quiet --sync notebooks/*.py

# What a tag releases, in dist/: built, checked, and tried in a clean environment and folder. The version is beitv2_jax/__init__.py's.
release: $(VENV)/ready
	$(PIP) twine
	rm -rf dist build/clean && $(VENV)/bin/python -m build --outdir dist && $(VENV)/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/clean && build/clean/bin/python -m pip install --quiet $(LOCK) dist/*.whl
	cd build/clean && bin/python -m beitv2_jax --version && \
	  JAX_PLATFORMS=cpu bin/python -m beitv2_jax.main --config=configs/vqkd_b16.py:smoke --workdir=run && \
	  bin/python -m beitv2_jax report run --out report.html

# Style, and types.
lint: $(VENV)/ready
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/ty check --python $(VENV)

# The lock makes the environment the one that was tested; LOCK= takes the newest of the ranges instead.
LOCK ?= -c requirements.lock
$(VENV)/ready: requirements.txt requirements.lock setup.cfg
	@echo "making the environment in $(VENV) (about 1.5 GB, one to four minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; set PYTHON=python3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(LOCK) -e '.[test]'
	touch $@

$(VENV)/ready-parity: $(VENV)/ready
	$(PIP) $(LOCK) -e '.[test,parity,docs]'
	touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(PIP) $(LOCK) -e '.[test,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
