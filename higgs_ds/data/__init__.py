"""From a manifest to batches. Independent of the model, except for its codebooks and special tokens."""
