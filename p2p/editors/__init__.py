"""Other ways to inject than Prompt-to-Prompt's, through the same argument of the modules."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2p.editors.masactrl import MasaCtrl
from p2p.editors.plug_and_play import PlugAndPlay
from p2p.errors import UsageError
from p2p.weights.untrusted import brief

EDITORS = {"masactrl": MasaCtrl, "plug-and-play": PlugAndPlay}


def find_editor(said: str | Mapping[str, Any] | None) -> MasaCtrl | PlugAndPlay | None:
    """An editor by its name, or as settings record it: its class's name and its fields. Raises UsageError."""
    if said is None:
        return None
    try:
        how = {"name": said} if isinstance(said, str) else dict(said)
        return (EDITORS | {kind.__name__: kind for kind in EDITORS.values()})[how.pop("name")](**how)
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"editor {brief(said)} is not known, or has no such fields; known: "
                         f"{', '.join(EDITORS)}") from None
