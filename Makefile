# One's own Python may be named: make demo PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test chaos lint types format install clean

# In float32, because bf16 matmuls take thirty times as long on a CPU without instructions for them.
demo: install ## train, save, merge and speak, with the built-in base and sample voices
	$(BIN)/deepspeed launch/train.py --deepspeed ds_configs/zero2.json --output_dir $(DEMO) \
	  --batch_size 8 --grad_accum 1 --max_steps 120 --lr 5e-3 --lora_r 32 --lora_alpha 64 --lora_dropout 0 \
	  --precision fp32 --log_steps 20 --merge_adapter_with_base
	$(BIN)/python launch/generate.py --base_model_path $(DEMO)/merged_model --text "Good morning." \
	  --output $(DEMO)/speech.wav
	@echo
	@echo "Adapters:     $(DEMO)/lora_adapters"
	@echo "Merged model: $(DEMO)/merged_model"
	@echo "WAV:          $(DEMO)/speech.wav"
	@echo "The built-in codec is random: the WAV is noise, of the length that the model has learned."

test: install ## all tests; those that need a GPU or a missing system package are skipped, by name
	$(BIN)/python -m pytest -ra -n 2 --dist loadfile --durations 25

KILLS ?= 100
SEED ?= 1
chaos: install ## kill short runs KILLS times at random moments (10 min), and compare what they end with
	$(BIN)/python tests/chaos.py outputs/chaos-$(shell date +%Y%m%d-%H%M%S) $(KILLS) $(SEED)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(BIN)/.installed ## .venv in this folder, with everything that is needed

$(BIN)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is older; name one: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

clean:
	rm -rf .venv outputs *.egg-info .pytest_cache .ruff_cache .mypy_cache
