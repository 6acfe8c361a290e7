"""Options of the command line: one meaning wherever they are given, and none that is dropped in silence."""
import argparse
import ast
import re
from pathlib import Path

import pytest

import p2p
from benchmarks import paired
from p2p.cli import checks, commands, options, values
from p2p.cli.parser import main, parsers
from p2p.edits import cross_alpha, decided
from p2p.lists import jobs, protocol
from p2p.model import STEPS
from p2p.models.text import tokens
from p2p.request.mask_sites import level_in
from p2p.request.windows import SWAPS
from p2p.show.sweep import sweep

ROOT = Path(__file__).parents[1]
PROMPTS = ["a cat on grass", "a dog on grass"]


def parsed(command, *argv):
    return parsers()[1][command].parse_args([str(a) for a in argv])


@pytest.mark.parametrize("argv, meant", [
    ([], 0.8), (["--cross", "0.4"], 0.4), (["--cross", "0.2:0.9"], (0.2, 0.9)), (["--cross", "dog=0.4"], {"dog": 0.4}),
    (["--cross", "dog=0:0.4", "--cross", "on=0.3"], {"dog": (0, 0.4), "on": 0.3}),
    (["--cross", "dog=0.4", "--cross", "0.8"], {"dog": 0.4, "default_": 0.8})])
def test_a_window_of_a_word_means_the_same_in_a_command_in_python_and_in_a_list(emoji, argv, meant):
    target = tokens(PROMPTS[1])
    listed = {} if not argv else {"cross": {k: list(v) if isinstance(v, tuple) else v for k, v in meant.items()}
                                  if isinstance(meant, dict) else list(meant) if isinstance(meant, tuple) else meant}
    line = {"source": PROMPTS[0], "targets": [PROMPTS[1]], **listed}
    edits = [p2p.Edit(PROMPTS[1], **options.edit_settings(parsed("edit", *PROMPTS, *argv))),
             p2p.Edit(PROMPTS[1], cross_replace_steps=meant), jobs.parse(line, 1, Path(), emoji).targets[0]]
    windows = [decided(tokens(PROMPTS[0]), target, e, "replace", 32).cross_replace_steps for e in edits]
    alphas = [cross_alpha(w, target, 50, 32) for w in windows]
    assert (alphas[0] == alphas[1]).all() and (alphas[0] == alphas[2]).all()


def test_words_that_no_window_names_are_injected_throughout():
    """As in google/prompt-to-prompt, where a missing "default_" is (0, 1)."""
    settings = options.edit_settings(parsed("edit", *PROMPTS, "--cross", "dog=0.4"))
    alpha = cross_alpha(settings["cross_replace_steps"], tokens(PROMPTS[1]), 50, 8)
    assert alpha[:, 2].sum() == 20 and (alpha[:, [0, 1, 3, 4, 5, 6, 7]] == 1).all()


@pytest.mark.parametrize("text, meant", [("0.4", 0.4), ("0.2:0.9", (0.2, 0.9))])
def test_a_benchmark_and_a_sweep_take_the_windows_of_an_edit(text, meant):
    found = values.windows_of_all(parsed("eval", "pie", "--data", "d", "-o", "o", "--cross", text, "--self", text))
    assert found == {"cross": meant, "self_": meant}
    assert values.over([f"cross={text},0.7", f"self={text}"]) == {"cross": [meant, 0.7], "self": [meant]}


@pytest.mark.parametrize("argv", [["eval", "pie", "--data", "d", "-o", "o", "--cross", "dog=0.2"],
                                  ["sweep", *PROMPTS, "--over", "cross=dog=0.2,0.4"]])
