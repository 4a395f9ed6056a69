"""Names of a run's files and folders, and of what they hold, as far as several rooms share them."""

from __future__ import annotations

SETTINGS_FILE, SUMMARY_FILE, DROPPED_FILE = "settings.json", "data_summary.txt", "dropped_samples.txt"
METRICS_FILE, STATE_FILE = "metrics.jsonl", "trainer_state.json"
SAMPLES_FOLDER, PROMPTS_FILE, REFERENCE_FOLDER = "samples", "prompts.json", "reference"
ADAPTER_FOLDER = "lora_adapters"
FINAL_MODEL, ADAPTER_COPY, MERGED_MODEL = "final_model", "adapter", "merged_model"
# In a checkpoint.
TRAINED_FOLDER = "trained_weights"
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state of each parameter, beside its count of steps
