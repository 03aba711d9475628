"""`make figures`: runs what changed and only that, on any model, and leaves nothing broken."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest

from spikesink import common, plots
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
def project(tmp_path, monkeypatch, capsys):
    """A project of one notebook that writes one picture, and a function that runs it and tells what was said."""
    (tmp_path / "notebooks").mkdir()
    write(tmp_path / "notebooks" / "01_one.ipynb", "MODEL = 'none'\nSEED = 0\nFIGURES = None", NOTEBOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "check", lambda parameters: None)  # its model is only a name

    def run(*options):
        code = main(["figures", *(() if "--model" in options else ("--model", "tiny")), *map(str, options)])
        return code, capsys.readouterr().out

    return run


def write(path, *sources):
    """A notebook whose first cell holds the parameters."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=python), path)


def change(old, new):
    notebook = Path("notebooks/01_one.ipynb")
    notebook.write_text(notebook.read_text().replace(old, new))


def test_only_what_changed_runs_again(project, random_directory, tmp_path, monkeypatch):
    model, library = tmp_path / "other", Path("library")
    shutil.copytree(random_directory, model)
    picture = Path("figures/other/01-picture.png")
    library.mkdir()

    def runs() -> bool:
        code, said = project("--model", model, "--seed", 1)
        assert code == 0
        assert ("running" in said) != ("up to date" in said)
        return "running" in said

    changes = {
        "nothing was there": lambda: None,
        "picture": picture.unlink,
        "notebook": lambda: change("import json", "import json  # changed"),
        "model": (model / "model.safetensors").touch,
        "library": lambda: monkeypatch.setattr(reproduce, "LIBRARY", library),
        "version": lambda: monkeypatch.setattr(reproduce.importlib.metadata, "version", lambda name: "0"),
    }
    for name, make_change in changes.items():
        make_change()
        assert runs(), name
        assert not runs(), name
    assert picture.read_text() == "1"


def test_a_failing_notebook_is_named_with_its_error_and_what_it_left_is_not_taken_for_whole(project):
    build = Path("build/figures/tiny")
    project()
    change(".write_text(str(SEED))", ".write_text(str(SEED)); 1 / 0")
    code, said = project("--seed", 1)
    assert code == 1
    assert "01_one: failed. ZeroDivisionError: division by zero" in said
    assert (build / "01_one.failed.ipynb").is_file()
    change("; 1 / 0", "")
    assert "running" in project()[1]
    assert Path("figures/tiny/01-picture.png").read_text() == "0"
    assert not (build / "01_one.failed.ipynb").exists()


def test_an_interrupted_run_leaves_no_half_notebook_and_stops_the_models_after_it(project, monkeypatch):
    def interrupted(notebook, unfinished, *args, **options):
        Path(unfinished).write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(papermill, "execute_notebook", interrupted)
    code, said = project("--model", "tiny,other")
    assert code == 130
    assert "what was finished is kept" in said
    assert "running on other" not in said
    assert list(Path("build/figures/tiny").iterdir()) == []


def test_a_folder_without_notebooks_is_one_sentence(project, capsys):
    assert main(["figures", "--notebooks", "elsewhere"]) == 1
    assert capsys.readouterr() == ("", "there are no notebooks in elsewhere; run this from the project's root.\n")


def test_a_kernel_that_was_killed_is_one_sentence(project):
    change("import json", "import json, os; os.kill(os.getpid(), 9)")
    code, said = project()
    assert code == 1
    assert "01_one: failed. its kernel was killed, perhaps for want of memory" in said
    assert [path.name for path in Path("build/figures/tiny").iterdir()] == []


def test_several_models_run_in_turn_and_one_that_fails_stops_no_other(project, monkeypatch):
    """One cannot be had at all, one fails in its notebook, the third is whole; the last lines say which is which."""

    def check(parameters):
        if parameters["MODEL"] == "nosuch":
            raise common.CommandError("there is no model nosuch")
        if parameters["MODEL"] == "odd":
            raise KeyError("d_model")

    monkeypatch.setattr(reproduce, "check", check)
    change("import json", "assert MODEL != 'bad'")
    code, said = project("--model", "nosuch,odd,bad,tiny")
    lines = said.splitlines()
    assert code == 1
    assert lines.index("there is no model nosuch") < next(i for i, line in enumerate(lines) if "running on" in line)
    assert lines[-4:-1] == [
        "1 of 4 models done: tiny",
        "nosuch not done: there is no model nosuch",
        "odd not done: KeyError: 'd_model'.",
    ]
    assert lines[-1].startswith("bad not done: [1/1] 01_one: failed. AssertionError")
    assert [path.name for path in Path("figures").iterdir() if path.is_dir()] == ["tiny"]
    assert Path("figures/claims.svg").is_file()


