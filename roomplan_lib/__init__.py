"""Workbench that teaches a language model to understand rooms."""

__version__ = "0.1.0"
