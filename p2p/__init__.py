"""Prompt-to-Prompt image editing in plain PyTorch: edit a picture by editing its prompt.

    import p2p
    model = p2p.load("emoji")
    r = p2p.edit(model, "a cat on grass", "a dog on grass")
    r.images[1].show()
"""
from models.attention import Record
from p2p.blend import LocalBlend
from p2p.cascade import upscale
from p2p.edit import Edit
from p2p.errors import NumericsError, UsageError
from p2p.invert import Inversion, invert
from p2p.masactrl import MasaCtrl
from p2p.model import Model, load
from p2p.plug_and_play import PlugAndPlay
from p2p.run import Result, edit, generate
from p2p.trace import trace
from weights.errors import CheckpointError

__version__ = "0.1.0"
__all__ = ["CheckpointError", "Edit", "Inversion", "LocalBlend", "MasaCtrl", "Model", "NumericsError", "PlugAndPlay", "Record",
           "Result", "UsageError", "edit", "generate", "invert", "load", "trace", "upscale"]
