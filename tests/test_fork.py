"""docs/fork.md: each of its files is written to plugins/, used, resumed and removed."""

import importlib
import re
import sys

import pytest

import eval as evaluation
import superclass
import train
from plugins import TABLE, UserError, find
from tests.conftest import ROOT, load, make_pairs, train_flags
from tests.test_train import assert_same, metrics, refused, run_and_killed_copy, state

BLOCKS = re.findall(
    r"```python\n(# plugins/(\w+)\.py:.*?)```", (ROOT / "docs/fork.md").read_text(), re.S
)
FILES = {name: text for text, name in BLOCKS}
FLAG = {"stripes": "data", "characters": "tokenizer", "mobilenet": "model", "focal": "loss"}
FLAG |= {"lion": "optimizer", "sharp": "objective", "norms": "task", "orthogonal": "init"}


@pytest.fixture
def fork(request):
    """Puts one file of the page into plugins/; nothing else of the repository changes."""
    name = request.param
    path = ROOT / "plugins" / f"{name}.py"
    assert not path.exists()
    path.write_text(FILES[name])
    importlib.invalidate_caches()
    yield name
    path.unlink()
    sys.modules.pop(f"plugins.{name}", None)


def test_the_page_has_a_whole_short_file_for_each_flag():
    assert {FLAG[name] for name in FILES} == TABLE.keys()
    assert all(text.count("\n") <= 30 for text in FILES.values())


@pytest.mark.parametrize("fork", [name for name in FLAG if name != "norms"], indirect=True)
def test_a_fork_is_one_file_that_trains_and_resumes_exactly(fork, tmp_path, device):
    flags = train_flags(make_pairs(tmp_path / "pairs"), tmp_path / "run", f"--{FLAG[fork]}", fork)
    flags += ["--samples", "20", "--batch-size", "4", "--save-every", "2", "--workers", "0"]
    flags += ["--no-first-eval"]
    run, killed = run_and_killed_copy(flags, 4)
    train.main(["--out", str(killed), "--resume"])
    assert_same(state(killed), state(run))
    assert metrics(killed) == metrics(run)
    encoders = [load(folder / "encoder.pt") for folder in (killed, run)]
    assert_same(*encoders)
    assert evaluation.load_run(run, device).step == 5
    if fork == "stripes":  # its classes are measured
        found = {row.get("attribute") for row in evaluation.own_rows(run)}
        assert found == {None, "direction"}  # the loss has none


@pytest.mark.parametrize("fork", ["norms"], indirect=True)
def test_a_task_is_one_file(fork, capsys, tmp_path, device):
    pairs = make_pairs(tmp_path / "pairs")
    flags = ["--val-data", str(pairs), "--samples", "8", "--workers", "0", "--no-first-eval"]
    train.main(train_flags(pairs, tmp_path / "run", *flags))
    evaluation.main(["norms", str(tmp_path / "run")])
    assert "mean norm of 24 features" in capsys.readouterr().out


@pytest.mark.parametrize("fork", ["norms"], indirect=True)
def test_a_file_without_what_its_flag_needs_is_refused(fork, capsys, tmp_path):
    error = refused(capsys, "--data", "shapes", "--loss", "norms", "--out", tmp_path / "run")
    assert "loss 'norms': plugins/norms.py does not define loss" in error


@pytest.mark.parametrize("flag", TABLE)
def test_names_of_strangers_import_nothing(flag):
    """A config.json may come with a run of somebody else's."""
    for name in ("../evil", "os.path", "os", "tests.die", ""):
        with pytest.raises(UserError, match="unknown"):
            find(flag, name)


@pytest.mark.parametrize("flag", TABLE)
def test_every_name_in_the_table_is_there(flag):
    for name in TABLE[flag]:
        assert callable(find(flag, name)), name


def test_the_four_files_name_no_plug_in():
    """But SuperClass's own objective, loss and evaluations, and the defaults of flags."""
    allowed = {"superclass", "softmax", "shapes", "adamw", *superclass.Objective.tasks, "look"}
    allowed |= {"caption", "loss"}  # the words
    allowed.add("plan")  # which has the trial before the first step
    files = {path.stem for path in (ROOT / "plugins").glob("*.py")} - {"__init__"}
    listed = {name for flag in TABLE for name in TABLE[flag]} | files
    for file in ("superclass.py", "data.py", "train.py", "eval.py"):
        code = re.sub(r'""".*?"""|#[^\n]*', "", (ROOT / file).read_text(), flags=re.S)
        quoted = set(re.findall(r"""["']([\w/-]+)["']""", code))
        assert not (quoted & listed) - allowed, (file, (quoted & listed) - allowed)
        assert not re.findall(r"(?:from|import) plugins\.", code)