def test_a_word_where_none_can_be_named_is_refused(capsys, argv):
    assert main(argv) == 2 and "a window of 'dog' alone" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_over_windows(emoji):
    done = sweep(emoji, *PROMPTS, {"cross": [(0.5, 1), 0.0], "self": [[0, 0.5]]}, steps=2)
    assert [v["cross"] for v in done.variants] == [(0.5, 1.0), 0.0] and done.variants[0]["self"] == (0.0, 0.5)
    alone = p2p.edit(emoji, PROMPTS[0], p2p.Edit(PROMPTS[1], cross_replace_steps=(0.5, 1), self_replace_steps=(0, 0.5)), steps=2)
    assert (done.runs[0].latents[1] - alone.latents[1]).abs().max() < 1e-4
    with pytest.raises(p2p.UsageError, match="names a value twice: 0.5:1, 0.5:1"):
        sweep(emoji, *PROMPTS, {"cross": [(0.5, 1), [0.5, 1]]}, steps=2)
    with pytest.raises(p2p.UsageError, match="cross: .* must lie between 0 and 1"):
        sweep(emoji, *PROMPTS, {"cross": [(0.5, 2)]}, steps=2)


def test_a_row_of_a_benchmark_is_run_with_its_windows():
    method = protocol.find("direct")
    assert method.cross == 0.4 and protocol.find("directinversion+p2p").self_ == 0.6


# ------------------------------------------------------------------------------------------------- nothing is dropped

def shown(action):
    """An option as it is typed, with a value that its parser takes."""
    if action.nargs == 0:
        return [action.option_strings[-1]]
    if action.dest == "for_":
        return ["--for", "1", "--cross", "1"]
    value = {"weight": "a=1", "swap": "a=b", "proximal": "l0"}.get(action.dest, "1")
    return [action.option_strings[0], str(action.choices[0]) if action.choices else value]


def given_options(command):
    return [a for a in parsers()[1][command]._actions if a.option_strings and a.dest != "help"]


@pytest.mark.parametrize("action", [a for a in given_options("edit") if a.dest != "replay"], ids=lambda a: a.option_strings[-1])
def test_every_option_beside_from_is_applied_or_refused(capsys, tmp_path, action):
    code = main(["edit", "--from", str(tmp_path / "absent.png"), *shown(action)])
    said = capsys.readouterr().err
    wanted = "not with --from" if action.dest not in checks.REPLAY else \
        "not without --upscale" if action.dest in checks.ENLARGED else "absent.png: no such file"
    assert code == 2 and wanted in said


