"""From a manifest to batches. Knows nothing of the model beyond its codebooks and special tokens."""
