"""Release formats in and out, and checkpoints that are complete Hub repositories."""

from .converting import Conversion, convert
from .reading import CheckpointError

__all__ = ["CheckpointError", "Conversion", "convert"]
