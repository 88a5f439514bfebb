"""Notebooks run and show what they promise; the exercises' checks accept our solutions and no mistakes."""

import base64
import json
import re
import types
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER, EXERCISES = ROOT / "notebooks", ROOT / "notebooks" / "exercises"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((EXERCISES / "solutions").glob("ex*.py"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)


def files_of_repository():
    return {path for path in ROOT.rglob("*") if not {".git", ".venv", "__pycache__"} & set(path.parts)}


@each_notebook
def test_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("KIMI_FAST", "1")
    notebook, before = nbformat.read(path, 4), files_of_repository()
    where = ROOT if int(path.stem[:2]) % 2 else FOLDER  # students start them from either
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(where)}}).execute()
    assert files_of_repository() == before, "a notebook writes to temporary folders only"


@each_notebook
def test_committed_outputs(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    pictures = [base64.b64decode(output.data["image/png"]) for output in outputs
                if "image/png" in output.get("data", {})]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from the top"
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert pictures and max(map(len, pictures)) < 150_000 and len(text) < 600_000
    assert notebook.metadata.kernelspec.name == "python3"
    shown = json.dumps([{**o, "data": {**o.get("data", {}), "image/png": ""}} for o in outputs])
    assert not re.search(r"/(home|root|work|tmp|Users|usr)/|Traceback|Figure size", shown)


@each_notebook
def test_reads_as_one_idea(path):
    cells = nbformat.read(path, 4).cells
    assert re.match(rf"# {path.stem[:2]} ", cells[0].source) and re.search(r"\bR (\d|App)", cells[0].source)
    assert re.search(r"^\$\$", cells[0].source, re.M), "the idea's equation"
    exercise = cells[-1].source
    stub, = EXERCISES.glob(f"ex{path.stem[:2]}_*.py")
    assert "## Exercise" in exercise and stub.name in exercise and f"-k ex{path.stem[:2]}" in exercise
    lines = sorted(len(cell.source.split("\n")) for cell in cells if cell.cell_type == "code")
    assert lines[len(lines) // 2] <= 10 and lines[-1] <= 25, "short cells, with prose between"


def run_checks(path, source):
    """All checks of an exercise, on an answer given as source text."""
    answer = types.ModuleType(path.stem)
    exec(compile(source, str(path), "exec"), answer.__dict__)
    test = EXERCISES / f"test_{path.name}"
    checks = {"__name__": test.stem}
    exec(compile(test.read_text(encoding="utf-8"), str(test), "exec"), checks)
    found = [check for name, check in checks.items() if name.startswith("test_")]
    assert found
    for check in found:
        check(answer)


@each_solution
def test_solution_passes_and_mistakes_fail(path):
    source = path.read_text(encoding="utf-8")
    run_checks(path, source)
    space = {}
    exec(source, space)
    assert space["MISTAKES"]
    for name, (part, mistake) in space["MISTAKES"].items():
        body, _, _ = source.partition("MISTAKES = ")
        assert part in body, name
        with pytest.raises(AssertionError):
            run_checks(path, body.replace(part, mistake))
            print(f"not caught: {name}")


def test_exercises_wait_for_the_student(capsys):
    assert {path.name for path in EXERCISES.glob("ex*.py")} == {path.name for path in SOLUTIONS}
    ours = [str(EXERCISES), "-q", "-p", "no:cacheprovider"]
    assert pytest.main(ours) == 0
    untouched = capsys.readouterr().out
    assert " passed" not in untouched
    for path in SOLUTIONS:
        assert f"not filled in yet: notebooks/exercises/{path.name}" in untouched
    assert pytest.main([*ours, f"--answers={EXERCISES / 'solutions'}"]) == 0
    assert " skipped" not in capsys.readouterr().out
