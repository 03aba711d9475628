"""One command: what it asks for is known without torch, and each part imports what it needs and no more."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from threading import Thread

import pytest

from spikesink import cli
from spikesink.__main__ import COMMANDS, main
from spikesink.lab.families import BASES

ROOT = Path(__file__).parent.parent
LOADED = "; import sys; print([name for name in sys.modules if name.startswith(('torch', 'spikesink.'))])"


def modules(script: str) -> set[str]:
    """The modules of spikesink, and torch, that are loaded after a script in a process of its own."""
    ran = subprocess.run([sys.executable, "-c", script + LOADED], capture_output=True, text=True, check=True)
    return set(eval(ran.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_to_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("usage: spikesink ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["no-such"], "invalid choice: 'no-such'"),
        (["report", "a", "--n-prompts", "3"], "whole number of at least 4"),
        (["report", "a", "--out", " "], "empty name is no folder"),
        (["figures", "--seq-len", "1.5"], "whole number of at least 2"),
        (["figures", "--model", " , "], "names no model"),
        (["figures", "--model", "a/b,A/B"], "would share the folder a--b"),
        (["lab", "--tier", "foo"], "invalid choice: 'foo'"),
        (["lab", "--checkpoint-every", "-4"], "no number of seconds"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    error = capsys.readouterr().err
    assert (left.value.code, error.count("\n")) == (2, 1)
    assert said in error


def test_models_are_told_apart_by_commas_unless_a_path_has_them(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert cli.model_names(f"smollm2-135m, {tmp_path},smollm2-135m,") == ["smollm2-135m", str(tmp_path)]
    assert cli.model_names(f"{tmp_path}/a,b") == [f"{tmp_path}/a,b"]
    assert cli.model_names("a/b,c/d") == ["a/b", "c/d"]
    assert tuple(BASES) == cli.TIERS


def test_what_is_piped_in_is_read_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path / "cache"))
    os.mkfifo(pipe := tmp_path / "pipe")
    Thread(target=pipe.write_bytes, args=(b"Some words. " * 40,)).start()
    chosen = cli.parser().parse_args(["figures", "--text", str(pipe)])
    kept = Path(chosen.text)
    assert kept.parent == tmp_path / "cache" / "texts"
    assert kept.read_bytes() == b"Some words. " * 40
    whole = "import sys; from spikesink import cli; print(cli.a_text(sys.argv[1]))"
    for given in ("-", "/dev/stdin"):
        ran = subprocess.run([sys.executable, "-c", whole, given], input=b"Some words. " * 40, capture_output=True)
        assert ran.stdout.decode().strip() == str(kept), ran.stderr


def test_a_path_with_a_tilde_is_one_of_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    chosen = cli.parser().parse_args(["figures", "--model", "~/model", "--figures", "~/f", "--build", "~/b"])
    assert chosen.models == [str(tmp_path / "model")]
    assert (chosen.figures, chosen.build) == (tmp_path / "f", tmp_path / "b")
    assert cli.parser().parse_args(["report", "a", "--out", "~/r"]).out == tmp_path / "r"


@pytest.mark.parametrize("turned_into", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_is_one_line_whatever_a_library_makes_of_it(turned_into, monkeypatch, capsys):
    def command(chosen):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise turned_into("failed to import") from error

    monkeypatch.setitem(COMMANDS, "census", "cli:command")
    monkeypatch.setattr(cli, "command", command, raising=False)
    assert main(["census", "smollm2-135m"]) == 130
    assert capsys.readouterr() == ("interrupted; what was finished is kept, run the same command to go on\n", "")


def test_an_interruption_while_libraries_are_imported_is_one_line(tmp_path):
    """A module in the place of torch is interrupted as it is imported, and would make an ImportError of that."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    import time; time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise ImportError('torch is broken')\n"
    )
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script += "from spikesink.__main__ import main; main(['probe', 'smollm2-135m'])"
    path = os.pathsep.join([str(tmp_path), str(ROOT / "lib")])
    environment = os.environ | {"PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=50)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "interrupted; nothing was begun\n", "")


@pytest.mark.slow
def test_paths_may_have_any_letters_and_be_links_and_a_terminal_may_lack_letters(planted_directory, tmp_path):
    (tmp_path / "mödel").mkdir()
    for file in planted_directory.iterdir():
        (tmp_path / "mödel" / file.name).symlink_to(file)
    (tmp_path / "länk").symlink_to(tmp_path / "mödel")
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT / "lib")}
    command = [sys.executable, "-m", "spikesink", "scan", "länk", "--entries", "40"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "figures" / "m-del" / "scan.json").is_file()


@pytest.mark.slow
def test_help_and_the_package_do_not_wait_for_torch():
    assert "torch" not in modules("import spikesink.__main__")
    assert "torch" in modules("import spikesink; spikesink.load")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["from spikesink import patching", "{probe}"])
def test_patching_and_probe_import_neither_plots_nor_ledger_nor_lab(script, planted_directory):
    probe = f"from spikesink.__main__ import main; main(['probe', {str(planted_directory)!r}, '--entries', '40'])"
    there = modules(script.format(probe=probe))
    assert "spikesink.chain.trace" in there
    assert not {name for name in there if name.split(".")[1:2] in (["plots"], ["ledger"], ["lab"], ["serving"])}


@pytest.mark.slow
def test_a_wheel_brings_the_command_its_texts_and_its_templates(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, "wheel", str(tmp_path), *options], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        inside = {name for name in content.namelist() if name.startswith("spikesink/")}
        [commands] = [content.read(name).decode() for name in content.namelist() if name.endswith("entry_points.txt")]
    assert inside == {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib" / "spikesink").rglob("*.*")}
    assert "spikesink = spikesink.__main__:main" in commands
