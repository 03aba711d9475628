"""`make figures`: runs what changed and only that, on any model, and leaves nothing broken."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

from spikesink import common
from spikesink.__main__ import main
from spikesink.apps import reproduce
from spikesink.ledger import claims

ROOT = Path(__file__).parent.parent
NOTEBOOK = """import json
from pathlib import Path

folder = Path(FIGURES) / Path(MODEL).name
folder.mkdir(parents=True, exist_ok=True)
(folder / "01-picture.png").write_text(str(SEED))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one notebook that writes one picture, and a function that runs it and tells what was said."""
    cells = [nbformat.v4.new_code_cell("MODEL = 'none'\nSEED = 0\nFIGURES = None"), nbformat.v4.new_code_cell(NOTEBOOK)]
    cells[0].metadata["tags"] = ["parameters"]
    (tmp_path / "notebooks").mkdir()
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=python)
    nbformat.write(notebook, tmp_path / "notebooks" / "01_one.ipynb")

    monkeypatch.setattr(reproduce, "check", lambda parameters: None)  # its model is only a name

    def run(**parameters):
        console = Console(record=True, width=200)
        given = {"MODEL": "tiny", "TEXT": "house", "SEED": 0, "FIGURES": str(tmp_path / "figures")} | parameters
        notebooks = sorted((tmp_path / "notebooks").glob("*.ipynb"))
        code = reproduce.run(notebooks, given, tmp_path / "figures", tmp_path / "build", console)
        return code, console.export_text()

    run.root = tmp_path
    return run


def test_only_what_changed_runs_again(project):
    code, said = project()
    assert code == 0
    assert "[1/1] 01_one: running on tiny, 0 more after it" in said
    assert "done in" in said
    assert "up to date" in project()[1]
    assert "running" in project(SEED=1)[1]
    assert (project.root / "figures" / "tiny" / "01-picture.png").read_text() == "1"
    assert "up to date" in project(SEED=1)[1]
    (project.root / "figures" / "tiny" / "01-picture.png").unlink()
    assert "running" in project(SEED=1)[1]


def test_a_changed_notebook_or_library_runs_again(project, monkeypatch):
    project()
    notebook = project.root / "notebooks" / "01_one.ipynb"
    notebook.write_text(notebook.read_text().replace("import json", "import json  # changed"))
    assert "running" in project()[1]
    assert "up to date" in project()[1]
    monkeypatch.setattr(reproduce, "__file__", str(project.root / "library" / "apps" / "reproduce.py"))
    (project.root / "library" / "apps").mkdir(parents=True)
    (project.root / "library" / "apps" / "reproduce.py").write_text("changed")
    assert "running" in project()[1]


def test_another_version_of_a_library_runs_again(project, monkeypatch):
    project()
    assert "up to date" in project()[1]
    monkeypatch.setattr(reproduce.importlib.metadata, "version", lambda name: "0")
    assert "running" in project()[1]


def test_a_failure_in_between_is_not_forgotten(project):
    """What a failed run left behind must not pass for what an earlier, whole run had written."""
    project()
    notebook = project.root / "notebooks" / "01_one.ipynb"
    whole = notebook.read_text()
    notebook.write_text(whole.replace(".write_text(str(SEED))", ".write_text(str(SEED)); 1 / 0"))
    assert project(SEED=1)[0] == 1
    notebook.write_text(whole)
    assert "running" in project()[1]
    assert (project.root / "figures" / "tiny" / "01-picture.png").read_text() == "0"


def test_a_model_directory_that_changed_runs_again(project, random_directory, tmp_path):
    shutil.copytree(random_directory, tmp_path / "other")
    given = {"MODEL": str(tmp_path / "other")}
    assert "running" in project(**given)[1]
    assert "up to date" in project(**given)[1]
    (tmp_path / "other" / "model.safetensors").touch()
    assert "running" in project(**given)[1]


def test_a_failing_notebook_is_named_with_its_error(project):
    notebook = project.root / "notebooks" / "01_one.ipynb"
    notebook.write_text(notebook.read_text().replace("import json", "1 / 0"))
    code, said = project()
    assert code == 1
    assert "01_one: failed. ZeroDivisionError: division by zero" in said.replace("\n", " ")
    assert (project.root / "build" / "tiny" / "01_one.failed.ipynb").is_file()
    assert not (project.root / "build" / "tiny" / "01_one.ipynb").exists()
    notebook.write_text(notebook.read_text().replace("1 / 0", "import json"))
    assert "done in" in project()[1]
    assert not (project.root / "build" / "tiny" / "01_one.failed.ipynb").exists()


def test_an_interrupted_run_leaves_no_half_notebook(project, monkeypatch):
    import papermill

    def interrupted(notebook, partial, *args, **options):
        Path(partial).write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(papermill, "execute_notebook", interrupted)
    code, said = project()
    assert code == common.INTERRUPTED
    assert "what was finished is kept" in said
    assert list((project.root / "build" / "tiny").iterdir()) == []


def test_an_interrupted_preparation_changes_nothing(project, monkeypatch):
    def interrupted(parameters):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "check", interrupted)
    code, said = project()
    assert (code, "nothing was changed" in said) == (common.INTERRUPTED, True)
    assert not (project.root / "build").exists()


def test_several_models_run_in_turn_and_one_that_fails_stops_no_other(project, monkeypatch):
    """One cannot be had at all, one fails in its notebook, the third is whole; the last lines say which is which."""

    def check(parameters):
        if parameters["MODEL"] == "nosuch":
            raise common.CommandError("there is no model nosuch")

    monkeypatch.setattr(reproduce, "check", check)
    notebook = project.root / "notebooks" / "01_one.ipynb"
    notebook.write_text(notebook.read_text().replace("import json", "assert MODEL != 'bad'"))
    console = Console(record=True, width=200)
    figures = project.root / "figures"
    models = [
        {"MODEL": name, "TEXT": "house", "SEED": 0, "FIGURES": str(figures)} for name in ("nosuch", "bad", "tiny")
    ]
    code = reproduce.run_each([notebook], models, figures, project.root / "build", console)
    said = console.export_text().splitlines()
    assert code == 1
    assert said.index("there is no model nosuch") < next(i for i, line in enumerate(said) if "running on" in line)
    assert said[-3:-1] == ["1 of 3 models done: tiny", "nosuch not done: there is no model nosuch"]
    assert said[-1].startswith("bad not done: [1/1] 01_one: failed. AssertionError")
    assert [path.name for path in figures.iterdir() if path.is_dir()] == ["tiny"]
    assert (figures / "claims.svg").is_file()


def test_a_notebook_that_asks_for_no_model_runs_once_and_into_the_labs_folder(project):
    notebook = project.root / "notebooks" / "02_lab.ipynb"
    content = nbformat.read(project.root / "notebooks" / "01_one.ipynb", as_version=4)
    content.cells[0].source = "SEED = 0\nFIGURES = None"
    content.cells[1].source = NOTEBOOK.replace("Path(MODEL).name", '"lab"').replace("01-", "02-")
    nbformat.write(content, notebook)
    assert reproduce.asks_for_a_model(project.root / "notebooks" / "01_one.ipynb")
    assert not reproduce.asks_for_a_model(notebook)
    figures, build, console = project.root / "figures", project.root / "build", Console(record=True, width=200)
    for said in ("02_lab: running on lab", "02_lab: up to date"):
        given = {"SEED": 3, "FIGURES": str(figures), "TEXT": "house"}
        assert reproduce.run_lab([notebook], given, figures, build, console) == 0
        assert said in console.export_text()
    assert (figures / "lab" / "02-picture.png").read_text() == "3"


def test_an_interrupted_model_stops_those_after_it(project, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "_execute", interrupted)
    console = Console(record=True, width=200)
    models = [{"MODEL": name, "TEXT": "house", "SEED": 0} for name in ("tiny", "other")]
    notebooks = sorted((project.root / "notebooks").glob("*.ipynb"))
    code = reproduce.run_each(notebooks, models, project.root / "figures", project.root / "build", console)
    assert code == common.INTERRUPTED
    assert "running on other" not in console.export_text()


def test_models_are_told_apart_by_commas_unless_a_path_has_them(random_directory, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        reproduce, "run_each", lambda notebooks, models, *_: asked.append([m["MODEL"] for m in models]) or 0
    )
    monkeypatch.setattr(reproduce, "run_lab", lambda *_: 0)
    with_comma = tmp_path / "a,b"
    shutil.copytree(random_directory, with_comma)
    for given in ("smollm2-135m", f"smollm2-135m, {random_directory},smollm2-135m,", str(with_comma), "a/b,c/d"):
        main(["figures", "--notebooks", str(ROOT / "notebooks"), "--model", given])
    assert asked == [["smollm2-135m"], ["smollm2-135m", str(random_directory)], [str(with_comma)], ["a/b", "c/d"]]


@pytest.mark.parametrize(("given", "said"), [(" , ", "names no model"), ("a/b,A/B", "would share the folder a--b")])
def test_models_that_cannot_be_told_apart_are_one_sentence(given, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["figures", "--model", given])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "nosuch.gguf"], "there is no file or directory nosuch.gguf"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--dtype", "int8"], "is not one that models run in"),
        (["--text", "nosuch.txt"], "there is no text 'nosuch.txt'"),
        (["--n-prompts", "100000"], "ask for fewer or shorter ones"),
        (["--seq-len", "513"], "longer than the model's context of 512"),
    ],
)
def test_what_is_wrong_is_said_before_a_kernel_starts(given, said, random_directory, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(reproduce, "_execute", lambda *_: pytest.fail("a notebook was started"))
    arguments = ["--notebooks", str(ROOT / "notebooks"), "--figures", str(tmp_path / "figures")]
    arguments += ["--build", str(tmp_path / "build"), "--model", str(random_directory), *given]
    assert main(["figures", *arguments]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    assert said in lines[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value"), [("--n-prompts", "abc"), ("--n-prompts", "0"), ("--seq-len", "1.5")])
def test_a_number_that_is_none_is_one_sentence(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["figures", option, value])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"{value!r} is not a whole number of at least" in said
    assert said.count("\n") == 1


def test_the_package_is_there_at_once_and_torch_comes_when_it_is_asked_for():
    script = "import sys, spikesink; print('torch' in sys.modules, callable(spikesink.load), 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True", "True"]


def test_the_notebooks_run_on_another_model(planted_directory, tmp_path, capfd):
    """A tiny model with a planted spike, through kernels and files; test_every_measure runs all of them without."""
    chosen = ("01_step_up", "03_step_down")
    for name in chosen:
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "notebooks")
    arguments = ["--notebooks", str(tmp_path / "notebooks"), "--figures", str(tmp_path / "figures")]
    arguments += ["--build", str(tmp_path / "build"), "--model", str(planted_directory)]
    text = tmp_path / "text.txt"
    text.write_text("The<spike> river runs<spike> to the sea, and the mill stands<spike> by the weir.\n" * 40)
    code = main(["figures", *arguments, "--text", str(text), "--n-prompts", "3", "--seq-len", "48"])
    assert code == 0, capfd.readouterr().out
    data = claims.ledgers(tmp_path / "figures")["planted-llama"]
    assert set(data["claims"]) == {"LC1", "LC3", "LC4", "LC7"}
    assert data["claims"]["LC1"]["measured"]["step_up_blocks"] == [4]
    assert data["claims"]["LC3"]["measured"]["step_down_blocks"] == [10]
    pictures = sorted(p.name for p in (tmp_path / "figures" / "planted-llama").glob("*.png"))
    committed = sorted(p.name for p in (ROOT / "figures" / "smollm2-135m").glob("*.png"))
    assert pictures == [name for name in committed if name.startswith(("01-", "03-"))]
    for notebook in (tmp_path / "build" / "figures" / "planted-llama").glob("*.ipynb"):
        content = notebook.read_text()
        assert str(tmp_path) not in "".join(
            str(output) for cell in json.loads(content)["cells"] for output in cell.get("outputs", [])
        )


def test_notebooks_are_stored_without_traces_of_a_run():
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        content = nbformat.read(notebook, as_version=4)
        assert set(content.metadata) == {"kernelspec", "language_info"}, notebook.name
        parameters = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(parameters) == 1
        for cell in content.cells:
            if cell.cell_type != "code":
                continue
            code = re.sub(r'""".*?"""', "prose", cell.source, flags=re.DOTALL)
            assert len(code.splitlines()) <= 17, (notebook.name, cell.id)
            assert cell.execution_count, (notebook.name, cell.id)
            for output in cell.outputs:
                assert output.output_type in ("execute_result", "display_data"), (notebook.name, output)


def test_store_keeps_outputs_and_no_timings(tmp_path):
    cells = [nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "00_sum.ipynb")
    reproduce.store(tmp_path / "00_sum.ipynb")
    content = nbformat.read(tmp_path / "00_sum.ipynb", as_version=4)
    assert content.cells[0].outputs[0].data["text/plain"] == "2"
    assert "execution" not in content.cells[0].metadata


def test_without_notebooks_it_says_where_to_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["figures"]) == 1
    assert "run this from the project's root" in capsys.readouterr().err


def test_every_stored_notebook_says_what_its_ledger_says():
    """The committed ledger and the stored outputs come from the same run."""
    rows = claims.ledgers(ROOT / "figures")["smollm2-135m"]["claims"] | claims.lab_ledger(ROOT / "figures")["claims"]
    for claim_id, row in rows.items():
        notebook = nbformat.read(ROOT / "notebooks" / f"{row['notebook']}.ipynb", as_version=4)
        shown = [str(output) for cell in notebook.cells for output in cell.get("outputs", [])]
        assert any(f"**{claim_id}** {row['statement']}" in text and f"**{row['verdict']}**" in text for text in shown)


def test_figures_are_the_same_files_when_drawn_again(tmp_path):
    from spikesink import plots

    plots.save(plots.chain(), tmp_path, "one")
    plots.save(plots.chain(), tmp_path, "two")
    for kind in ("png", "svg"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()
    shutil.rmtree(tmp_path)


def test_to_look_whether_a_folder_can_be_written_leaves_what_was_there(tmp_path):
    common.check_writable(tmp_path / "new" / "deep", keep=False)
    assert not any(tmp_path.iterdir()), "what was made is gone"
    there = tmp_path / "there"
    there.mkdir()
    common.check_writable(there, keep=False)
    assert there.is_dir()
    assert not any(there.iterdir())
    common.check_writable(tmp_path / "kept" / "deep")
    assert (tmp_path / "kept" / "deep").is_dir()
