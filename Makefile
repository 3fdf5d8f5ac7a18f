# make serve    set up .venv and serve the shipped model on http://127.0.0.1:8000
# make test     set up .venv for development and run the tests
# make lint     the same checks of form, types and dependencies as CI
# make audit    ask a service on the network whether a pinned version has a known vulnerability
# make soak     serve, put mixed load on it for half an hour (MINUTES=...), and tell whether anything was left behind
# make bench    Tessera alone at two shapes: every cell beside its roofline, some 15 minutes; results in runs/bench
# make bench-peers   install vLLM and llama.cpp (an hour, once) and measure all in turns, some 20 minutes; runs/bench-peers
# make chaos    serve, kill, stop and break its processes under load, and tell what clients saw; 15 minutes at most
# make clean    remove .venv and everything built
#
# ARGS="..." is handed on: make serve ARGS="--local --port 8080", make test ARGS="tests/engine -x".
# JOBS=... is how many processes share the tests; 0: this one runs them all.
# PYTHON=... chooses the interpreter, VENV=... where to install.
# TORCH_INDEX=  (empty) takes torch from PyPI as it is; by default Linux without an NVIDIA driver gets the CPU build,
# a tenth of the size, when its index can be reached.

VENV ?= .venv
ARGS ?=
MINUTES ?= 30
JOBS ?= 2
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
# What an editable installation does not pick up by itself.
INSTALLED := pyproject.toml constraints.txt setup.py $(wildcard model/kernels/cpu/*)

.PHONY: serve test lint audit soak chaos bench bench-peers clean

serve: $(VENV)/installed
	@exec $(BIN)/tessera serve $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pip check --disable-pip-version-check
	$(BIN)/python .ci/audit.py

# In an environment of its own, so that what is audited is not what audits. A package the service does not know is a failure.
audit:
	@test -x $(VENV)-audit/bin/pip-audit || { python3 -m venv $(VENV)-audit && \
		$(VENV)-audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }
	$(VENV)-audit/bin/pip-audit --requirement constraints.txt --disable-pip --no-deps --strict --timeout 15 $(ARGS)

soak: $(VENV)/installed-dev
	$(BIN)/python -m loadtests soak --minutes $(MINUTES) --out runs/soak --overwrite $(ARGS)

bench: $(VENV)/installed-dev
	$(BIN)/python -m loadtests.suite cells --out runs/bench --overwrite --together --wait-quiet 20 --duration 6 --max-seconds 1200 $(ARGS)

bench-peers: $(VENV)/installed-dev
	$(BIN)/python -m loadtests.peers bench --out runs/bench-peers --overwrite --wait-quiet 20 --duration 6 --max-seconds 2400 $(ARGS)

chaos: $(VENV)/installed-dev
	$(BIN)/python -m loadtests chaos --out runs/chaos --overwrite $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-audit build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis
	rm -f model/kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: $(INSTALLED)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" sh .ci/install "."
	@touch $@

$(VENV)/installed-dev: $(INSTALLED)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" sh .ci/install ".[dev]"
	@touch $(VENV)/installed $@
