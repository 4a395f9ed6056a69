"""Readers of the data formats in use, each from a file or folder to samples or faults."""
