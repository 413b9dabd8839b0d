"""The README and the pages beside it: their commands, line counts and code are checked."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from plugins import find
from superclass import superclass_loss
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments/README.md"]


def commands(page: Path) -> list[list[str]]:
    """The words of each command of a page's shell blocks, with NAME="..." put in for $NAME."""
    found, variables = [], {}
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
            if assigned := re.fullmatch(r'(\w+)="(.*)"', line.strip()):
                variables[assigned[1]] = assigned[2]
            for part in re.split(r"&&|\|", re.sub(r"(^|\s)#.*", "", line)):
                words = shlex.split(part, comments=True)
                if "-c" in words:  # srun's bash -c "..."
                    words = shlex.split(words[-1])
                while words and re.match(r"\w+=", words[0]):  # an environment variable
                    words = words[1:]
                found += [words] if words else []
    return found


class Understood(Exception):
    pass


def parse(program: str, flags: list[str], monkeypatch):
    """Let a program parse these flags, and do no more."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(self, args=None, namespace=None):
        parsed = parse_args(self, args, namespace)
        for flag in ("objective", "loss"):  # any name is parsed; this refuses unknown ones
            if hasattr(parsed, flag) and isinstance(getattr(parsed, flag), str):
                find(flag, getattr(parsed, flag))
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [program, *flags])
    monkeypatch.syspath_prepend(ROOT / "experiments")
    with pytest.raises(Understood):
        importlib.import_module(Path(program).stem).main()
    monkeypatch.undo()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page, capsys, monkeypatch):
    understood = 0
    for words in commands(page):
        if words[0] not in ("python", "torchrun"):
            continue
        program = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if "-m" in words:
            module = words[words.index("-m") + 1]
            assert module == "pytest" or (ROOT / (module.replace(".", "/") + ".py")).exists(), words
            continue
        assert (ROOT / words[program]).exists(), words
        try:
            parse(words[program], words[program + 1 :], monkeypatch)
        except SystemExit:
            pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err}")
        understood += 1
    assert understood or page.name in ("speed.md", "fork.md", "differences.md")


def test_the_file_map_counts_lines():
    rows = re.findall(
        r"^\| `([\w./]+)` \| ([\d,]+) \|", (ROOT / "README.md").read_text(), flags=re.M
    )
    assert {name for name, _ in rows} == {path.name for path in ROOT.glob("*.py")} | {"plugins/"}
    for name, lines in rows:
        files = ROOT.glob(f"{name}*.py" if name == "plugins/" else name)
        counted = sum(file.read_text().count("\n") for file in files)
        assert counted == int(lines.replace(",", "")), name


def test_the_readme_counts_the_tests(request):
    if [Path(arg).name for arg in request.config.args] not in (["tests"], ["main"]):
        pytest.skip("only some of the tests were collected")
    stated = re.search(r"(\d+) tests", (ROOT / "README.md").read_text())
    assert int(stated[1]) == request.session.testscollected


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 200 and len(text.encode()) <= 14_000
    assert text[: text.index("\n## ")].count("\n") <= 25  # the first screen


def test_the_papers_25_lines_are_superclass_loss():
    """The README's own code block, run as it stands."""
    (code,) = re.findall(
        r"```python\n(import torch\n.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert code.count("\n") <= 25
    torch.manual_seed(0)
    names = {}
    exec(code, names)  # this repository's own text
    labels = names["labels"]
    sets = [row.nonzero()[:, 0].tolist() for row in labels]
    width = max(map(len, sets))
    padded = torch.tensor([row + [-1] * (width - len(row)) for row in sets])
    expected = superclass_loss(names["logits"], padded, names["weights"])
    torch.testing.assert_close(names["loss"].detach(), expected.detach())


def test_the_code_for_ones_own_programs_runs(capsys):
    (code,) = re.findall(
        r"```python\n(import torch\nfrom PIL.*?)```", (ROOT / "docs/data.md").read_text(), re.S
    )
    code = code.replace("runs/shapes", str(ROOT / "pretrained/icons"))
    exec(code.replace("photo.jpg", str(ROOT / "assets/umbrella.png")), {})
    assert capsys.readouterr().out


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)
