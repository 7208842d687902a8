# Two commands do everything on a fresh machine: `make serve` and `make test`.
# `make serve` installs the light gateway only; torch comes with `make test` and `make train`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FASHION_MNIST := /usr/share/datasets/fashion-mnist
PROMETHEUS := $(or $(shell command -v prometheus),/usr/bin/prometheus)
CHROMEDRIVER := $(or $(shell command -v chromedriver),/usr/bin/chromedriver)
MODEL ?= vmoe-fashion-mnist

.PHONY: serve serve-triton test lint train export export-int8 loadtest-demo loadtest-picture bench-policy bench-fleet bench-model bench-int8 bench-gateway clean

serve: $(VENV)/.light
	$(BIN)/python -m server --model-repository model_repository --model $(MODEL)

# A real Triton server on a free port, with the model behind its Python backend, and the gateway in front of it.
serve-triton: $(VENV)/.full
	$(BIN)/python -m tests.triton_server model_repository/$(MODEL) \
		$(BIN)/python -m server --model-repository model_repository --model $(MODEL) --backend triton --triton-urls GRPC_URL

test: lint $(FASHION_MNIST) $(PROMETHEUS) $(CHROMEDRIVER)
	$(BIN)/python -m pytest

lint: $(VENV)/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Trains the shipped model again, in hours on 2 cores. Interrupted, it goes on where it was. The second run continues the first
# without augmentation: 26 epochs are too few to fit the augmented images. The third teaches reduced points what the full one says.
train: $(VENV)/.full $(FASHION_MNIST)
	$(BIN)/python -m vmoe train --output runs/augmented --adaptive 0.5 --resume
	$(BIN)/python -m vmoe train --output runs/plain --start-from runs/augmented/checkpoint --adaptive 0.5 \
		--epochs 5 --learning-rate 4e-4 --warmup-steps 100 --flip 0 --shift 0.02 --scale 0.02 --erase 0 --resume
	$(BIN)/python -m vmoe train --output runs/vmoe-fashion-mnist --start-from runs/plain/checkpoint --adaptive 0.6 \
		--adaptive-min-capacity-factor 0.1 --distill 0.5 --epochs 7 --learning-rate 5e-4 --warmup-steps 200 \
		--flip 0 --shift 0.03 --scale 0.05 --erase 0.1 --resume

export: $(VENV)/.full $(FASHION_MNIST)
	$(BIN)/python -m exporter runs/vmoe-fashion-mnist/checkpoint --name vmoe-fashion-mnist --out model_repository \
		--images $(FASHION_MNIST)
	$(BIN)/python -m exporter plot model_repository/vmoe-fashion-mnist --output docs/operating-points.png

# The same model in 8 bits: docs/quantisation.md. Times both in one run and so writes the manifest of `make export` again.
export-int8: $(VENV)/.full $(FASHION_MNIST)
	$(BIN)/python -m exporter runs/vmoe-fashion-mnist/checkpoint --name vmoe-fashion-mnist-int8 --out model_repository \
		--dtype int8 --calibration-images $(FASHION_MNIST) --images $(FASHION_MNIST) --rounds 0
	$(BIN)/python -m exporter --profile-only --name vmoe-fashion-mnist --profile-with vmoe-fashion-mnist-int8 \
		--out model_repository
	$(BIN)/python -m exporter plot model_repository/vmoe-fashion-mnist --output docs/operating-points.png

# The same bursts against the default policy and two fixed ones; leaves runs/loadtest-demo/index.html. Two minutes.
loadtest-demo: $(VENV)/.full $(FASHION_MNIST)
	$(BIN)/python -m loadtest.demo --images $(FASHION_MNIST)

# What the README shows of it.
loadtest-picture: $(VENV)/.full $(CHROMEDRIVER)
	$(BIN)/python -m tests.loadtest.browser runs/loadtest-demo/index.html docs/loadtest-demo.png

# Every policy on every trace, simulated; writes table and plot into docs/bench.
bench-policy: $(VENV)/.full
	$(BIN)/python -m tests.benchmarks.policies

# The graph against its peers and the machine's matrix product; writes table, verdicts and plot into docs/bench. A quarter
# of an hour on two undisturbed cores.
bench-model: $(VENV)/.full
	$(BIN)/python -m tests.benchmarks.model_speed

