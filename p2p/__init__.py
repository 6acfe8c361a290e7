"""Prompt-to-Prompt image editing in plain PyTorch: edit a picture by editing its prompt.

    import p2p
    model = p2p.load("emoji")
    r = p2p.edit(model, "a cat on grass", "a dog on grass")
    r.images[1].show()
"""
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not (Path(__file__).parent / "models").is_dir():   # a clone: models/ and weights/ lie beside this folder
    __path__.append(str(Path(__file__).parents[1]))

from p2p.errors import CheckpointError, NumericsError, UsageError

__version__ = "0.2.0.dev0"
__all__ = ["CheckpointError", "Edit", "Inversion", "LocalBlend", "MasaCtrl", "Model", "NumericsError",
           "PlugAndPlay", "Record", "Result", "UniEdit", "UsageError", "edit", "generate", "invert", "load",
           "steps", "trace", "upscale"]

if TYPE_CHECKING:
    from p2p.blend import LocalBlend
    from p2p.editors.masactrl import MasaCtrl
    from p2p.editors.plug_and_play import PlugAndPlay
    from p2p.editors.uni_edit import UniEdit
    from p2p.edits import Edit
    from p2p.model import Model
    from p2p.request.loading import load
    from p2p.request.record import Record
    from p2p.request.source import Inversion
    from p2p.run import Result, edit, generate, steps, upscale
    from p2p.sources.methods import invert
    from p2p.sources.trace import trace
else:
    _HOME = {"LocalBlend": "blend", "MasaCtrl": "editors.masactrl", "PlugAndPlay": "editors.plug_and_play",
             "UniEdit": "editors.uni_edit",
             "Edit": "edits", "Model": "model", "load": "request.loading", "Record": "request.record",
             "Inversion": "request.source", "Result": "run", "edit": "run", "generate": "run",
             "steps": "run", "upscale": "run", "invert": "sources.methods", "trace": "sources.trace"}

    def __getattr__(name: str) -> Any:
        """A public name, or a submodule, when it is first asked for (PEP 562): torch takes
        seconds to import."""
        if name in _HOME:
            value = globals()[name] = getattr(import_module(f"p2p.{_HOME[name]}"), name)
            return value
        if not name.startswith("_") and find_spec(f"p2p.{name}"):
            return import_module(f"p2p.{name}")
        raise AttributeError(f"module 'p2p' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
