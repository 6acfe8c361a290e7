"""The command line. Exit codes: 0 done, 1 some jobs or prompts of a list failed, 2 usage, 3 model file, 4
numerics, 130 interrupted (by SIGTERM 143, by SIGHUP 129)."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import TextIOWrapper
from typing import NamedTuple, NoReturn

from p2p import __version__
from p2p.cli import arguments, checks, groups
from p2p.errors import CheckpointError, NumericsError, UsageError
from p2p.lists.stop import Lasting, at_once, exit_code, stoppable, unmasked
from p2p.weights.untrusted import printable

USAGE, MODEL_FILE, NUMERICS = 2, 3, 4


class Command(NamedTuple):
    help: str                                                   # of `p2p --help`
    arguments: Callable[[argparse.ArgumentParser], None]
    # checks that need no imports
    check: Callable[[argparse.Namespace], None] | None = None
    description: str | None = None                              # of `p2p COMMAND --help`


COMMANDS: dict[str, Command] = {
    "edit": Command("generate a picture and edit it by its prompt", arguments.edit, checks.edit,
        'Example: p2p edit "a cat on grass" "a dog on grass"'),
    "invert": Command("prepare a real picture for edits", arguments.invert, checks.invert,
        'Example: p2p invert photo.png "a cat on grass"'),
    "generate": Command("generate pictures", arguments.generate, checks.generate,
                        'Example: p2p generate "a red car at night"'),
    "maps": Command("show which pixels attend to which words", arguments.maps, checks.maps,
        'Example: p2p maps "a cat next to a house on grass"'),
    "sweep": Command("one edit under many settings, as a labelled table", arguments.sweep, checks.sweep,
        'Example: p2p sweep "a cat on grass" "a dog on grass" --over cross=0,0.4,0.8'),
    "batch": Command("run a list of edits; stopped and started again, it goes on where it was",
                     arguments.batch, checks.batch,
        'Every line of JOBS is an object: {"source": PROMPT, "targets": [PROMPT, ...], "seed": 1, '
        '...} with any setting of an edit; "image": FILE for a real picture; "id" and '
        '"tags" are your own. Settings given here are those of lines that have none of their '
        "own and read them. Example: p2p batch jobs.jsonl --out DIR --steps 20"),
    "eval": Command("run a benchmark of edits of real pictures, and print its tables", arguments.evaluate,
                    checks.evaluate,
        "Rows of --methods are published ones, named and set as in PnPInversion's tables "
        "(ddim+p2p, null-text-inversion+p2p, negative-prompt-inversion+p2p, directinversion+p2p, "
        "null-text-inversion+proximal-guidance, negative-prompt-inversion+proximal-guidance, "
        "edit-friendly-inversion+p2p, ddim+masactrl, directinversion+masactrl, ddim+pnp, "
                    "directinversion+pnp, directinversion+p2p_guidance_A_B, "
                    "ablation_directinversion_step_N+p2p), or corrected ones, named by our inversions "
                    "(direct, ddim, ...; see --editors), in which modes are chosen from the prompts and "
                    "blended words that are missing are failures. The names published and corrected stand "
                    "for the main rows of either. Another run into the same folder adds rows. Exit code 1: "
                    "an item of these rows failed. Example: p2p eval pie --data PIE-Bench --out DIR "
                    "--methods directinversion+p2p,direct --lpips FILE"),
    "dataset": Command("make training pairs for an editor that follows instructions", arguments.dataset,
                       checks.dataset,
        'Every line of PROMPTS is {"caption": TEXT, "edit": INSTRUCTION, "output": EDITED TEXT}. '
        "Example: p2p dataset --recipe ip2p prompts.jsonl --out DIR --clip FILE"),
    "web": Command("serve a page for the browser, with a fader for every word", arguments.web, checks.web,
                   "Example: p2p web --port 7860"),
    "tokens": Command("show the tokens of prompts, and which of two prompts belong together",
                      arguments.tokens, None,
        'Example: p2p tokens "a cat on grass" "a hippopotamus on grass"'),
    "encode": Command("encode prompts with T5 (of IF, Stable Diffusion 3, FLUX), for runs without it",
                      arguments.encode,
                      None,
        'Example: p2p encode "a cat on grass" "a dog on grass" --model IF-I-M'),
    "inspect": Command("say what a model file is, without loading it", arguments.inspect),
    "convert": Command("write a model in another format", arguments.convert),
}


class Parser(argparse.ArgumentParser):
    """Errors without the usage, which is twenty lines."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}\n{self.prog} --help lists the options\n")


