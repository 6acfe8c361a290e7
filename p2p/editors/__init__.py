"""Other ways to edit than Prompt-to-Prompt's: injected through the same argument of the modules, or by
joining predictions."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2p.editors.masactrl import MasaCtrl
from p2p.editors.plug_and_play import PlugAndPlay
from p2p.editors.uni_edit import UniEdit
from p2p.errors import UsageError
from p2p.weights.untrusted import brief

EDITORS = {"masactrl": MasaCtrl, "plug-and-play": PlugAndPlay, "uni-edit": UniEdit}


def find_editor(settings: str | Mapping[str, Any] | None) -> MasaCtrl | PlugAndPlay | UniEdit | None:
    """Returns an editor by its name, or from its record in settings: the class's name and its fields. Raises
    UsageError."""
    if settings is None:
        return None
    try:
        fields = {"name": settings} if isinstance(settings, str) else dict(settings)
        return (EDITORS | {kind.__name__: kind for kind in EDITORS.values()})[fields.pop("name")](**fields)
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"editor {brief(settings)} is not known, or has no such fields; known: "
                         f"{', '.join(EDITORS)}") from None
