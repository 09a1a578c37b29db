# make demo    set up, then restore a real photo with a reference found by hash: out/demo/demo.png
# make test    set up, then run all tests
# make lint    ruff and mypy
# make bench   time the ops against their plain forms and other libraries, the search and the restoration on this machine:
#              benchmarks/results/ and the tables and the picture of docs/retrieval.md; RUN=--resume goes on after a stop
# make rich    train what `--quality rich` uses, from the photos in DATA and the published autoencoder in AUTOENCODER (a
#              folder with taef2_encoder.pth and taef2_decoder.pth): RUNS/rich/model, some four hours of one core
# make auto    train the gate of `--model auto` from the photos in DATA: RUNS/auto/model, less than an hour of one core
# make gpu     on a machine with an NVIDIA GPU, in the Python that already has torch: build, GPU tests, benchmarks; ten
#              minutes, nothing is fetched; needs torch, numpy, setuptools, pybind11 and pytest in PYTHON, and nvcc
#
# Everything goes into VENV (.venv); PYTHON is the interpreter it is made with. Versions stand in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
OUT ?= benchmarks/results
RUNS ?= runs
TRAIN = $(BIN)/ragsr train refsr --data "$(DATA)" --precision bf16
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
BUILD_TOOLS := setuptools wheel ninja pybind11 numpy

export PIP_CONSTRAINT := $(abspath constraints.txt)
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench rich auto gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready-demo
	$(BIN)/ragsr demo -o out/demo

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/run.py --json $(OUT)/ops_cpu.json $(RUN)
	$(BIN)/python benchmarks/run.py --op index --json $(OUT)/index_cpu.json $(RUN)
	$(BIN)/python benchmarks/run.py --op curve --json $(OUT)/curve_cpu.json $(RUN)
	$(BIN)/python -m pytest benchmarks/test_retrieval.py -k hash --benchmark-json=$(OUT)/table6_hash.json
	$(BIN)/python -m pytest benchmarks/test_retrieval.py -k vgg --benchmark-json=$(OUT)/table6_vgg.json
	$(BIN)/python benchmarks/retrieval_page.py --results $(OUT)
	$(BIN)/python benchmarks/restore_cost.py --json $(OUT)/restore_cost_refnet.json

rich: $(VENV)/.ready-test
	$(TRAIN) --stage autoencoder --autoencoder "$(AUTOENCODER)" --steps 240 --batch 2 --rate 1e-4 \
	    --out $(RUNS)/autoencoder
	$(TRAIN) --stage joint --alpha 0 --init $(RUNS)/autoencoder/model --reference refnet --pairs 2000 --steps 800 \
	    --rate 3e-4 --out $(RUNS)/reference-one
	$(TRAIN) --stage joint --alpha 0 --init $(RUNS)/reference-one/model --pairs 2000 --steps 1500 --rate 5e-4 \
	    --out $(RUNS)/reference
	$(TRAIN) --stage diffusion --picture-share 0 --init $(RUNS)/reference-one/model --pairs 700 --steps 2200 \
	    --rate 5e-4 --out $(RUNS)/latents
	$(TRAIN) --stage diffusion --init $(RUNS)/latents/model --reference $(RUNS)/reference/model/reference --pairs 850 \
	    --steps 1200 --batch 6 --side 128 --rate 3e-4 --picture-share 10 --perceptual ragsr/assets/hash/hash-64 \
	    --perceptual-share 1 --gan 0.01 --sampling-steps 2 --out $(RUNS)/picture
	$(TRAIN) --stage diffusion --init $(RUNS)/picture/model --pairs 3000 --steps 600 --batch 6 --side 128 --rate 3e-4 \
	    --picture-share 10 --perceptual ragsr/assets/hash/hash-64 --perceptual-share 3 --gan 0.01 --sampling-steps 2 \
	    --out $(RUNS)/picture-two
	$(TRAIN) --stage joint --alpha 0 --init $(RUNS)/picture-two/model --pairs 3000 --steps 3000 --batch 6 --side 128 \
	    --rate 5e-4 --perceptual ragsr/assets/hash/hash-64 --perceptual-share 40 --gan 0.02 --sampling-steps 2 \
	    --out $(RUNS)/reference-seen
	$(TRAIN) --stage diffusion --init $(RUNS)/reference-seen/model --pairs 3000 --steps 1200 --batch 6 --side 128 \
	    --rate 3e-4 --picture-share 10 --perceptual ragsr/assets/hash/hash-64 --perceptual-share 3 --gan 0.01 \
	    --sampling-steps 2 --timesteps own --out $(RUNS)/rich

auto: $(VENV)/.ready-test
	$(BIN)/ragsr train auto --data "$(DATA)" --out $(RUNS)/auto

gpu:
	$(PYTHON) benchmarks/gpu.py --out $(OUT)

clean:
	rm -rf build dist out *.egg-info ragsr/*.so $(VENV)

# One environment; each extra is installed once, and again when what it was built from changes.
$(VENV)/.ready-%: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install -q torch $(BUILD_TOOLS)
	$(BIN)/pip install -q --no-build-isolation -e ".[$*]"
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ragsr needs Python 3.11 or later; $(PYTHON) is older: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
