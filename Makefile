# make demo | test | bench | format | clean. The first call makes .venv; it needs Python 3.11 or newer and pip.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin/python
# One thread for each worker: two processes of two threads on two cores only get in each other's way.
# A file is one worker's, since its tests share what they trained.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ -/'

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or newer, found none; install it, or call: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -c constraints.txt -e '.[all,dev]'
	touch $@

install: .venv/.installed ## the environment in .venv

demo: .venv/.installed ## two requests on real digits: table, runs/demo/report.html, certificate
	$(RUN) -m expunge demo

test: .venv/.installed ## lint, format, types, floors, tests
	.venv/bin/ruff check --no-cache .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(ONE_THREAD) $(RUN) -m pytest -n 2 --dist loadfile

test-shards: .venv/.installed ## FSDP2 on two processes (a quiet machine)
	EXPUNGE_TEST_SHARDS=1 $(ONE_THREAD) $(RUN) -m pytest -rP tests/engine/test_distribution.py tests/engine/test_accelerate_configs.py

bench: bench-foundation bench-language bench-language-claims bench-membership bench-prompt-search bench-generation ## every table that needs no peer and no GPU (hours)
bench-foundation: bench-overhead bench-memory bench-speed bench-ensemble bench-kill bench-digits bench-regression bench-cifar ## the foundation's
bench-generation: bench-canvas bench-class-erasers bench-gan bench-vae bench-generation-cost ## image generators'

bench-overhead: .venv/.installed ## the loop over a bare loop of the same arithmetic
	$(RUN) -m expunge.benchmarks.overhead
bench-memory: .venv/.installed ## NPO's and SCRUB's peak memory over fine-tuning's
	$(RUN) -m expunge.benchmarks.memory
bench-speed: .venv/.installed ## unlearning time over retraining time (EXPUNGE_DATA)
	$(RUN) -m expunge.benchmarks.speed
bench-ssd: .venv/.installed ## SSD over its official code: make bench-ssd PEER=path/to/checkout
	$(RUN) -m expunge.benchmarks.ssd_official --peer $(PEER)
bench-digits: .venv/.installed ## every method on digits, three seeds
	$(RUN) -m expunge.benchmarks.tables digits
bench-cifar: .venv/.installed ## every method on CIFAR-10 (EXPUNGE_DATA), three seeds
	$(RUN) -m expunge.benchmarks.tables cifar
bench-regression: .venv/.installed ## regression methods on real tables
	$(RUN) -m expunge.benchmarks.tables regression
bench-gan: .venv/.installed ## a digit out of a GAN, three seeds: make bench-gan WORKERS=16
	$(RUN) -m expunge.benchmarks.gan all --seeds 3 --workers $(or $(WORKERS),2)
bench-vae: .venv/.installed ## a digit out of a conditional variational autoencoder: Selective Amnesia and its terms, three seeds
	$(RUN) -m expunge.benchmarks.vae
bench-kill: .venv/.installed ## kill -9 at random steps, resume, compare tensors
	$(RUN) -m expunge.benchmarks.kill
bench-ensemble: .venv/.installed ## 64 shadow models together and one after another
	$(RUN) -m expunge.benchmarks.ensemble_speed
bench-membership: .venv/.installed ## six membership scores of texts over a bare forward pass (EXPUNGE_DATA)
	$(RUN) -m expunge.benchmarks.membership_cost
bench-prompt-search: .venv/.installed ## searched prompts (GCG, soft prompts) on the embedded model, three seeds (EXPUNGE_DATA)
	$(RUN) -m expunge.benchmarks.prompt_search
bench-tofu: .venv/.installed ## TOFU's evaluation beside open-unlearning's: make bench-tofu PEER=path/to/checkout
	$(RUN) -m expunge.benchmarks.tofu_official --peer $(PEER)
bench-tofu-large: .venv/.installed ## TOFU in full on 109 M parameters, twelve methods on forget10 (EXPUNGE_DATA, a GPU)
	$(RUN) -m expunge.benchmarks.tofu_large
bench-language-gpu: .venv/.installed ## the language ratios on a GPU, after bench-tofu-large: make bench-language-gpu PEER=path/to/checkout
	$(RUN) -m expunge.benchmarks.language_gpu --peer $(PEER)
bench-gpu: .venv/.installed ## loop, memory, ensembles, bf16 and unlearning time on a CUDA device (EXPUNGE_DATA)
	$(RUN) -m expunge.benchmarks.gpu
	$(RUN) -m expunge.benchmarks.speed --device cuda --rows 20000 --trained 80 --skip lat smooth_npo ntk_forgetting prune_first
CANVAS := $(RUN) -m expunge bench canvas --seeds 3 --attacks none --table benchmarks-results/canvas.md
ERASERS := esd,uce,concept_ablation,salun_generation,doco,erasediff,advunlearn,advunlearn:attack_steps=0,advunlearn:retain_w=0.0
OTHERS := grad_ascent,fine_tune,spm,sld,sld:preset=max,seot,seot:iterations=10,seot:start=0.2,negative_prompt,forget_me_not,scissorhands,selective_amnesia
bench-canvas: .venv/.installed ## UnlearnCanvas on the embedded text model: a style, an object, both, and one after the other; three seeds
	$(CANVAS) --targets red --prompt-attacks --methods $(ERASERS),$(OTHERS)
	$(CANVAS) --targets three --prompt-attacks --methods uce,esd,concept_ablation
	$(CANVAS) --targets 'red three' --methods uce,esd
	$(CANVAS) --targets red,three --prompt-attacks --sequence --methods uce,concept_ablation
bench-class-erasers: .venv/.installed ## a digit out of the class-conditional toy: erasers and generic methods, three seeds
	$(RUN) -m expunge.benchmarks.class_erasers
bench-language: .venv/.installed ## every language method on the embedded model (EXPUNGE_DATA): one budget, one level, SAM
	for table in fixed attacks matched muse scaling sam; do $(RUN) -m expunge.benchmarks.language_tables $$table; done
bench-language-claims: .venv/.installed ## what papers claim of language models, at the sizes at hand (EXPUNGE_DATA): SEUF, tracing, LAT, FLAT, SimNPO
	$(RUN) -m expunge.benchmarks.language_claims
bench-generation-cost: .venv/.installed ## sampling beside the pipeline, ESD beside its official code: make bench-generation-cost PEER=path/to/checkout
	$(RUN) -m expunge.benchmarks.generation_cost $(if $(PEER),--peer $(PEER))
bench-language-cost: .venv/.installed ## time and memory beside open-unlearning, logits in pieces: make bench-language-cost PEER=path/to/checkout
	$(RUN) -m expunge.benchmarks.language_cost $(if $(PEER),--peer $(PEER),--parts logits)

format: .venv/.installed ## sort imports and format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean: ## remove the environment, caches and runs
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build dist runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install demo test test-shards bench bench-foundation bench-generation bench-overhead bench-memory bench-ssd bench-speed bench-digits bench-cifar bench-regression bench-kill bench-ensemble bench-gan bench-vae bench-gpu bench-canvas bench-class-erasers bench-language bench-language-claims bench-generation-cost bench-language-cost bench-membership bench-prompt-search bench-tofu bench-tofu-large bench-language-gpu format clean
