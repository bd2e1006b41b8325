"""Measure a compiled model against its baseline on its own runtime, and judge whether it may be served."""
