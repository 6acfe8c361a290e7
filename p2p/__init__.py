"""Prompt-to-Prompt image editing in plain PyTorch: edit a picture by editing its prompt.

    import p2p
    model = p2p.load("emoji")
    r = p2p.edit(model, "a cat on grass", "a dog on grass")
    r.images[1].show()
"""
from pathlib import Path

if not (Path(__file__).parent / "models").is_dir():   # a clone: models/ and weights/ lie beside this folder
    __path__.append(str(Path(__file__).parents[1]))

from p2p.blend import LocalBlend
from p2p.editors.masactrl import MasaCtrl
from p2p.editors.plug_and_play import PlugAndPlay
from p2p.edits import Edit
from p2p.errors import CheckpointError, NumericsError, UsageError
from p2p.model import Model
from p2p.request.loading import load
from p2p.request.record import Record
from p2p.request.source import Inversion
from p2p.run import Result, edit, generate, upscale
from p2p.sources.methods import invert
from p2p.sources.trace import trace

__version__ = "0.1.0"
__all__ = ["CheckpointError", "Edit", "Inversion", "LocalBlend", "MasaCtrl", "Model", "NumericsError", "PlugAndPlay", "Record",
           "Result", "UsageError", "edit", "generate", "invert", "load", "trace", "upscale"]
