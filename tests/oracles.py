"""diffusers and transformers, which need the same help as open_clip beside a CPU build of torch."""
from importlib import import_module

import diffusers
import transformers

import p2p.models.text  # noqa: F401  (defines the missing torchvision operators first)

attention_processor = import_module("diffusers.models.attention_processor")

__all__ = ["attention_processor", "diffusers", "transformers"]
