"""Names of a run's files and folders, and of their contents, that several subpackages share."""

from __future__ import annotations

SETTINGS_FILE, SUMMARY_FILE, DROPPED_FILE = "settings.json", "data_summary.txt", "dropped_samples.txt"
FLAGGED_FILE, INVALID_FILE = "flagged_samples.tsv", "invalid_samples.txt"
TRAINING_DATA_FILE = "training_data.npz"  # identifies its samples
REFERENCE_FILE = "reference_log_probs.safetensors"  # of its pairs, under the model that it started from
SPEAKERS_FILE = "speakers.json"  # beside an adapter or a model
METRICS_FILE, STATE_FILE = "metrics.jsonl", "trainer_state.json"
SAMPLES_FOLDER, PROMPTS_FILE, REFERENCE_FOLDER = "samples", "prompts.json", "reference"
EVALUATION_FOLDER = "evaluation"  # of --evaluate_steps
ADAPTER_FOLDER, AVERAGED_ADAPTER_FOLDER = "lora_adapters", "lora_adapters_ema"
FINAL_MODEL, MERGED_MODEL = "final_model", "merged_model"
ADAPTER_COPY = "adapter"  # the same as FINAL_MODEL, in runs of earlier versions
TO_PUBLISH = "to_publish"  # a copy of the adapter without paths, until it is uploaded
# Inside a checkpoint.
TRAINED_FOLDER, AVERAGED_TRAINED_FOLDER = "trained_weights", "trained_weights_ema"
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state of each parameter, besides its step count
AVERAGE = "average"  # of each trained parameter over the steps (--ema_decay), in the same state
