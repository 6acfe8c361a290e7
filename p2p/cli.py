"""The command line. Exit codes: 0 done, 2 usage, 3 model file, 4 numerics."""
from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

USAGE, MODEL_FILE, NUMERICS = 2, 3, 4


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole program's parser, and one for each command."""
    ap = argparse.ArgumentParser(prog="p2p", description="Edit a picture by editing its prompt (Prompt-to-Prompt).")
    commands = ap.add_subparsers(dest="command", required=True, metavar="COMMAND")

    e = commands.add_parser("edit", help="generate a picture and edit it by its prompt",
                            description='Example: p2p edit "a cat on grass" "a dog on grass"')
    e.add_argument("source", nargs="?", help="prompt of the picture to be edited")
    e.add_argument("targets", nargs="*", metavar="TARGET", help="prompts of the edited pictures")
    e.add_argument("--from", dest="replay", type=Path, metavar="PNG", help="run the edit again that made this picture")
    e.add_argument("--mode", choices=["replace", "refine", "reweight"], help="default: chosen from the prompts")
    e.add_argument("--cross", "--cross-replace-steps", action="append", metavar="[WORD=]END|START:END",
                   help="share of the steps with the source's cross-attention, for all words or for one (0.8)")
    e.add_argument("--self", "--self-replace-steps", dest="self_", metavar="END|START:END",
                   help="the same for self-attention (0.4)")
    e.add_argument("--weight", action="append", metavar="WORD=C", help="multiply the attention of a word")
    e.add_argument("--aligner", choices=["exact", "official"], default="exact", help="official: google/prompt-to-prompt's mappers")
    _sampling(e)

    g = commands.add_parser("generate", help="generate pictures", description='Example: p2p generate "a red car at night"')
    g.add_argument("prompts", nargs="+", metavar="PROMPT")
    _sampling(g)

    t = commands.add_parser("tokens", help="show the tokens of prompts, and which of two prompts belong together",
                            description='Example: p2p tokens "a cat on grass" "a hippopotamus on grass"')
    t.add_argument("prompts", nargs="+", metavar="PROMPT")

    i = commands.add_parser("inspect", help="say what a model file is, without loading it")
    i.add_argument("file", help="a .safetensors or .ckpt file, a diffusers folder, or org/name on the Hub")
    i.add_argument("--hash", action="store_true", help="also its sha256")

    c = commands.add_parser("convert", help="write a model in another format")
    c.add_argument("file", metavar="IN", help="as for inspect")
    c.add_argument("out", metavar="OUT", type=Path, help="a .safetensors file, or a new folder in the layout of diffusers")
    c.add_argument("--half", action="store_true", help="in float16")
    for sub in (i, c):
        _model_options(sub)
    return ap, dict(commands.choices)


