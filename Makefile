PYTHON ?= python3
FLAVOUR ?= auto
BIN := .venv/bin
# Of pytest; each may hold an engine of a few GiB.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))

# Those of scripts/versions.py: vLLM over .venv's packages, and the Tritons that its versions bring.
VLLM ?= 0.33.0
TRITONS ?= 3.7.1 3.8.0

.PHONY: setup demo test test-vllm test-vllm033 test-slow compile-table bench-attention bench-moe kernel-report gpu-check diagrams lint clean

setup:
	@$(PYTHON) scripts/setup_env.py --flavour $(FLAVOUR)

demo: setup
	$(BIN)/python examples/demo.py $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# The tests that another vLLM can fail, on the Python of that vLLM.
test-vllm: setup
	$$($(BIN)/python scripts/versions.py vllm $(VLLM)) -m pytest -n $(WORKERS) $(ARGS) @tests/each_vllm.txt

test-vllm033:
	$(MAKE) test-vllm VLLM=0.33.0

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

compile-table: setup
	$(BIN)/python -m checks.compile_table --common --triton $(TRITONS) --output docs/compile-table.md $(ARGS)

bench-attention: setup
	$(BIN)/python -m benchmarks.attention $(ARGS)

bench-moe: setup
	$(BIN)/python -m benchmarks.moe $(ARGS)

# Executes compiled kernels on the CPU; needs nvcc, and half an hour on two cores the first time. What ran is kept.
kernel-report: setup
	$(BIN)/python -m benchmarks.kernel_report --write docs/kernel-report.md $(ARGS)

gpu-check: setup
	$(BIN)/python -m checks.gpu_check $(ARGS)

# Needs Graphviz (apt-get install graphviz).
diagrams:
	for name in rooms layers; do dot -Tsvg docs/diagrams/$$name.dot -o docs/diagrams/$$name.svg; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .versions build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
