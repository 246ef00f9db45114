# `make help` lists the targets. Variables:
#   CHAPTER=part/slug   only this chapter (book, outputs, seeds, full, bench, student)
#   ON=local|slurm      where chapters run: workflow/profiles/
#   JOBS=2              chapters, or tests, at a time (on a cluster: 50)
#   PYTHON=python3      the interpreter that creates the environment, 3.11 or newer
#   VENV=.venv          the environment; empty: the active one, as it is

SHELL := bash
export VENV ?= .venv
export PYTHON
CHAPTER ?=
ON ?= local
JOBS ?= $(if $(filter slurm,$(ON)),50,2)

READY := set -e; . workflow/environment.sh
RUN = snakemake --snakefile workflow/Snakefile --profile workflow/profiles/$(ON) --jobs $(JOBS) --config chapter=$(CHAPTER) --

.DEFAULT_GOAL := help
.PHONY: help book test html outputs seeds full lab bench student toc address cluster-test clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

book: ## run the chapters whose inputs changed (quick profile) and render the book to _build/html
	@$(READY); $(RUN) quick; render

test: ## test everything: style, library, notebooks against their outputs, pages in a browser
	@$(READY); ruff check .; ruff format --check .; render --committed; \
	python -m pytest tests book -n $(JOBS) --dist loadfile --jaxtyping-packages=nnlib,beartype.beartype \
	    --nbval-lax --nbval-sanitize-with tests/book/sanitize.cfg

html: ## render the committed outputs; runs nothing
	@$(READY); render --committed

outputs: ## run chapters and write clean outputs back into book/
	@$(READY); $(RUN) quick; python workflow/outputs.py $(CHAPTER)

seeds: ## run chapters for seeds 0 to 4 and write book/results/seeds
	@$(READY); $(RUN) seeds

full: ## run chapters at the papers' scale, on a GPU if there is one, and write book/results/full
	@$(READY); $(RUN) full

lab: ## open JupyterLab in this environment
	@$(READY); exec 9>&-; jupyter lab book

bench: export EXTRAS = bench
bench: ## time the library against the peers that a practitioner would use; writes book/results/benchmarks
	@$(READY); python workflow/inputs.py "$(CHAPTER)" > /dev/null; peers; \
	python -m pytest $(if $(CHAPTER),benchmarks/$(dir $(CHAPTER))bench_$(notdir $(CHAPTER)).py,benchmarks) \
	    -o python_files='bench_*.py' -p no:xdist --benchmark-only --benchmark-group-by=group \
	    --benchmark-columns=median,min,max,rounds --benchmark-json=_build/benchmarks.json; \
	python workflow/benchmarks.py _build/benchmarks.json

student: ## notebooks without solutions, for a class: _build/student
	@$(READY); python workflow/student.py $(CHAPTER)

toc: ## rewrite _toc.yml from the catalogue of papers
	@$(READY); python workflow/pages.py --toc

address: ## give the book its own address: make address URL=https://github.com/you/your-book
	@$(READY); python workflow/address.py "$(URL)" $(SITE)

cluster-test: ## run chapters through a real SLURM of one node on this machine
	@$(READY); python -m pytest workflow/cluster_test.py

clean: ## remove everything that was built, except the environment
	rm -rf _build .snakemake
