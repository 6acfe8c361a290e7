"""Checks of the arguments before torch is imported: a command reads every option that is given, or refuses
it. Each function raises UsageError."""
from __future__ import annotations

import argparse
from importlib.util import find_spec

from p2p.cli import arguments, groups, values
from p2p.cli.values import given_options, options_of, refuse
from p2p.errors import UsageError
from p2p.request.checks import whole

EDIT = options_of(arguments.edit)
INJECTION = options_of(groups.injection)
BLEND = tuple(name for name in INJECTION if name.startswith("blend"))
INVERSION = options_of(groups.inversion)
SCHEDULE = ("sampler", "timestep_spacing", "timesteps")
ENLARGED = ("upscale_steps", "upscale_cfg", "upscale_level", "upscale_edited")
# What --from may change of a picture's settings: what is injected, and how source and edits are sampled.
SAMPLED = ("steps", "cfg", "seed", "eta", "negative", "proximal")
# --emphasis is of brackets in prompts, which a picture records as weights.
CHANGES = (*(name for name in INJECTION if name != "emphasis"), "for_", *SAMPLED, *SCHEDULE, "height",
           "width", *(name for name in INVERSION if name != "fit"))   # the recorded picture is fitted already
# Options that --from allows: these, the model's files, where and how it runs, and the output. All others are
# recorded in the picture.
REPLAY = {"source", "targets", "replay", "model", "family", "vae", "text", "lora", "embedding", "device",
          "compile", "offload", "upscale", "upscaler", *ENLARGED, "report", "leakage", "out", "verbose",
          "quiet", *CHANGES}
# of `eval`, read by rows of --methods
ROWS = ("editors", "steps", "cfg", "seed", "cross", "self_", "no_blend")


def _upscaling(args: argparse.Namespace) -> None:
    if not args.upscale and args.upscaler is None and (options := given_options(args, ENLARGED)):
        raise UsageError(f"{', '.join(options)}: not without --upscale")


def _source(args: argparse.Namespace) -> None:
    """Refuses options that the source, a prompt or a picture, does not read."""
    if args.image is None:
        refuse(args, "a source prompt alone", INVERSION)
    else:
        refuse(args, "--image, whose edits are sampled by the steps of its inversion", ["sampler"])


def edit(args: argparse.Namespace) -> None:
    _upscaling(args)
    if args.replay is not None:
        if args.source is not None:
            raise UsageError("--from takes the prompts from the picture; give either prompts or --from")
        refuse(args, "--from, which does as the picture records",
               [name for name in EDIT if name not in REPLAY])
        for section in (args, *(args.for_ or {}).values()):
            refuse(section, "--from, which does as the picture records", ["emphasis"])
            values.given(section)
        values.proximal(args)
        values.timesteps(args)
        return
    if args.preview:
        refuse(args, "--preview, which writes preview.png alone",
               ("report", "leakage", "upscale", "upscaler"))
    if args.inversion is not None and args.image is not None:
        raise UsageError("give --image or --inversion, not both")
    if len(values.prompts(args)) < (2 if args.inversion is None else 1):
        raise UsageError('edit needs a source prompt and at least one target: p2p edit "a cat on grass" "a '
                         'dog on grass"')
    if args.inversion is not None:
        refuse(args, "--inversion",
               ("preview", "steps", "seed", "eta", "height", "width", *SCHEDULE, *INVERSION))
    else:
        _source(args)
    if args.editor is not None:
        for section in (args, *(args.for_ or {}).values()):
            refuse(section, "--editor (these are Prompt-to-Prompt's)",
                   [name for name in INJECTION if name not in ("mode", "scope", "emphasis", *BLEND)])
        refuse(args, "--editor, which injects into its own model alone", ["upscale_edited"])
    count = len(values.prompts(args)) - (args.inversion is None)
    values.check_blends(values.changed_by_target(args, count))
    values.proximal(args)
    values.timesteps(args)


def generate(args: argparse.Namespace) -> None:
    _upscaling(args)
    if args.replay is not None:
        if args.prompts:
            raise UsageError("--from takes the prompts from the picture; give either prompts or --from")
        refuse(args, "--from, which does as the picture records",
               [name for name in options_of(arguments.generate) if name not in ("prompts", *REPLAY)])
    elif not args.prompts:
        raise UsageError('generate needs a prompt: p2p generate "a red car at night"')
    if args.prompts and isinstance(args.seed, list) and len(args.prompts) not in (1, len(args.seed)):
        raise UsageError(f"--seed: {len(args.seed)} seeds and {len(args.prompts)} prompts; give one prompt, "
                         "or one for each seed")
    values.timesteps(args)


def invert(args: argparse.Namespace) -> None:
    _one_negative(args, "p2p invert")
    refuse(args, "p2p invert: it decodes no picture", ["tile"])
    refuse(args, "p2p invert, which inverts by --method", ["sampler"])
    values.timesteps(args)


def maps(args: argparse.Namespace) -> None:
    _source(args)
    values.timesteps(args)
    if args.targets:
        values.check_blends(values.changed_by_target(args, len(args.targets)))
    else:
        refuse(args, "a prompt without targets", (*INJECTION, "for_"))
        _one_negative(args, "p2p maps of a picture" if args.image is not None else "p2p maps of a prompt")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens}: at least one position is needed")
    if args.steps_range is not None:
        values.window(args.steps_range, "--at")


def sweep(args: argparse.Namespace) -> None:
    _source(args)
    if "seed" in values.over(args.over):
        refuse(args, "--over seed=...: a picture has its noise", ["image"])
        refuse(args, "--over seed=...", ["seed"])
    values.check_blends([values.given(args)])
    values.timesteps(args)


def batch(args: argparse.Namespace) -> None:
    _positive(args, "workers", "together", "preview")
    if args.preview is not None:
        refuse(args, "--preview, which runs the first jobs one by one in this process",
               ("workers", "together", "retry_failed"))
        if args.engine != "local":
            raise UsageError(f"--engine {args.engine}: not with --preview, which runs in this process")
    values.check_blends([values.given(args)])
    values.proximal(args)
    values.timesteps(args)


def evaluate(args: argparse.Namespace) -> None:
    _positive(args, "limit", "workers")
    if args.engine == "torchrun" and args.retry_failed:
        raise UsageError("--retry-failed: not with --engine torchrun, whose first rank cannot tell which "
                         "jobs ran again")
    if args.strips and args.pictures is None:
        raise UsageError("--strips: of --pictures NAME=FOLDER, which is not given")
    if args.methods is None and (args.pictures is not None or args.ways is not None):
        refuse(args, "--pictures and --ways alone: rows of --methods read it", ROWS)
    values.windows_of_all(args)


def dataset(args: argparse.Namespace) -> None:
    _positive(args, "samples", "keep", "steps", "together", "preview")
    if args.preview is not None:
        refuse(args, "--preview, which draws one sample of a prompt", ("samples", "keep", "together"))
        if args.format != "folders":
            raise UsageError(f"--format {args.format}: not with --preview, which writes preview.png alone")


def web(args: argparse.Namespace) -> None:
    if args.port is not None:
        whole("--port", args.port, most=65535)
    if find_spec("gradio") is None:
        raise UsageError("p2p web needs Gradio: pip install -e '.[web]' in the clone")


def _one_negative(args: argparse.Namespace, command: str) -> None:
    if args.negative is not None and len(args.negative) > 1:
        raise UsageError(f"--negative: {len(args.negative)} given; {command} has one row")


def _positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UsageError for options below 1."""
    for name in names:
        if (value := getattr(args, name)) is not None:
            whole(f"--{name}", value)
