# make demo       the whole way on the CPU: data, shards, four stages on two ZeRO-3 ranks, scores, demo/report.html;
#                 DEMO_SEED=3 for other data, after demo/ was moved or removed
# make test       lint, types and the whole test suite
# make test-fast  the tests that tell most mistakes within three minutes
# make test-slow  the other tests
# make test-bounds  the unit tests with the oldest packages that pyproject.toml admits on Python 3.10, then with the
#                 newest ones on Python 3.13: make test-lowest, in .venv-lowest, and make test-newest, in .venv-newest
# make lint       ruff, its formatter and mypy
# make docs       the docs site in build/site
# make peers      the tests with other loaders and trainers (datasets, Megatron-Energon, torchvision, lmms-eval), in
#                 .venv-peers
# make exporters  the tests that load exported shards in ms-swift and LLaMA-Factory, in .venv-exporters
# make vllm       the tests of the plug-in for vLLM, on the CPU, in .venv-vllm
# make bench      this project's readers beside other loaders, in .venv-peers (docs/performance.md)
# make soak       builds that are killed 50 times, readers 20 times, training 25 times; SEED=7 KILLS=200 for another
#                 campaign (docs/reliability.md)
# make soak-full-size  two steps of the full-size 2B model on two CPU ranks, memory beside the estimate; 18 GB of memory
# make fuzz       10,000 damaged files of every kind, read by the commands; SEED=7 MUTANTS=1000 for another campaign
#                 (docs/reliability.md)
# make rehearsal  the published recipe from annotation files to scores: its manifests and names, small media and weights
#                 (docs/recipe.md)
# make clean      removes environments, caches and the demo's folder
#
# Each target prepares its environment first and needs only Python 3.10 (peers, exporters, vllm: 3.11) or newer.
# PYTHON=python3.12 chooses the interpreter (PYTHON_LOWEST and PYTHON_NEWEST those of test-bounds),
# PIP_FLAGS='--extra-index-url URL' another source of wheels.

SHELL         := /bin/bash
PYTHON        ?= python3
PYTHON_LOWEST ?= python3.10
PYTHON_NEWEST ?= python3.13
PIP_FLAGS     ?=
STAGES        := 1 2 3 4
SEED          ?= 0
DEMO_SEED     ?= 2
KILLS         ?= 50

choice := PYTHON
.venv-lowest/ready: choice := PYTHON_LOWEST
.venv-newest/ready: choice := PYTHON_NEWEST

python := $(shell command -v $(PYTHON))
.venv-lowest/ready: python := $(shell command -v $(PYTHON_LOWEST))
.venv-newest/ready: python := $(shell command -v $(PYTHON_NEWEST))

pip    := -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
pinned := --constraint constraints.txt
peers  := $(pinned) --constraint constraints-peers.txt
comma  := ,

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-fast test-slow test-bounds test-lowest test-newest lint docs peers exporters vllm bench soak soak-full-size fuzz rehearsal clean

define build
	python tools/build_shards.py --stage $(1) --manifest manifests/demo/stage$(1).yaml

endef

ranks := torchrun --standalone --nproc_per_node 2

define train
	$(ranks) -m trainer --manifest manifests/demo/stage$(1).yaml

endef

# folder, least version of Python 3, constraints, extras
define environment
@test -n "$(python)" || { echo "$($(choice)): not found; name a Python 3.$(2) or newer: make $(choice)=PATH"; exit 1; }
@"$(python)" -c 'import sys; sys.exit(sys.version_info < (3, $(2)) and "needs Python 3.$(2): make $(choice)=PATH")'
@echo "preparing $(1) (once, a few minutes)"
@"$(python)" -m venv $(1)
@$(1)/bin/python $(pip) $(3) torch
@$(1)/bin/python $(pip) $(3) --editable '.[$(4)]'
@touch $@
endef

demo: .venv/ready
	python -m tools.demo_data --out demo/data --seed $(DEMO_SEED)
	$(foreach n,$(STAGES),$(call build,$(n)))
	$(foreach n,$(STAGES),$(call train,$(n)))
	$(ranks) -m trainer.evaluate --manifest manifests/demo/stage4.yaml
	$(ranks) -m trainer.haystack --manifest manifests/demo/stage4.yaml --root demo/data/media \
	  --needles demo/data/annotations/needles.jsonl $(patsubst %,--video demo/data/media/haystack/haystack-empty-%.mp4,0000 0001)
	python -m trainer.report $(STAGES:%=demo/runs/stage%) --out demo/report.html --images demo/images

