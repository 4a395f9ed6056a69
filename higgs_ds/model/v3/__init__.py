"""Higgs Audio v3, a Qwen3 trunk with one table of audio codes."""
