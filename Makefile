# make train   install into .venv and run the embedded world
# make test    install into .venv (and, on Linux, `make sglang`) and run lint, types and tests
# make sglang  SGLang, the rollout server, in an environment of its own: .venv-sglang, kept in a cache for other checkouts
# make kernel-report   compile the kernels for Hopper, without a GPU, and write docs/kernel_report.md
# make bench   the loss benchmark on this machine
# make gpu-check PYTHON=python3   in an environment of your own with a GPU, into which nothing is installed: the parts
#              gpu-tests, gpu-run (MEL for five minutes), gpu-curves, gpu-loss and gpu-step, each of them in ten minutes
# make gpu-wheels   what such an environment may lack, as wheels in build/wheels; the parts of gpu-check find them there

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Without an NVIDIA GPU: the version that the tests run with. README.md says how to get its CPU build.
TORCH ?= $(shell command -v nvidia-smi > /dev/null 2>&1 && echo torch || echo torch==2.13.0)

# The server on a CPU runs on Linux; elsewhere its tests skip.
SERVERS = $(if $(filter Linux,$(shell uname)),sglang)
SGLANG = .venv-sglang
SGLANG_VERSION = 0.5.23
SGLANG_PINS = mel_fast/rollout/sglang/requirements-cpu.txt
SGLANG_CACHE ?= $(or $(MEL_FAST_CACHE),$(HOME)/.cache/mel_fast)/sglang-$(SGLANG_VERSION)-$(shell cksum < $(SGLANG_PINS) | cut -d' ' -f1)

.PHONY: train test sglang bench kernel-report clean gpu-check gpu-wheels gpu-site gpu-tests gpu-run gpu-curves gpu-loss gpu-step

train: $(BIN)/.installed
	$(BIN)/torchrun -m mel_fast.train $(ARGS)

test: $(BIN)/.installed-dev $(SERVERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

kernel-report: $(BIN)/.installed-dev
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/kernel_report.py --out docs/kernel_report.md

# The environment's python with the checkout, and with what build/wheels has, unpacked into build/site.
ALONE = PYTHONPATH=.:kernels:build/site $(PYTHON)
PYTEST = $(ALONE) -m pytest -p no:cacheprovider
GPU_PYTHON ?= 3.12

gpu-check: gpu-tests gpu-run gpu-curves gpu-loss gpu-step

gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --dest build/wheels --python-version $(GPU_PYTHON) \
		--implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--requirement tests/gpu/wheels.txt

gpu-site:
	if ls build/wheels/*.whl > /dev/null 2>&1; then $(PYTHON) -m pip install --quiet --no-index --no-deps \
		--no-compile --upgrade --target build/site build/wheels/*.whl; fi

gpu-tests: gpu-site
	$(PYTEST) --confcutdir=tests/gpu --continue-on-collection-errors -m gpu tests/kernels tests/gpu

gpu-run: gpu-site
	$(ALONE) -m benchmarks.mel_run $(RUN_ARGS)

gpu-curves: gpu-site
	$(ALONE) -m benchmarks.curves $(CURVES_ARGS)

gpu-loss: gpu-site
	$(ALONE) -m benchmarks.loss --budget-seconds $(or $(BUDGET),420) $(ARGS)

gpu-step: gpu-site
	$(ALONE) -m benchmarks.train_step --budget-seconds $(or $(BUDGET),480) $(STEP_ARGS)

bench: $(BIN)/.installed-dev
	$(BIN)/python -m benchmarks.loss $(ARGS)

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

sglang: $(SGLANG_CACHE)/.installed
	test -d $(SGLANG) && ! test -L $(SGLANG) || ln -sfn $(SGLANG_CACHE) $(SGLANG)

$(SGLANG_CACHE)/.installed:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet $(TORCH)
ifeq ($(shell command -v nvidia-smi),)
	$(@D)/bin/pip install --quiet --requirement $(SGLANG_PINS)
	$(@D)/bin/pip install --quiet --no-deps sglang==$(SGLANG_VERSION) torchvision==0.28.0 xgrammar==0.2.7
else
	$(@D)/bin/pip install --quiet sglang==$(SGLANG_VERSION)
endif
	touch $@

clean:
	rm -rf $(VENV) $(SGLANG) .pytest_cache .ruff_cache .hypothesis
