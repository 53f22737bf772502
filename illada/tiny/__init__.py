"""The world of the embedded model: its corpus, its tokenizer and its checkpoint."""

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "illada-tiny"
"""Folder of the small instruction model that comes with the package."""