class Watched(argparse.Namespace):
    """Remembers what was read of it."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            super().__getattribute__("_seen").add(name)
        return super().__getattribute__(name)


@pytest.mark.slow
def test_what_from_does_not_refuse_is_read(capsys, tmp_path):
    assert main(["edit", *PROMPTS, "--steps", "1", "--seed", "1", "-o", str(tmp_path)]) == 0
    picture = capsys.readouterr().out.split()[0]
    args = Watched(**vars(parsed("edit", "--from", picture, "--upscale", "--upscale-steps", "1", "--leakage", "-o", tmp_path)), _seen=set())
    commands.edit(args)
    assert checks.REPLAY - {"source", "targets"} <= args._seen and not args._seen - checks.REPLAY - {"scope", "preview", "emphasis"}


@pytest.mark.slow
def test_an_enlarged_picture_is_not_made_again_in_another_way(capsys, tmp_path):
    assert main(["edit", *PROMPTS, "--steps", "1", "--seed", "1", "--upscale", "--upscale-steps", "1", "-o", str(tmp_path)]) == 0
    picture = capsys.readouterr().out.split()[0]
    for argv in (["--upscale-steps", "2"], ["--upscale-cfg", "3"], ["--upscale-level", "5"], ["--upscale-edited"]):
        code = main(["edit", "--from", picture, "--upscale", *argv, "-o", str(tmp_path)])
        assert code == 2 and f"{argv[0]}: not with --from a picture that was enlarged" in capsys.readouterr().err


INJECTION = [a for a in given_options("edit") if a.dest in checks.INJECTION]


@pytest.mark.parametrize("action", INJECTION, ids=lambda a: a.option_strings[-1])
def test_every_option_of_an_edit_is_refused_where_there_is_none(capsys, action):
    assert main(["maps", "a cat", *shown(action)]) == 2
    assert f"--{action.dest.strip('_').replace('_', '-')}: not with a prompt without targets" in capsys.readouterr().err


@pytest.mark.parametrize("argv, name", [(["--steps", "20"], "--steps"), (["--cross", "0.3"], "--cross"), (["--no-blend"], "--no-blend"),
                                        (["--editors", "masactrl"], "--editors"), (["--cfg", "3"], "--cfg")])
def test_options_of_rows_are_refused_where_finished_pictures_alone_are_judged(capsys, argv, name):
    assert main(["eval", "pie", "--data", "d", "-o", "o", "--pictures", "theirs=f", *argv]) == 2
    assert f"{name}: not with --pictures and --ways alone" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- defaults

def test_defaults_in_help_texts_are_those_of_the_code():
    """They are written out there, so that --help need not import torch."""
    blend, row = p2p.LocalBlend(), protocol.find("directinversion+p2p")
    wanted = {"edit": {"cross": SWAPS.cross, "self_": SWAPS.self_, "blend_threshold": blend.threshold,
                       "blend_start": blend.start, "blend_level": level_in(None, blend.level), "steps": STEPS},
              "eval": {"cross": row.cross, "self_": row.self_, "steps": row.steps, "cfg": row.guidance_scale, "seed": row.seed}}
    for command, defaults in wanted.items():
        said = {a.dest: a.help for a in given_options(command)}
        for name, value in defaults.items():
            assert f"{value:g}" in re.findall(r"[\d.]*\d", said[name]), (command, name)


def test_every_argument_says_what_it_is():
    for name, parser in parsers()[1].items():
        assert [a.dest for a in parser._actions if not a.help] == [], name


def of_steps(node):
    """What stands for a number of steps, as a default, a keyword, a field or an entry."""
    if isinstance(node, ast.arguments):
        named = [*zip([a.arg for a in [*node.posonlyargs, *node.args]][::-1], node.defaults[::-1]),
                 *zip([a.arg for a in node.kwonlyargs], node.kw_defaults)]
    elif isinstance(node, ast.Dict):
        named = [(key.value if isinstance(key, ast.Constant) else "", value) for key, value in zip(node.keys, node.values)]
    elif isinstance(node, ast.keyword):
        named = [(node.arg, node.value)]
    elif isinstance(node, ast.AnnAssign):
        named = [(ast.unparse(node.target), node.value)]
    else:
        named = []
    for name, value in named:
        if name == "steps":
            yield from (n.value for n in ast.walk(value) if isinstance(n, ast.Constant)) if value else ()


@pytest.mark.slow
def test_the_number_of_steps_is_written_once():
    """Published rows have their own."""
    assert list(of_steps(ast.parse("f(steps=50)").body[0].value.keywords[0])) == [50]
    for file in (ROOT / "p2p").rglob("*.py"):
        found = [value for node in ast.walk(ast.parse(file.read_text())) for value in of_steps(node)]
        assert STEPS not in found or file.name == "protocol.py", file


@pytest.mark.parametrize("text, meant", [
    ("direct,ddim", ["direct", "ddim"]), ("direct, MasaCtrl,ddim", ["direct, MasaCtrl", "ddim"]),
    ("ddim, direct", ["ddim", "direct"]), ("negative-prompt,proximal", ["negative-prompt, proximal"]),
    (",".join(paired.METHODS), list(paired.METHODS))])
def test_the_methods_of_the_paired_benchmark_are_separated_by_commas(text, meant):
    assert paired.named(text) == meant


EMPTY = {   # what is false of itself is given all the same
    "--side 0: maps are recorded at": ["maps", "a cat", "--steps", "1", "--side", "0"],
    "no picture of editing type": ["eval", "pie", "--data", "DATA", "-o", "o", "--types", ""],
    "--editors : known are": ["eval", "pie", "--data", "DATA", "-o", "o", "--editors", ""],
    ": no method; published:": ["eval", "pie", "--data", "DATA", "-o", "o", "--methods", ""],
}


@pytest.mark.parametrize("message", EMPTY)
def test_what_is_empty_or_zero_is_given_too(capsys, tmp_path, message):
    (tmp_path / "mapping_file.json").write_text('{"0": {"image_path": "0.jpg", "original_prompt": "a", "editing_prompt": "b", '
                                                '"mask": [], "editing_type_id": "0"}}')
    argv = [str(tmp_path) if word == "DATA" else word for word in EMPTY[message]]
    assert main([*argv, "-o", str(tmp_path / "out")]) == 2 and message in capsys.readouterr().err
