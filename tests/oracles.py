"""diffusers and transformers, which need the same help as open_clip beside a CPU build of torch."""
import diffusers
import transformers

import models.text  # noqa: F401  (defines the missing torchvision operators first)

__all__ = ["diffusers", "transformers"]
