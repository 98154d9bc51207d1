# bhx: everything runs in .venv/, which is made at the first call and brought up to date whenever
# pyproject.toml changes. Nothing is installed outside it.
#
#   make test PYTHON=python3.12     another interpreter (3.11 to 3.13)
#   make demo EXTRAS=notebooks      fewer packages; the tests of the missing ones are skipped
#   make demo TORCH_FROM="--index-url ADDRESS"
#       Without a GPU, TORCH is one fixed release. On Linux the plain package index serves it with
#       gigabytes of CUDA: give the address of PyTorch's own CPU index (pytorch.org, Get Started)
#       or `--find-links FOLDER` with a wheel of the CPU build. pip's own configuration serves too.

PYTHON ?= python3
EXTRAS ?= notebooks,test
JOBS ?= 2
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch==2.13.0
else
TORCH ?= torch>=2.13,<3
endif
TORCH_FROM ?=
VOILA ?=

PY := .venv/bin/python
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# several processes share the cores, so each keeps to one thread
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1
# figures as plotly's JSON alone, so that stored and fresh outputs can be compared
IN_NOTEBOOKS := $(ONE_THREAD) PLOTLY_RENDERER=plotly_mimetype

.PHONY: help env demo doctor test lint unit nbval nbmake lab voila book brainmarks bench weights assets notebooks clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

env: .venv/.made  ## the environment in .venv/

.venv/.made: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo 'bhx needs Python 3.11 to 3.13: make env PYTHON=python3.12, say'; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -qq '$(TORCH)' $(TORCH_FROM)
	$(PY) -m pip install -qq --editable '.[$(EXTRAS)]'
	touch $@

demo: env  ## scans to tokens, scores and one page of figures, in demo/
	$(PY) -m bhx demo

test: lint unit nbval  ## style, types, layout, unit tests, notebooks with their outputs compared

doctor: env  ## what this machine has, and what is missing
	$(PY) -m bhx doctor

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_layout.py

unit: env
	$(ONE_THREAD) $(PY) -m pytest -q -n $(JOBS) --dist loadscope -m "not browser" \
		--ignore=tests/test_layout.py
	$(PY) -m pytest -q -m browser  # alone: a click must not wait for another test's processor

nbval: env
	$(IN_NOTEBOOKS) $(PY) -m pytest -q -n $(JOBS) --dist loadscope -p no:cacheprovider \
		--nbval --nbval-current-env --nbval-sanitize-with notebooks/nbval_sanitize.cfg \
		$(NOTEBOOKS)

nbmake: env  ## notebooks once more, by another runner: do they end without an error
	$(IN_NOTEBOOKS) $(PY) -m pytest -q -n $(JOBS) -p no:cacheprovider --nbmake $(NOTEBOOKS)

lab: env  ## JupyterLab on the notebooks
	$(PY) -m jupyter lab notebooks

voila: env  ## the explorer as a page without code, for a public lecture
	$(PY) -m voila notebooks/voila/explorer.ipynb $(VOILA)

book: env  ## the lessons and the public names as a site, in build/book/html; its links are checked
	$(PY) -m pip install -qq --editable '.[$(EXTRAS),book]'
	$(ONE_THREAD) $(PY) notebooks/book/build.py build/book
	BHX_BOOK=build/book/html $(PY) -m pytest -q tests/test_book.py

brainmarks: env  ## the Brainmarks suite's own smoke test, with bhx as its plugin
	$(PY) -m pip install -qq --editable '.[$(EXTRAS),brainmarks]'
	$(PY) -m pip install -qq --no-deps brainmarks==0.1.1
	$(PY) -m brainmarks.models.test_models bhx

bench: env  ## every benchmark of speed, small, to one table beside the last kept one
	$(ONE_THREAD) $(PY) benchmarks/bench.py

weights: env  ## train the shipped workshop weights again
	$(PY) scripts/make_weights.py

assets: env  ## build bhx/assets again from the brainspace package
	$(PY) -m pip install -qq --editable '.[$(EXTRAS),assets]'
	$(PY) scripts/make_assets.py

notebooks: env  ## execute every notebook in place, renew its figure references, strip the rest
	BHX_UPDATE_FIGURES=1 $(IN_NOTEBOOKS) $(PY) -m jupyter nbconvert --config notebooks/nbconvert_config.py \
		--to notebook --inplace --execute $(NOTEBOOKS)

clean:  ## remove what the targets above wrote, except .venv/
	rm -rf demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .screenshots
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-prune -exec rm -rf {} +