def test_a_notebook_that_asks_for_no_model_runs_once_and_into_the_labs_folder(project):
    write("notebooks/02_lab.ipynb", "SEED = 0\nFIGURES = None", NOTEBOOK.replace("Path(MODEL).name", '"lab"'))
    for said in ("02_lab: running on lab", "02_lab: up to date"):
        code, told = project("--model", "tiny,other", "--seed", 3)
        assert code == 0
        assert told.count(said) == 1
    assert Path("figures/lab/01-picture.png").read_text() == "3"


@pytest.mark.slow
def test_two_at_a_time_give_what_one_after_the_other_does(project):
    for name in ("02_two", "03_three"):
        write(f"notebooks/{name}.ipynb", "MODEL = 'none'\nSEED = 0\nFIGURES = None", "print(SEED)")
    change("import json", "assert SEED != 1")
    code, said = project("--jobs", 2)
    assert code == 0
    assert re.search(r"01_one: running.*02_two: running.*01_one: done.*02_two: done.*03_three: run", said, re.DOTALL)
    code, said = project("--jobs", 2, "--seed", 1)
    assert code == 1
    assert "[1/3] 01_one: failed. AssertionError" in said
    assert "[2/3] 02_two: done" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "nosuch.gguf"], "there is no file or directory nosuch.gguf"),
        (["--device", "abacus"], "cannot be used here"),
        (["--dtype", "int8"], "is not one that models run in"),
        (["--text", "nosuch.txt"], "there is no text 'nosuch.txt'"),
        (["--n-prompts", "100000"], "ask for fewer or shorter ones"),
        (["--seq-len", "513"], "longer than the model's context of 512"),
    ],
)
def test_what_is_wrong_is_said_before_a_kernel_starts(given, said, random_directory, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(reproduce, "execute", lambda *_: pytest.fail("a notebook was started"))
    places = {"notebooks": ROOT / "notebooks", "figures": tmp_path / "figures", "build": tmp_path / "build"}
    options = [str(part) for name, place in places.items() for part in (f"--{name}", place)]
    assert main(["figures", *options, "--model", str(random_directory), *given]) == 1
    assert said in capfd.readouterr().out.splitlines()[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_notebooks_run_on_another_model(planted_directory, tmp_path, capfd):
    """A tiny model with a planted spike, through kernels and files; test_every_measure runs all of them without."""
    (tmp_path / "notebooks").mkdir()
    for name in ("01_step_up", "03_step_down"):
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "notebooks")
    text = tmp_path / "text.txt"
    text.write_text("The<spike> river runs<spike> to the sea, and the mill stands<spike> by the weir.\n" * 40)
    options = {"model": planted_directory, "text": text, "n-prompts": 3, "seq-len": 48}
    options |= {folder: tmp_path / folder for folder in ("notebooks", "figures", "build")}
    code = main(["figures", *(str(part) for name, value in options.items() for part in (f"--{name}", value))])
    assert code == 0, capfd.readouterr().out
    rows = claims.ledgers(tmp_path / "figures")["planted-llama"]["claims"]
    assert set(rows) == {"LC1", "LC3", "LC4", "LC7"}
    assert rows["LC1"]["measured"]["step_up_blocks"] == [4]
    assert rows["LC3"]["measured"]["step_down_blocks"] == [10]
    pictures = {path.name for path in (tmp_path / "figures" / "planted-llama").glob("*.png")}
    assert pictures == {path.name for path in (ROOT / "figures" / "smollm2-135m").glob("0[13]-*.png")}
    for notebook in (tmp_path / "build" / "figures" / "planted-llama").glob("*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        assert str(tmp_path) not in "".join(str(output) for cell in cells for output in cell.get("outputs", []))


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


def test_every_stored_notebook_says_what_its_ledger_says():
    """The committed ledger and the stored outputs come from the same run."""
    rows = claims.ledgers(ROOT / "figures")["smollm2-135m"]["claims"] | claims.lab_ledger(ROOT / "figures")["claims"]
    for claim_id, row in rows.items():
        notebook = nbformat.read(ROOT / "notebooks" / f"{row['notebook']}.ipynb", as_version=4)
        shown = [str(output) for cell in notebook.cells for output in cell.get("outputs", [])]
        assert any(f"**{claim_id}** {row['statement']}" in text and f"**{row['verdict']}**" in text for text in shown)


def test_figures_are_the_same_files_when_drawn_again(tmp_path):
    for name in ("one", "two"):
        plots.save(plots.chain(), tmp_path, name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()