def _sampling(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("--model", default=None, help='"emoji" (bundled, the default), a Stable Diffusion file or folder, or '
                    "org/name on the Hub")
    _model_options(ap)
    ap.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32 on a CPU, as stored elsewhere")
    ap.add_argument("--steps", "--num-inference-steps", type=int, default=50)
    ap.add_argument("--cfg", "--guidance-scale", type=float, default=None, help="default: the model's own")
    ap.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    ap.add_argument("--eta", type=float, default=0.0, help="0: DDIM, 1: DDPM")
    ap.add_argument("--height", type=int, default=None, help="of the picture, in pixels; default: what the model was made for")
    ap.add_argument("--width", type=int, default=None)
    ap.add_argument("--device", default=None)
    ap.add_argument("-o", "--out", type=Path, default=Path("out"), help="folder; every run makes a new one inside (out)")
    ap.add_argument("-q", "--quiet", action="store_true")


def _model_options(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("--family", choices=["sd1", "sd2", "sdxl", "emoji"], help="insist on this family")
    ap.add_argument("--prediction", choices=["eps", "v", "x0"], help="what the model predicts, where that was guessed wrongly")
    ap.add_argument("--vae", type=Path, help="another autoencoder: a file, or a diffusers vae folder")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. Messages go to stderr, what was written to stdout."""
    argv = sys.argv[1:] if argv is None else argv
    ap, commands = parsers()
    try:
        if argv and argv[0] in commands:   # prompts may stand before, between and after the options
            args = commands[argv[0]].parse_intermixed_args(argv[1:], argparse.Namespace(command=argv[0]))
        else:
            args = ap.parse_args(argv)
    except SystemExit as stop:   # argparse has said what was wrong
        return int(stop.code or 0)
    from p2p.errors import NumericsError, UsageError
    from weights.errors import CheckpointError

    try:
        {"edit": _edit, "generate": _generate, "tokens": _tokens, "inspect": _inspect, "convert": _convert}[args.command](args)
    except CheckpointError as error:
        return _fail(error, MODEL_FILE)
    except NumericsError as error:
        return _fail(error, NUMERICS)
    except UsageError as error:
        return _fail(error, USAGE)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: object, code: int) -> int:
    print(f"p2p: {message}", file=sys.stderr)
    return code


# ------------------------------------------------------------------------------------------------------- commands

def _edit(args: argparse.Namespace) -> None:
    import p2p

    if args.replay:
        if args.source is not None:
            raise p2p.UsageError("--from takes the prompts from the picture; give either prompts or --from")
        return _replay(args)
    if args.source is None or not args.targets:
        raise p2p.UsageError('edit needs a source prompt and at least one target: p2p edit "a cat on grass" "a dog on grass"')
    out = _Output(args.out, args.source)
    shared: dict[str, Any] = dict(mode=args.mode, aligner=args.aligner)
    if args.cross:
        shared["cross_replace_steps"] = _cross(args.cross)
    if args.self_:
        shared["self_replace_steps"] = _window(args.self_, "--self")
    if args.weight:
        shared["equalizer"] = dict(_weight(w) for w in args.weight)
    model, sampling = _model(args)
    result = p2p.edit(model, args.source, args.targets, **shared, **sampling, progress=not args.quiet)
    out.write(result, _names(len(result.images)), args.quiet)


def _generate(args: argparse.Namespace) -> None:
    import p2p

    out = _Output(args.out, args.prompts[0])
    model, sampling = _model(args)
    result = p2p.generate(model, args.prompts, **sampling, progress=not args.quiet)
    out.write(result, [f"{i + 1}" for i in range(len(result.images))], args.quiet)


def _replay(args: argparse.Namespace) -> None:
    """Runs the edit again whose settings a picture holds."""
    import torch

    import p2p
    from p2p.edit import from_dict
    from p2p.image import read_settings

    s = read_settings(args.replay)
    try:
        if s["command"] != "edit":
            raise p2p.UsageError(f'{args.replay}: made by "p2p {s["command"]}", not by an edit')
        if s["seed"] is None:
            raise p2p.UsageError(f"{args.replay}: made from a noise tensor given in Python, which is not recorded")
        edits = [from_dict(t) for t in s["targets"]]
        out = _Output(args.out, s["source"])
        model = p2p.load(args.model or s["model"], args.family, s["prediction"], args.device, getattr(torch, s["dtype"]), args.vae)
        if model.sha256 != s["sha256"]:
            raise p2p.CheckpointError(f"{model.file}: not the weights that made {args.replay} (sha256 {str(model.sha256)[:12]}, "
                                      f"recorded {str(s['sha256'])[:12]}); give the right file with --model")
        result = p2p.edit(model, s["source"], edits, steps=s["steps"], guidance_scale=s["guidance_scale"], seed=s["seed"],
                          eta=s["eta"], height=s["height"], width=s["width"], progress=not args.quiet)
    except (KeyError, TypeError, AttributeError) as error:
        raise p2p.UsageError(f"{args.replay}: its settings are not complete ({error})") from None
    out.write(result, _names(len(result.images)), args.quiet)


def _tokens(args: argparse.Namespace) -> None:
    from models.text import tokenizer, tokens
    from p2p import align

    split = [tokens(p) for p in args.prompts]
    for t in split:
        print(t.text)
        for i, (token, (start, end)) in enumerate(zip(t.ids, t.spans)):
            print(f"  {i:3}  {token:5}  {tokenizer().decode([token]).strip():20} {t.text[start:end]}".rstrip())
    for target in split[1:]:
        length = max(77, len(split[0].ids), len(target.ids))
        mapper, a = align.refinement(split[0], target, length)
        print(f"{target.text!r} from {split[0].text!r}: token of the target <- token of the source")
        for j in range(len(target.ids)):
            print(f"  {j:3} <- {int(mapper[j]) if a[j] else 'new'}")


def _inspect(args: argparse.Namespace) -> None:
    from weights.inspect import report

    print("\n".join(report(args.file, args.family, args.prediction, args.vae, args.hash)))


def _convert(args: argparse.Namespace) -> None:
    from weights.convert import convert
    from weights.load import find

    package = find(args.file, args.family, args.prediction, args.vae)
    convert(package, args.out, args.half)
    print(args.out)


# ------------------------------------------------------------------------------------------------------ arguments

def _model(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    import torch

    import p2p

    seed = args.seed
    if seed is None:
        seed = secrets.randbelow(2**31)
        print(f"seed {seed}", file=sys.stderr)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        model = p2p.load(args.model or "emoji", args.family, args.prediction, args.device, dtype, args.vae)
    except RuntimeError as error:   # torch's own word on a device that is not there
        raise p2p.UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    return model, dict(steps=args.steps, guidance_scale=args.cfg, seed=seed, eta=args.eta, height=args.height, width=args.width)


def _number(text: str, what: str) -> float:
    from p2p.errors import UsageError

    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{what}: {text!r} is not a number") from None


def _window(text: str, what: str) -> float | tuple[float, float]:
    parts = [_number(p, what) for p in text.split(":", 1)]
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _cross(items: list[str]) -> Any:
    named = [item.rpartition("=") for item in items]
    windows = {word or "default_": _window(value, f"--cross {item}") for item, (word, _, value) in zip(items, named)}
    if list(windows) == ["default_"]:
        return windows["default_"]
    return {"default_": 0.8} | windows


def _weight(item: str) -> tuple[str, float]:
    from p2p.errors import UsageError

    word, equals, value = item.rpartition("=")
    if not equals or not word:
        raise UsageError(f"--weight {item!r}: expected WORD=NUMBER")
    return word, _number(value, f"--weight {item}")


# --------------------------------------------------------------------------------------------------------- output

def _names(n: int) -> list[str]:
    return ["source", *(["edit"] if n == 2 else [f"edit-{i}" for i in range(1, n)])]


class _Output:
    """A new numbered folder for every run, filled aside and moved into place whole; nothing is ever overwritten."""

    def __init__(self, parent: Path, title: str):
        from p2p.errors import UsageError

        self.parent = parent
        self.slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:48] or "run"
        try:   # before minutes of sampling, not after
            parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise UsageError(f"--out {parent}: cannot be written ({error.strerror})") from None

    def write(self, result: Any, names: list[str], quiet: bool) -> Path:
        from p2p.errors import UsageError
        from p2p.image import grid, save_png

        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
        aside = Path(tempfile.mkdtemp(prefix=".p2p-", dir=self.parent))
        try:
            for name, image in zip(names, result.images):
                save_png(aside / f"{name}.png", image, result.settings)
            save_png(aside / "grid.png", grid(result.images, result.prompts), result.settings)
            (aside / "settings.json").write_text(json.dumps(result.settings, indent=2) + "\n")
            aside.chmod(0o755)
            folder = self._move(aside)
        except OSError as error:
            raise UsageError(f"--out {self.parent}: cannot be written ({error.strerror})") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        if not quiet:
            for file in [*(f"{n}.png" for n in names), "grid.png"]:
                print(folder / file)
        return folder

    def _move(self, aside: Path) -> Path:
        taken = [int(m.group(1)) for p in self.parent.iterdir() if (m := re.match(r"(\d+)-", p.name))]
        number = max(taken, default=0) + 1
        while True:
            folder = self.parent / f"{number:04}-{self.slug}"
            try:
                folder.mkdir()               # fails if another run took the number meanwhile
            except FileExistsError:
                number += 1
                continue
            os.replace(aside, folder)        # an empty folder is replaced in one step
            return folder
