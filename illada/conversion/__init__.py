"""Release formats in and out, and checkpoints that are complete Hub repositories."""

from ..text.whole_models import CheckpointError, load_whole_model
from .adapters import convert_adapter
from .converting import Conversion, convert
from .exporting import export_to_hub_folder, push_to_hub

__all__ = [
    "CheckpointError",
    "Conversion",
    "convert",
    "convert_adapter",
    "export_to_hub_folder",
    "load_whole_model",
    "push_to_hub",
]
