# A virtual environment of its own; `make PYTHON=python3.12 ...` chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
MATRIX ?= 2.11.0 2.15.0
RUN := $(VENV)/bin/
# The kernels of the last time are found by their text.
KEEP := --keep-kernels=build/kernels

.PHONY: help train distributed finetune export test quick check integrations matrix slow bench offload gpu \
	contract formats pictures vision recipes docs clean

help:
	@echo "make train   train a small GPT with 8-bit AdamW, beside 32-bit AdamW"
	@echo "make distributed  train with FSDP2 on two processes, go on from the checkpoint on one and three"
	@echo "make finetune  memory of a train step of 303 million parameters, six optimizers side by side"
	@echo "make vision  train a small convolutional network on pictures of digits, with both"
	@echo "make export  train from C++, without Python: package, build, train, compare"
	@echo "make test    linter, type checker and tests"
	@echo "make quick   a part of the tests, in minutes"
	@echo "make integrations  tests with transformers, peft, accelerate and lightning"
	@echo "make recipes  tests with trl, torchtitan and timm"
	@echo "make matrix  the core of the tests with torch 2.11 and 2.15"
	@echo "make slow    the tests that take minutes"
	@echo "make bench   time the optimizer step beside torch, bitsandbytes and torchao"
	@echo "make offload  time a step of the host's, where weights are offloaded, beside DeepSpeed's"
	@echo "make gpu     all that a GPU must show, in eight minutes"
	@echo "make formats  how near each format of states is to float32: displacement, training, time (hours; goes on)"
	@echo "make pictures  draw the documentation's pictures from benchmarks/results"
	@echo "make docs    the documentation as a site, in build/site; every link and name in it exists"
	@echo "make contract  count compiles, graph breaks and host syncs of 16 training loops, beside theirs"

# Each set of extras is installed once, until pyproject.toml or the constraints change.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

train: $(VENV)/.installed-examples
	$(RUN)python examples/train.py $(ARGS)

distributed: $(VENV)/.installed-examples
	$(RUN)python examples/distributed.py $(ARGS)

finetune: $(VENV)/.installed-examples $(VENV)/.installed-peers
	$(RUN)python examples/finetune.py $(ARGS)

vision: $(VENV)/.installed-examples $(VENV)/.installed-peers
	$(RUN)python examples/vision.py $(ARGS)

export: $(VENV)/.installed-examples
	$(RUN)python examples/export/run.py $(ARGS)

test: check $(VENV)/.installed-test $(VENV)/.installed-examples
	$(RUN)python -m pytest --numprocesses 2 --dist loadfile $(KEEP)

quick: $(VENV)/.installed-test
	$(RUN)python -m pytest --numprocesses 2 --dist worksteal $(KEEP) -m "quick and not slow and not long"

integrations: $(VENV)/.installed-test $(VENV)/.installed-integrations
	$(RUN)python -m pytest tests/test_integrations.py

recipes: $(VENV)/.installed-test $(VENV)/.installed-examples $(VENV)/.installed-recipes
	$(RUN)python -m pytest tests/test_recipes.py

# What the package needs of torch, with the oldest and the newest version, in environments of their own.
matrix: $(MATRIX:%=matrix-%)

matrix-%: build/matrix/%/.installed
	build/matrix/$*/bin/python -m pytest -m "core and not slow"

build/matrix/%/.installed: pyproject.toml
	test -d build/matrix/$* || $(PYTHON) -m venv build/matrix/$*
	build/matrix/$*/bin/python -m pip install --quiet torch==$* --editable '.[core]'
	touch $@

slow: $(VENV)/.installed-test
	$(RUN)python -m pytest -m slow

check: $(VENV)/.installed-test
	$(RUN)ruff check
	$(RUN)ruff format --check
	$(RUN)mypy

bench: $(VENV)/.installed-peers
	$(RUN)python benchmarks/step.py $(ARGS)

formats: $(VENV)/.installed-peers $(VENV)/.installed-examples
	TRITON_INTERPRET=1 $(RUN)python benchmarks/formats.py $(ARGS)

offload: $(VENV)/.installed-offload
	DS_ACCELERATOR=cpu PATH=$(abspath $(VENV)/bin):$$PATH $(RUN)python benchmarks/offload.py $(ARGS)

gpu: $(VENV)/.installed-test
	$(RUN)python benchmarks/gpu.py $(ARGS)

pictures: $(VENV)/.installed-examples
	$(RUN)python benchmarks/pictures.py $(ARGS)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN)python -m mkdocs build --strict

contract: $(VENV)/.installed-peers
	$(RUN)python benchmarks/contract.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info runs
