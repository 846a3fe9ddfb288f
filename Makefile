# make demo   the main job: a LLaMA trained with fused LoRA beside its unfused twin, merged, compared, plotted
# make test   everything that can be checked on this machine
# make test-long  what takes minutes: every architecture of transformers that builds small, replaced, compared and
#             differentiated; the CUDA kernels compiled (where nvcc is), and what their machine code must be like
# make bench  time every variant on this machine and write bench/results/<gpu>/ (python -m bench --as sm80: of an older
#             card that a Hopper plays)
# make bench-step  whole training steps of the paper's models: bench/results/<gpu>/steps.md
# make bench-blocks  q, k, v and MLPs as one and layer by layer, odd widths: bench/results/<gpu>/blocks.md; and in the
#             attention modules of transformers and diffusers, where these are installed: attentions.md
# make bench-models  Hugging Face models by PEFT, PEFT accelerated and replace_linear: bench/results/<gpu>/models.md
# make bench-adapters  rows with adapters of their own through one linear, few rows, several tasks' training steps, and a
#             cache: bench/results/<gpu>/adapters.md, adapters-few.md, adapters-step.md and adapters-cache.md
# make bench-quantised  a linear over bases in 8 and 4 bits: bench/results/<gpu>/quantised.md; and what merges into them lose
# make profile  one step under ncu: profile_output/step.ncu-rep, its sections as text (SHAPE="M K N r")
# make sanitize  csrc's kernels under compute-sanitizer's four tools; on a Hopper card FUSED_LORA_AS=sm80 has csrc/sm80's
# make lint   ruff; make build: the CUDA extension, in place
# make wheel  dist/: one wheel with the CUDA extension for every torch from 2.10 and every Python from 3.10; nvcc 13 is
#             needed, no GPU. make try-wheel: it, in fresh environments of each torch (TORCH="2.11.0" TESTS="tests/ops")
# make kernels-hub  dist/kernels-hub: the same as the Hugging Face kernels hub lays it out
#
# The first call sets up .venv. PYTHON=python3 uses an environment that you already have instead.

VENV := .venv
PYTHON ?= $(VENV)/bin/python
# With an NVIDIA driver, the torch that CUDA machines get; without one, a CPU torch and the Triton that matches it.
GPU := $(shell command -v nvidia-smi)
PACKAGES ?= $(if $(GPU),torch>=2.10,torch==2.13.0 triton==3.7.1)
WORKERS ?= $(if $(GPU),8,auto)
READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/ready)

.PHONY: demo test test-long bench bench-step bench-blocks bench-models bench-adapters bench-quantised profile sanitize lint build wheel try-wheel kernels-hub

demo: $(READY)
	$(PYTHON) -m examples.demo $(if $(TEXT),--text $(TEXT))

test: $(READY)
	$(PYTHON) -m pytest tests -n $(WORKERS)
	$(if $(GPU),,TRITON_INTERPRET=1 $(PYTHON) -m pytest tests -m interpreter -n $(WORKERS))

test-long: $(READY)
	$(PYTHON) -m pytest tests/architectures -m long -n $(WORKERS) -rs --at-least 300
	$(PYTHON) -m pytest tests/csrc -m long -n $(WORKERS)

bench: $(READY)
	$(PYTHON) -m bench

bench-step: $(READY)
	$(PYTHON) -m bench.steps

bench-blocks: $(READY)
	$(PYTHON) -m bench.blocks
	$(PYTHON) -m bench.attentions

bench-models: $(READY)
	$(PYTHON) -m bench.models

bench-adapters: $(READY)
	$(PYTHON) -m bench.adapters
	$(PYTHON) -m bench.adapters --few
	$(PYTHON) -m bench.adapters --step
	$(PYTHON) -m bench.adapters --cache

bench-quantised: $(READY)
	$(PYTHON) -m bench.quantised
	$(PYTHON) -m bench.quantised_merges

# The CUDA kernels' ranges are in a domain of their own, those of Triton's launches in the default one.
RANGES := --nvtx $(foreach pass,forward backward,--nvtx-include "fused_lora@$(pass)/" --nvtx-include "fused_lora.$(pass)/")
SECTIONS := $(foreach section,SpeedOfLight SpeedOfLight_RooflineChart MemoryWorkloadAnalysis WarpStateStats LaunchStats,--section $(section))

profile: $(READY)
	mkdir -p profile_output
	ncu $(RANGES) $(SECTIONS) --clock-control none --import-source yes --force-overwrite --export profile_output/step \
		$(PYTHON) -m bench.profile $(SHAPE)
	ncu --import profile_output/step.ncu-rep --page details | tee profile_output/step.txt

# Without torch's memory pool every tensor is an allocation of its own, whose bounds the tools know. initcheck watches all
# kernels, since others write what ours read.
TOOLS := memcheck racecheck synccheck initcheck
OURS = $(if $(filter initcheck,$(tool)),,--kernel-regex kns=fused_lora)
sanitize: $(READY)
	$(foreach tool,$(TOOLS),PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $(tool) $(OURS) --error-exitcode 1 \
		$(PYTHON) -m tests.csrc.small_passes $(if $(filter initcheck,$(tool)),--aligned) &&) true

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

build: $(READY)
	$(PYTHON) setup.py build_ext --inplace

wheel: $(READY)
	$(PYTHON) -m release.wheel

try-wheel: $(READY)
	$(PYTHON) -m release.trial $(if $(TORCH),--torch $(TORCH)) $(if $(TESTS),--tests $(TESTS))

kernels-hub: $(READY)
	$(PYTHON) -m release.hub

$(VENV)/ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(foreach package,$(PACKAGES),'$(package)')
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@
