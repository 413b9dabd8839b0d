"""Answers for single pictures: as text, JSON and CSV, from any objective, and from Python."""

import csv
import json
import re

import pytest
import torch

import eval as evaluation
from data import UserError
from eval import classify, extract, load_run
from plugins.files import open_source
from plugins.predict import predict
from tests.conftest import ROOT, picture, run_python
from tests.test_pictures import save_run

CLASSES = {"colour": [["red", "crimson"], ["green"], ["blue"]], "number": [["1"], ["2"]]}


@pytest.fixture(scope="module")
def run(tmp_path_factory, device):
    return save_run(tmp_path_factory.mktemp("predict") / "run", classes={})


@pytest.fixture
def folders(tmp_path):
    """Pictures in folders named after colours, of which one is wrong."""
    for i, name in enumerate(["red", "green", "Blue", "red", "blue", "grey"]):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        picture(0 if name == "blue" else i).save(tmp_path / "in" / name / f"{i}.png")
    return tmp_path / "in"


def ask(*flags) -> list[dict]:
    evaluation.main(["predict", *map(str, flags)])


def refused(capsys, *flags) -> str:
    with pytest.raises(SystemExit, match="2"):
        ask(*flags)
    return capsys.readouterr().err


def test_each_image_has_an_answer_and_each_class_its_share_of_right_ones(run, folders, capsys):
    ask(run, folders, "--classes", "red, green,blue", "--top", "2")
    out, err = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in out.split("\n\n")[0].splitlines())
    assert len(lines) == 6
    for name, best in {"red/0": "red", "green/1": "green", "Blue/2": "blue"}.items():
        line = lines[str(folders / f"{name}.png")]
        assert re.fullmatch(rf"{best} [\d.]+%, \w+ [\d.]+%", line)
    assert lines[str(folders / "blue/4.png")].endswith("%  WRONG: blue")
    assert lines[str(folders / "grey/5.png")].endswith("%")  # grey is none of the classes
    table = [line.split() for line in out.split("\n\n")[1].splitlines()]
    assert table[1:] == [
        ["red", "2", "1.000"],
        ["green", "1", "1.000"],
        ["blue", "2", "0.500", "else", "red", "1"],
        ["all", "5", "0.800"],
        ["most", "often", "confused", "blue", "and", "red", "1"],
    ]
    assert "images with labels that are none of the classes: 1 x grey" in err


def test_scripts_get_every_image_the_bad_ones_with_a_reason(run, folders, capsys, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no image")
    names = [folders / "red/0.png", tmp_path / "gone.png", folders, tmp_path / "torn.png"]
    ask(run, *names, "--classes", "red,green,blue", "--json")
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    good, bad = rows[:-2], rows[-2:]
    assert [row["image"] for row in bad] == [str(names[1]), str(names[3])]
    assert "missing image" in bad[0]["error"] and "unreadable image" in bad[1]["error"]
    assert "2 of 9 images have no answer: 1 x missing image, 1 x unreadable image" in err
    assert len(good) == 7 and good[0]["image"] == str(names[0]) and "label" not in good[0]
    for row in good:
        assert sum(p for _, p in row["answers"]) == pytest.approx(1)
    assert [row["label"] for row in good[1:]].count("blue") == 2 and "most often confused" in err
    ask(run, *names, "--classes", "red,green,blue", "--csv")
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["name_1"] for row in table[:7]] == [row["answers"][0][0] for row in good]
    assert [row["error"] for row in table[7:]] == [row["error"] for row in bad]
    assert "1 of 1 images have no answer" in refused(capsys, run, names[1])


def test_without_classes_words_answer(run, capsys, folders):
    ask(run, folders / "red" / "0.png", "--json", "--top", "6")
    row = json.loads(capsys.readouterr().out)
    assert row["attribute"] == "words" and "red" in [word for word, _ in row["answers"]]


@pytest.mark.parametrize("objective", ["superclass", "superclip", "clip", "supervised"])
def test_a_run_answers_in_its_own_classes_and_way(objective, tmp_path, capsys, device):
    folder = save_run(tmp_path / "run", objective=objective, classes=CLASSES)
    ask(folder, folder / "pairs", "--json", "--device", device)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    loaded, classes = load_run(folder, device), CLASSES["colour"]
    features, _, _ = extract(loaded, open_source(str(folder / "pairs"), "val", "", None), workers=0)
    with torch.no_grad():
        p = classify(loaded, "zeroshot", classes, features, None).softmax(dim=1)
    assert [row["attribute"] for row in rows] == ["colour"] * 24 + ["number"] * 24
    for row, expected in zip(rows[:24], p, strict=True):
        found = dict(row["answers"])
        values = torch.tensor([found[name] for name, *_ in classes])
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4)
    if objective == "supervised":
        other = refused(capsys, folder, folder / "pairs", "--classes", "cat,dog")
        assert "knows only its own classes" in other


def test_mistakes_get_a_sentence(run, tmp_path, capsys):
    for names in ("cat,,dog", "cat, cat", ""):
        assert "give different names" in refused(capsys, run, run / "pairs", "--classes", names)
    assert "no source" in refused(capsys, run, tmp_path / "nowhere")
    assert "no token of 'ZX', 'QQ'" in refused(capsys, run, run / "pairs", "--classes", "ZX,QQ")
    clip = save_run(tmp_path / "clip", objective="clip", classes={})
    assert "no head over words: give it --classes" in refused(capsys, clip, run / "pairs")
    answers = save_run(tmp_path / "caption", objective="caption", classes={})
    said = refused(capsys, answers, run / "pairs", "--classes", "a,b")
    assert "needs a head over words or a text tower" in said


def test_predict_takes_pictures_and_paths(run, folders, device):
    loaded, names = load_run(run, device), [["red", "crimson"], "green"]
    path = folders / "red" / "0.png"
    p = predict(loaded, [picture(0), path, str(path)], names)
    assert p.shape == (3, 2) and (p[:, 0] > 0.5).all()
    torch.testing.assert_close(p.sum(dim=1), torch.ones(3))
    with pytest.raises(UserError, match="no token"):
        predict(loaded, [path], ["ZX"])


def test_the_pages_code_runs_in_a_folder_with_modules_of_the_same_names(tmp_path):
    """docs/pretrained.md; a notebook's own data.py must not take the place of ours."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/pretrained.md").read_text(), re.S)
    code = code.replace("/path/to/superclass", str(ROOT))
    code = code.replace("photo.jpg", str(ROOT / "assets/umbrella.png"))
    for name in ("data", "eval", "plugins"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "notebook.py").write_text(code)
    done = run_python(str(tmp_path / "notebook.py"), check=False, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "umbrella" in done.stdout.splitlines()[0]
