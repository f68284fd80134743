# `make` alone lists the targets. The set-up itself is .ci/setup.sh.
.DEFAULT_GOAL := help
.PHONY: help setup demo check test lint bench gpu-check soak clean
PY := .venv/bin/python

help:
	@echo 'Small neural networks that are robust to adversarial examples.'
	@echo
	@echo '  make demo    a robust network on real images, pruned to 10 % and 1 % of its connections; the chart; small files'
	@echo '  make check   after every change: lint, and types and quick unit tests of what changed'
	@echo '  make test    every test'
	@echo '  make lint    ruff (lint and format), import contracts, spelling, white space; basedpyright (types)'
	@echo '  make bench   measurements as ratios, into docs/benchmarks/: about 30 minutes, on a quiet machine'
	@echo '  make gpu-check  whether one GPU computes as it should, and how fast, into docs/benchmarks/: 8 minutes'
	@echo '  make soak    50 random faults on one run, on a real SLURM on this machine: about an hour'
	@echo '  make setup   system packages (apt, as root or with sudo), and .venv with this project in it'
	@echo '  make clean   remove .venv and caches; runs/ and data/ stay'
	@echo
	@echo 'Each of them sets up first: about 10 minutes once, no time after that. The newest of Python 3.13, 3.12 and 3.11 that'
	@echo 'is installed is used; `make setup PYTHON=python3.12` chooses another.'
	@echo
	@echo 'After that:'
	@echo '  .venv/bin/hydra-pipeline --help                                         all commands, from any folder'
	@echo '  .venv/bin/hydra-pipeline run recipes/fashion_mnist.yaml seed=1          one recipe, one value changed'
	@echo '  .venv/bin/python -m pytest tests/unit                                   some of the tests'

setup:
	@.ci/setup.sh

# A second call has the data and the finished run, draws the report and exports again; an interrupted run resumes.
demo: setup
	$(PY) -m launch data write fashion_mnist --out data/fashion_mnist
	$(PY) -m launch run recipes/fashion_mnist.yaml --name demo
	$(PY) -m launch report runs/demo
	@echo 'The network with 1 % of its connections as files for other programs, and its int8 file under attack:'
	$(PY) -m launch export demo --keep 0.01 --attack reduced --images 200
	@echo 'The charts, and the page:' && ls runs/demo/report/*.png runs/demo/report/*.html

check: setup
	$(PY) -m tests.check

test: setup
	$(PY) -m tests.run_all

lint: setup
	$(PY) -m pre_commit run --all-files
	$(PY) -m basedpyright

bench: setup
	$(PY) -m launch data write fashion_mnist --out data/fashion_mnist
	$(PY) -m tests.bench.loader_start
	$(PY) -m tests.bench.loader
	$(PY) -m tests.bench.step
	$(PY) -m tests.bench.memory
	$(PY) -m tests.bench.checkpoints
	$(PY) -m tests.bench.sizes
	$(PY) -m tests.bench.workers
	$(PY) -m tests.bench.evaluation

gpu-check: setup
	$(PY) -m tests.bench.gpu_check

soak: setup
	$(PY) -m launch data write fashion_mnist --out data/fashion_mnist
	$(PY) -m tests.slurm.soak data/fashion_mnist --faults 50 --seed 1

clean:
	rm -rf .venv .ruff_cache .import_linter_cache .hypothesis .pytest_cache
	find . -name __pycache__ -not -path './data/*' -not -path './runs/*' -prune -exec rm -rf {} +
	@echo 'data/ and runs/ are kept.'
