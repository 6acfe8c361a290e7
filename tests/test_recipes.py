"""Every line of the README's table of recipes runs."""
import re
import shlex
from pathlib import Path

import pytest

from p2p.cli.parser import main
from p2p.show.pictures import read_settings

pytestmark = pytest.mark.usefixtures("once")
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^\| ([a-z ]+) \| `p2p (edit [^`]*)` \|$", README, re.M))


def test_the_table_is_there():
    assert {"swap", "add", "remove", "restyle", "recolour", "fade"} <= RECIPES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(capsys, tmp_path, name):
    common = ["--steps", "2", "--seed", "1", "-q", "-o", str(tmp_path)]
    argv = shlex.split(RECIPES[name])
    if "--from" in argv:
        assert main(["edit", "a cat", "a dog", *common]) == 0
        argv, common = [str(next(tmp_path.glob("*/edit.png"))) if word == "PNG" else word for word in argv], common[4:]
    at = argv.index("--for") if "--for" in argv else len(argv)
    assert main([*argv[:at], *common, *argv[at:]]) == 0, capsys.readouterr().err
    settings = read_settings(sorted(tmp_path.glob("*/grid.png"))[-1])
    assert settings["command"] == "edit" and "changes nothing" not in capsys.readouterr().err
