# Two commands do everything from a fresh clone: `make demo` and `make test`. The rest is for contributors.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
EXTRAS := models,sim,arena,rl,formats,llm,docs,dev
# uv does not read pip's settings: hand on a local wheel folder where there is one.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Threads of several processes on few cores wait for one another; one each is faster.
export OMP_NUM_THREADS ?= 1
export MUJOCO_GL ?= egl

.PHONY: venv system demo test check docs bench soak gpu clean

venv: system $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml constraints.txt
	@echo "Creating $(VENV) from constraints.txt: about a minute, or some more on the first time (1.5 GB)."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv 2>&1 | grep -v '^WARNING: Location' || true
	$(BIN)/uv pip install -q --compile-bytecode -p $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# Rendering needs EGL; the tests also want PostgreSQL and Chromium. Only what is missing is installed.
system:
	@sh .ci/system-packages

demo: venv
	$(BIN)/offbook demo

test: venv
	$(BIN)/pytest -n 2 --dist worksteal -q

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/sphinx-build -W -q -b dirhtml docs docs/_build/check

docs: venv
	$(BIN)/sphinx-build -W -b dirhtml docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

bench: venv
	$(BIN)/offbook bench all

soak: venv
	$(BIN)/offbook bench soak

gpu: venv
	$(BIN)/pytest -m gpu -q -rs
	$(BIN)/offbook bench blockwise_gpu

clean:
	rm -rf $(VENV) docs/_build demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