@cache
def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole program's parser, and one for each command."""
    ap = Parser(prog="p2p", description="Edit a picture by editing its prompt (Prompt-to-Prompt).")
    ap.add_argument("--version", action="version", version=f"p2p {__version__}")
    commands = ap.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help, description=command.description))
    return ap, dict(commands.choices)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. Messages go to stderr, what was written to stdout."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt may hold more than the terminal can show
    with redirect_stdout(Lasting(sys.stdout)), redirect_stderr(Lasting(sys.stderr)), stoppable():
        try:
            code = _run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt as stop:
            return _fail("interrupted", exit_code(stop))
        except OSError as error:   # of stdout on a full disk, or of what nothing else reports
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror or error}", USAGE)


def _run(argv: list[str]) -> int:
    ap, commands = parsers()
    try:
        if argv and argv[0] in commands:
            args = _parsed(argv[0], commands[argv[0]], argv[1:])
        else:
            args = ap.parse_args(argv)
    except SystemExit as stop:   # argparse has said what was wrong
        return int(stop.code or 0)
    try:
        with unmasked():
            if check := COMMANDS[args.command].check:
                check(args)
            return _function(args.command)(args) or 0
    except CheckpointError as error:
        return _fail(error, MODEL_FILE)
    except NumericsError as error:
        return _fail(error, NUMERICS)
    except UsageError as error:
        return _fail(error, USAGE)


def _parsed(command: str, parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Prompts may stand before, between and after the options; what follows --for N is of target N alone."""
    takes = any(action.dest == "for_" for action in parser._actions)
    starts = [i for i, word in enumerate(argv) if word.partition("=")[0] == "--for"] if takes else []
    head = argv[:starts[0]] if starts else argv
    args = parser.parse_intermixed_args(head, argparse.Namespace(command=command))
    for start, end in zip(starts, [*starts[1:], len(argv)]):
        first, *more = argv[start].partition("=")[2:] + tuple(argv[start + 1:end])
        number, more = (first, more) if first else ("".join(more[:1]), more[1:])
        if not number.isdecimal() or int(number) in (args.for_ or {}) or not more:
            parser.error(f"{f'--for {number}'.strip()}: the number of a target is needed, once, and options "
                         "for it: --for 2 --cross 0.3")
        of_one = Parser(prog=parser.prog, add_help=False)
        groups.injection(of_one)
        section, left = of_one.parse_known_args(more)
        if left:
            parser.error(f"--for {number}: {' '.join(left)}: not of one target; give it before the first "
                         "--for")
        args.for_ = {**(args.for_ or {}), int(number): section}
    return args


def _function(command: str) -> Callable[[argparse.Namespace], int | None]:
    """The function that runs a command. It is imported here: torch takes seconds, and help and usage errors
    do not need it."""
    with at_once():
        if command in ("batch", "eval", "dataset"):
            from p2p.cli import bulk
            return {"batch": bulk.batch, "eval": bulk.evaluate, "dataset": bulk.make_dataset}[command]
        if command in ("tokens", "encode", "inspect", "convert"):
            from p2p.cli import files
            return {"tokens": files.show_tokens, "encode": files.encode, "inspect": files.inspect,
                    "convert": files.convert}[command]
        from p2p.cli import commands as run
        return {"edit": run.edit, "invert": run.invert, "generate": run.generate, "maps": run.maps,
                "sweep": run.sweep, "web": run.web}[command]


def _fail(message: object, code: int) -> int:
    print(f"p2p: {printable(message)}", file=sys.stderr)
    return code
