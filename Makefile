# The two commands of the README, and what they are made of. Each sets up whatever is missing first.
PYTHON ?= python3
# A lane other than this machine's own, in an environment of its own: `make test LANE=k80`. Without a GPU its Horovod
# is built for CPU cores.
LANE ?=
VENV ?= .venv$(addprefix -,$(LANE))
DATA ?= quickstart/data
RUNS ?= quickstart/runs
MINUTES ?= 30
TOGETHER ?= 2
CELLS ?=
# not `abspath`, which splits a path at its blanks
IN_VENV = PATH="$(if $(filter /%,$(firstword $(VENV))),,$(CURDIR)/)$(VENV)/bin:$$PATH"

.PHONY: setup quickstart test test-all rehearse-gpu test-gpu test-machines accuracy soak lint docs clean

setup:
	@$(if $(LANE),nvidia-smi -L > /dev/null 2>&1 || export HOROVOD_WITHOUT_CUDA=1;) \
	$(PYTHON) launch/setup --venv "$(VENV)" $(addprefix --lane ,$(LANE))

quickstart: setup
	@$(IN_VENV) python launch/quickstart "$(DATA)" "$(RUNS)"

# First what may run side by side, a real job among it or two; then what measures time. Without slow tests: many seconds,
# or what another test shows under another launcher.
test: setup
	@$(IN_VENV) pytest -n $(TOGETHER) --dist loadfile --no-loadscope-reorder -m "not alone and not slow"
	@$(IN_VENV) pytest -m "alone and not slow"

test-all: test
	@$(IN_VENV) pytest -n $(TOGETHER) --dist loadfile --no-loadscope-reorder -m slow

# The CUDA lane's Horovod and its NCCL code on pretended GPUs; builds it first, some ten minutes on two cores. Without a
# CUDA 13 toolkit, on this machine or from pip, it says so and succeeds.
rehearse-gpu: setup
	@$(IN_VENV) python tests/pretended_gpus/build.py; code=$$?; \
	if [ $$code = 2 ]; then exit 0; elif [ $$code != 0 ]; then exit $$code; fi; \
	$(IN_VENV) OWT_REHEARSE_GPU=1 pytest tests/pretended_gpus

# On a machine with a GPU, some 13 minutes: what it computes, then how fast; reports in build/gpu-report
test-gpu: setup
	@$(IN_VENV) OWT_GPU_REPORT=build/gpu-report/correctness pytest tests/gpu/test_gpu_correctness.py
	@$(IN_VENV) OWT_GPU_REPORT=build/gpu-report/speed pytest tests/gpu/test_gpu_speed.py

# needs no setup, but root and debootstrap: CELLS="debian-13 no-cmake"; `python3 tests/machines --list`
test-machines:
	@$(PYTHON) tests/machines $(CELLS)

# Trains small nets in every way, three seeds each, and writes the table in docs/accuracy.md. Begins none after MINUTES;
# what is done is kept in build/accuracy, and the next call continues.
accuracy: setup
	@$(IN_VENV) python -c "import sklearn" 2>/dev/null || $(IN_VENV) pip install -q -c launch/constraints/cpu.txt scikit-learn
	@$(IN_VENV) python tests/accuracy --minutes $(MINUTES)

soak: setup
	@$(IN_VENV) python tests/soak.py --minutes $(MINUTES)

lint: setup
	@$(IN_VENV) ruff check
	@$(IN_VENV) ruff format --check

docs: setup
	@$(IN_VENV) sphinx-build -W -E -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

clean:
	rm -rf quickstart docs/_build build .pytest_cache .ruff_cache .hypothesis *.egg-info
