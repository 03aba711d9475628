"""That the README's examples speak of what there is: each name, and each argument that is given by name."""

import ast
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def look_up(node: ast.expr, scope: dict):
    """What a name or a chain of attributes stands for; None for what only a run can tell."""
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute) and inspect.ismodule(module := look_up(node.value, scope)):
        return getattr(module, node.attr)
    return None


def test_the_examples_call_what_there_is():
    scope, called = {}, set()
    for tree in map(ast.parse, EXAMPLES):
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "README.md", "exec"), scope)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if (function := look_up(call.func, scope)) is not None:
                called.add(ast.unparse(call.func))
                assert {word.arg for word in call.keywords} <= inspect.signature(function).parameters.keys()
    assert {"ss.load", "patching.zero", "firsttoken.probe", "sinks.score", "amplifier.census", "train"} <= called
    with pytest.raises(AttributeError):
        look_up(ast.parse("ss.lode", mode="eval").body, scope)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^(?:\w+=\S+ )*make (\w+)", README, flags=re.MULTILINE))))
def test_each_make_command_is_a_target(target):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}: .*##", makefile, flags=re.MULTILINE)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("module", "stage"), sorted(set(re.findall(r"-m (spikesink\S*) (\w*)", README))))
def test_each_module_that_is_run_answers_to_help(module, stage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, *([stage] if module == "spikesink" else []), "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__")
    assert left.value.code in (0, None)
    assert "usage: " in capsys.readouterr().out
