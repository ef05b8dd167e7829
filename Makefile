# Two commands do everything on a fresh machine with Python 3.10 to 3.13 and a C++ compiler:
#   make demo    makes the environment, installs, and decodes on the shipped pair of models
#   make test    the same set-up, then all tests
# two that take longer look at the tests and at libstars:
#   make mutate    plants errors one at a time in a copy and counts which the tests notice (OPTIONS=--list names them)
#   make sanitize  libstars under ASan, UBSan and TSan
# and one more on a machine with a GPU, with what is installed there (no network, no environment):
#   make device  the engine on the card, checked and timed, in 300 seconds; OPTIONS=--quick for 120
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test slow mutate bench device sanitize install clean

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

# libstars and its tests once more, built with gcc's sanitizers: addresses and undefined behaviour in all of them, data
# races in the driver that is C++ throughout. Needs g++, as LD_PRELOAD names its libraries.
SANITIZERS = $(subst $() ,:,$(foreach name,libasan libubsan libstdc++,$(shell g++ -print-file-name=$(name).so)))

sanitize: install
	export PATH="$(abspath $(BIN)):$$PATH"; command -v cmake > /dev/null || $(BIN)/python -m pip install --quiet cmake; \
	for kind in address,undefined thread; do \
	  cmake -S . -B build/sanitize/$$kind -DCMAKE_CXX_COMPILER=g++ -DSTARS_SANITIZE=$$kind && \
	  cmake --build build/sanitize/$$kind --target stars stars_stress --parallel || exit 1; \
	done
	for what in memory threads fork; do build/sanitize/address,undefined/stars_stress $$what || exit 1; done
	build/sanitize/thread/stars_stress threads
	LD_PRELOAD=$(SANITIZERS) ASAN_OPTIONS=detect_leaks=0 \
	  STARS_LIBRARY=$(abspath build/sanitize/address,undefined)/libstars.so \
	  $(BIN)/python -m pytest -q $(wildcard tests/test_libstars*.py) tests/test_recording_threads.py \
	  tests/test_bf16_products.py tests/test_quant_products.py tests/test_penalties.py tests/test_sampling_kernels.py

install: $(VENV)/installed

# Everything is pinned and comes before the package: what its ranges ask for is then there.
$(VENV)/installed: requirements.txt setup.py pyproject.toml CMakeLists.txt $(wildcard bindings/*.h bindings/src/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .benchmarks .hypothesis
