# Every target sets up what it needs: a virtual environment, torch, the build tools and an editable install.
#   make demo | test | bench | lint | format | standalone | clean
# PYTHON   the interpreter that makes the environment          VENV  where it stands
# TORCH    what pip installs, e.g. TORCH=torch==2.13.0         ARGS  passed on to demo, test and bench
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
ARGS ?=

bin := $(VENV)/bin
pip := $(bin)/python -m pip --quiet --disable-pip-version-check
torch := $(VENV)/.$(subst /,_,$(TORCH))
built := $(VENV)/.built
sources := setup.py pyproject.toml $(wildcard build_support/*.py) \
	$(shell find csrc -path csrc/standalone -prune -o -type f -print 2>/dev/null)

# The compiled module of an editable install lies in the source tree: another environment may have replaced it.
ifeq ($(wildcard $(built)),$(built))
ifeq ($(shell grep -sl "'$(abspath $(VENV))'" layernorm_cuda/_build_info.py),)
$(shell rm -f $(built))
endif
endif

.PHONY: demo test bench lint format standalone build clean
.DELETE_ON_ERROR:

demo: $(built) $(VENV)/.demo
	$(bin)/python -m examples.demo $(ARGS)

# Everything, then what any backend has to satisfy once more: with the CUDA kernels' source run on the CPU, and without
# the compiled module. ARGS, say "-k autograd -x", are for a run by hand, of the first alone.
test: $(built) $(VENV)/.test
	$(bin)/python -m pytest $(ARGS)
ifeq ($(ARGS),)
	LAYERNORM_CUDA_TEST_BACKEND=host $(bin)/python -m pytest $(backend_tests)
	LAYERNORM_CUDA_TEST_BACKEND=python $(bin)/python -m pytest $(backend_tests)
endif

backend_tests := $(addprefix tests/test_,$(addsuffix .py,\
	autograd contract convert errors fused properties rnn semantics transforms))

bench: $(built) $(VENV)/.bench
	$(bin)/python -m benchmarks $(ARGS)

lint: $(VENV)/.lint
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $(clang_format_files)

format: $(VENV)/.lint
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(clang_format_files)

clang_format_files = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

build: $(built)

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "layernorm_cuda needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

$(torch): | $(bin)/python
	$(bin)/python -m pip install "$(TORCH)" numpy "setuptools>=77" ninja "pybind11>=3"
	@touch $@

$(built): $(torch) $(sources)
	@[ "$$LAYERNORM_CUDA_BUILD" != on ] || $(bin)/python build_support/toolkit.py | xargs -r $(pip) install
	$(pip) install --no-build-isolation --editable .
	@$(bin)/python -c 'from layernorm_cuda import _build_info; print(_build_info.SUMMARY)'
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.bench: | $(built)

# The packages of one extra in pyproject.toml.
$(VENV)/.%: pyproject.toml | $(bin)/python
	sed -n 's/^$* = \[\(.*\)\]/\1/p' pyproject.toml | tr ',' ' ' | xargs $(pip) install
	@touch $@

# ---- the program without PyTorch: needs make and nvcc (11.8 or newer), nothing else --------------------------------
NVCC ?= $(if $(CUDA_HOME),$(CUDA_HOME)/bin/nvcc,nvcc)
archs = $(filter 75 80 86 89 90 100 120,$(patsubst compute_%,%,$(shell $(NVCC) --list-gpu-arch)))
# As in build_support/toolkit.py: machine code of several architectures from one PTX.
ptx_75 := 75
ptx_80 := 80
ptx_86 := 80
ptx_89 := 80
ptx_90 := 90
ptx_100 := 90
ptx_120 := 90
ptx = $(ptx_$(lastword $(archs)))
NVCCFLAGS ?= $(foreach arch,$(archs),-gencode arch=compute_$(ptx_$(arch)),code=sm_$(arch)) \
	-gencode arch=compute_$(ptx),code=compute_$(ptx)

standalone_dir := build/standalone
standalone_objects := $(patsubst csrc/%.cu,$(standalone_dir)/%.o,$(wildcard csrc/standalone/*.cu csrc/kernels/*.cu))

standalone: $(standalone_dir)/layernorm_standalone

$(standalone_dir)/layernorm_standalone: $(standalone_objects)
	$(NVCC) $(NVCCFLAGS) -o $@ $^

$(standalone_dir)/%.o: csrc/%.cu $(standalone_dir)/flags
	@mkdir -p $(@D)
	$(NVCC) -O3 -std=c++17 -Icsrc $(NVCCFLAGS) -MD -MF $(@:.o=.d) -c -o $@ $<

# Other flags, other objects.
$(standalone_dir)/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(NVCC) $(NVCCFLAGS)' | cmp -s - $@ || echo '$(NVCC) $(NVCCFLAGS)' > $@
FORCE:

-include $(standalone_objects:.o=.d)

clean:
	rm -rf build dist *.egg-info layernorm_cuda/_C.*.so layernorm_cuda/_build_info.py $(VENV)/.built
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
