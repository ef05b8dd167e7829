# Two commands do everything on a fresh machine with Python 3.10 to 3.12 and a C++ compiler:
#   make demo    makes the environment, installs, and decodes on the shipped pair of models
#   make test    the same set-up, then all tests
# and one more on a machine with a GPU, with what is installed there (no network, no environment):
#   make device  the engine on the card, checked and timed, in 300 seconds; OPTIONS=--quick for 120
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test slow mutate bench device install clean

demo: install
	$(BIN)/stars demo

test: install
	$(BIN)/python -m pytest -q

slow: install
	$(BIN)/python -m pytest -q -m slow

# Plants the errors of tests/mutate/mutants.py one at a time: are they caught? OPTIONS=--list names them.
mutate: install
	command -v cmake > /dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check cmake ninja
	$(BIN)/python tests/mutate/run.py $(OPTIONS)

bench: install
	$(BIN)/python benchmarks/run_cpu.py

device:
	$(PYTHON) benchmarks/device/run.py $(OPTIONS)

install: $(VENV)/installed

# torch comes first and pinned: left to a dependency's range, pip would fetch another build of several gigabytes.
$(VENV)/installed: requirements.txt setup.py pyproject.toml CMakeLists.txt $(wildcard bindings/*.h bindings/src/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .benchmarks .hypothesis