# The graph in float32 and in 8 bits; writes a table into docs/bench. Three minutes.
bench-int8: $(VENV)/.full $(FASHION_MNIST)
	$(BIN)/python -m tests.benchmarks.int8_speed

# The gateway against LitServe and plain FastAPI; writes table and plot into docs/bench. Three minutes.
bench-gateway: $(VENV)/.full $(FASHION_MNIST)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m tests.benchmarks.gateway_peers

# One gateway, two workers, two workers on one engine process; writes a table into docs/bench. Five minutes.
.PHONY: bench-workers
bench-workers: $(VENV)/.full $(FASHION_MNIST)
	$(BIN)/python -m tests.benchmarks.workers

# What fleets hold, simulated; prints the tables of docs/scaling.md. Took 13 minutes beside other work.
bench-fleet: $(VENV)/.full
	$(BIN)/python -m tests.benchmarks.fleet

# Five small models (BPR, BPR at random points without and with distillation, vanilla, dense) and what docs/experiments says about
# their routing. Goes on where it was stopped. One training is about 5 minutes of one undisturbed core, the first sweep 2 per
# sparse model, the second (fewer points, all test images) 1.
ROUTING_RUNS := plain adaptive vanilla dense
ADAPTIVE_RUNS := plain adaptive distilled vanilla
ROUTING_TRAIN := $(BIN)/python -m vmoe train --epochs 2 --warmup-steps 200 --average-decay 0.995 --flip 0 --shift 0.02 \
	--scale 0.02 --erase 0 --autocast none --resume
.PHONY: experiments-routing
experiments-routing: $(VENV)/.full $(FASHION_MNIST)
	$(ROUTING_TRAIN) --config docs/experiments/configs/small_bpr.json --output runs/routing/plain
	$(ROUTING_TRAIN) --config docs/experiments/configs/small_bpr.json --output runs/routing/adaptive --adaptive 0.5
	$(ROUTING_TRAIN) --config docs/experiments/configs/small_bpr.json --output runs/routing/distilled --adaptive 0.5 --distill 0.5
	$(ROUTING_TRAIN) --config docs/experiments/configs/small_vanilla.json --output runs/routing/vanilla
	$(ROUTING_TRAIN) --config docs/experiments/configs/small_dense.json --output runs/routing/dense
	$(BIN)/python -m vmoe sweep $(ROUTING_RUNS:%=runs/routing/%/checkpoint) --limit 1000 --seeds 1 \
		--json docs/experiments/sweep.json --markdown docs/experiments/sweep.md --plot docs/experiments/sweep.png
	$(BIN)/python -m vmoe sweep $(ADAPTIVE_RUNS:%=runs/routing/%/checkpoint) --routing bpr --group-images 1 \
		--capacity-factor 0.25 --capacity-factor 0.5 --capacity-factor 1 --selected-experts 1 --selected-experts 2 \
		--json docs/experiments/adaptive-training.json
	$(BIN)/python -m vmoe show-routing runs/routing/plain/checkpoint --plot docs/experiments/kept-patches.png
	$(BIN)/python -m vmoe routing-analysis runs/routing/plain/checkpoint --limit 2000 \
		--json docs/experiments/routing-analysis.json --plot docs/experiments/routing-analysis.png
	set -e; for model in adaptive vanilla; do \
		$(BIN)/python -m vmoe routing-analysis runs/routing/$$model/checkpoint --limit 2000 \
			--json docs/experiments/routing-analysis-$$model.json; \
	done

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.light: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.full: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,loadtest,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps nvidia-pytriton # see pyproject.toml
	touch $@ $(VENV)/.light

# Test and training data. Where apt or root is missing, say what to do instead of failing in the middle of a test.
$(FASHION_MNIST):
	@{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq dataset-fashion-mnist; } \
		|| { echo "install Debian's package dataset-fashion-mnist, or put the four IDX files of Fashion-MNIST into $@"; exit 1; }

# Prometheus and promtool, as programs for the tests: the package's service must not run.
$(PROMETHEUS):
	@{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && tests/deploy/install_prometheus.sh; } \
		|| { echo "install Debian's package prometheus, or put prometheus and promtool on PATH"; exit 1; }

# The browser in which pages of reports are opened.
$(CHROMEDRIVER):
	@{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; } \
		|| { echo "install Debian's packages chromium and chromium-driver, or put both programs on PATH"; exit 1; }

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