test: lint
	pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/ready
	pytest -q -n 2 --dist loadfile -m "not slow" tests/unit tests/docs

test-slow: .venv/ready
	pytest -q -n 2 --dist loadfile -m slow tests/unit tests/docs
	pytest -q -n 2 --dist loadfile tests/integration

test-bounds: test-lowest test-newest

test-lowest test-newest: test-%: .venv-%/ready
	.venv-$*/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests/unit

# lmms-eval states av<16 and much that its tasks here do not use
peers: .venv-peers/ready
	.venv-peers/bin/python $(pip) $(peers) --no-deps lmms-eval
	.venv-peers/bin/python -m pytest -q -m peers tests/unit/pipeline/adapters tests/unit/pipeline/upload \
	  tests/unit/trainer/monitoring/test_real_trackers.py tests/integration/trainer/test_lmms_plugin.py \
	  tests/integration/trainer/test_serve_lmms.py tests/integration/test_benchmarks.py tests/docs

exporters: .venv-exporters/ready
	.venv-exporters/bin/python -m pytest -q -m exporters tests/unit/tools/export

vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -q -m vllm tests/integration/trainer/test_vllm_plugin.py

# the bounds that mosaicml-streaming states for numpy and transformers are narrower than what it runs with; torchcodec
# looks for FFmpeg's libraries by their plain names, which PyAV's wheel has under others
peers bench: export LD_LIBRARY_PATH := $(CURDIR)/.venv-peers/ffmpeg
bench: .venv-peers/ready
	.venv-peers/bin/python $(pip) $(peers) --no-deps mosaicml-streaming torchcodec
	@mkdir -p .venv-peers/ffmpeg
	@ln -sf $(CURDIR)/.venv-peers/lib/python3*/site-packages/av.libs/* .venv-peers/ffmpeg
	@cd .venv-peers/ffmpeg && for name in lib{av,sw}*-*.so.*; do \
	  ln -sf $$name $$(sed -E 's/-[0-9a-f]+(\.so\.[0-9]+).*/\1/' <<< $$name); done
	.venv-peers/bin/python -m benchmarks.loading.loader

lint: .venv/ready
	ruff check .
	ruff format --check .
	mypy --package framestream

docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet --site-dir build/site

soak-full-size: .venv/ready
	python -m benchmarks.soak.full_size

soak: .venv/ready
	python -m benchmarks.soak.build --seed $(SEED) --kills $(KILLS)
	python -m benchmarks.soak.loader --seed $(SEED)
	python -m benchmarks.soak.train --seed $(SEED)

fuzz: .venv/ready
	python -m benchmarks.fuzz --seed $(SEED) --mutants $(MUTANTS)

rehearsal: .venv/ready
	python -m benchmarks.rehearsal

clean:
	rm -rf .venv .venv-{docs,exporters,lowest,newest,peers,vllm} demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready: setup.cfg pyproject.toml constraints.txt
	$(call environment,.venv,10,$(pinned),dev)

.venv-peers/ready: setup.cfg pyproject.toml constraints.txt constraints-peers.txt
	$(call environment,.venv-peers,11,$(peers),dev$(comma)peers)

.venv-lowest/ready: setup.cfg build/constraints-lowest.txt
	$(call environment,.venv-lowest,10,--constraint build/constraints-lowest.txt,dev)

.venv-newest/ready: setup.cfg pyproject.toml
	$(call environment,.venv-newest,13,--upgrade,dev)

# every dependency at its lower bound: av>=17.1 becomes av==17.1
build/constraints-lowest.txt: pyproject.toml
	@mkdir -p $(@D)
	@sed -n '/^dependencies/,/^]/s/^ *"\(.*\)>=\(.*\)",$$/\1==\2/p' $< > $@

# torch brings its own libraries; the rest is a complete list
.venv-exporters/ready .venv-vllm/ready: .venv-%/ready: setup.cfg requirements-%.txt
	@"$(python)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11: make PYTHON=PATH")'
	@"$(python)" -m venv .venv-$*
	@.venv-$*/bin/python $(pip) --constraint requirements-$*.txt torch
	@.venv-$*/bin/python $(pip) --no-deps --requirement requirements-$*.txt
	@.venv-$*/bin/python $(pip) --no-deps --editable .
	@touch $@

# the API reference is read from the sources: neither torch nor the package itself is installed here
.venv-docs/ready: requirements-docs.txt
	@"$(python)" -m venv .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) -r requirements-docs.txt
	@touch $@
