"""The notebooks in docs/: run from top to bottom with fewer steps, and compared with the code."""

import ast
import builtins
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

STEPS = 20  # of the lesson's page; the committed outputs have 600
NAMES = ("lesson", "exercises", "answers")
PATHS = {name: ROOT / "docs" / f"{name}.ipynb" for name in NAMES}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(PATHS[name], as_version=4)


def cells(notebook: nbformat.NotebookNode, tag: str | None = None) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook, or those with a tag."""
    found = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in found if tag is None or tag in cell.metadata.get("tags", ())]


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def errors(cell: nbformat.NotebookNode) -> list[str]:
    return [output.ename for output in cell.outputs if output.output_type == "error"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> dict[str, nbformat.NotebookNode | Path]:
    """Each notebook after all its cells have run, whether or not they failed; train.py's run."""
    run = tmp_path_factory.mktemp("lesson") / "run"

    def execute(name: str) -> nbformat.NotebookNode:
        place = {"metadata": {"path": str(PATHS[name].parent)}}
        options = {"timeout": 300, "allow_errors": True, "resources": place}
        return NotebookClient(read(name), **options).execute()

    def train_as_the_page() -> Path:
        flags = ["--samples", str(STEPS * 128), "--log-every", "1", "--precision", "fp32"]
        flags += ["--workers", "0", "--device", "cpu", "--out", str(run)]
        program = f"import train; train.evaluate = lambda *_: None; train.main({flags})"
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LESSON_STEPS", str(STEPS))
        patch.setenv("OMP_NUM_THREADS", "1")
        with ThreadPoolExecutor(2) as pool:  # the lesson takes as long as all others together
            tasks = {name: pool.submit(execute, name) for name in NAMES}
            tasks["run"] = pool.submit(train_as_the_page)
            return {name: task.result() for name, task in tasks.items()}


@pytest.mark.parametrize("name", ["lesson", "answers"])
def test_it_runs_from_top_to_bottom(name, executed):
    for cell in cells(executed[name]):
        assert not errors(cell), (cell.source, cell.outputs)


def test_exercises_without_answers_fail_their_checks(executed):
    unanswered, answered = (cells(read(name), "check") for name in ("exercises", "answers"))
    assert len(unanswered) == 10
    assert [cell.source for cell in unanswered] == [cell.source for cell in answered]
    failed = [cell for cell in cells(executed["exercises"]) if errors(cell)]
    assert [cell.source for cell in failed] == [cell.source for cell in unanswered]
    assert {error for cell in failed for error in errors(cell)} == {"AssertionError"}


def test_what_does_not_depend_on_the_machine_is_printed_as_committed(executed):
    committed = cells(read("lesson"), "exact")
    assert len(committed) >= 8
    for then, now in zip(committed, cells(executed["lesson"], "exact"), strict=True):
        assert printed(then) == printed(now), then.source


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_file_is_complete_and_small(name):
    assert PATHS[name].stat().st_size < 400_000
    numbers = [cell.execution_count for cell in cells(read(name))]
    if name == "exercises":  # as the reader finds them
        assert not any(cell.outputs for cell in cells(read(name), "check"))
    else:
        assert numbers == list(range(1, len(numbers) + 1))
        assert not any(errors(cell) for cell in cells(read(name)))


def first_losses(notebook: nbformat.NotebookNode) -> list[float]:
    (text,) = (printed(c) for c in cells(notebook) if printed(c).startswith("first losses:"))
    return [float(word) for word in text.splitlines()[0].split()[2:]]


def test_the_page_trains_as_train_py_does(executed):
    lines = (executed["run"] / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == STEPS
    assert first_losses(executed["lesson"]) == pytest.approx(losses, abs=1e-4)
    assert first_losses(read("lesson")) == pytest.approx(losses, abs=1e-3)  # of another machine


def test_the_page_is_short_and_a_whole_program():
    """Of the cells before it, it uses nothing but the number of steps."""
    page = "\n\n".join(cell.source for cell in cells(read("lesson"), "page"))
    assert page.count("\n") < 130
    nodes = list(ast.walk(ast.parse(page)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    known = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    known |= {(a.asname or a.name).split(".")[0] for a in nodes if isinstance(a, ast.alias)}
    assert {node.id for node in names} - known == {"STEPS"}
