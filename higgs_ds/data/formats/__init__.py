"""Readers of the supported data formats. Each turns a file or folder into samples or faults."""
