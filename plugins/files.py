"""Images on disk: a folder of them, and what a table shares with it.

--data DIR      its images, with a .txt of the same stem; a subfolder's name is a class
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data import (
    IMAGE_TYPES,
    UNREAD_TYPES,
    BadSample,
    Pairs,
    Raw,
    UserError,
    describe,
    normal,
)
from plugins.labels import number_classes, plain_label, unknown_label


class Files(Pairs):
    """Images on disk, from rows of (image path, caption or its path, label, question).

    `table` is the file that the rows are from, if it is one.
    """

    def __init__(
        self, rows: list[tuple | BadSample], names: list | None, left_out: Counter, table: str = ""
    ):
        labels = {row[2] for row in rows if isinstance(row, tuple)} - {None}
        names = names or [[label] for label in sorted(labels)]  # by default each label is a class
        self.rows, self.numbers, self.left_out = rows, number_classes(names), left_out
        self.attributes, self.table = {"class": names} if labels else {}, table
        if unknown := sorted(labels - self.numbers.keys()):
            raise UserError(f"label {unknown_label(unknown[0], tuple(self.numbers))}")

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, i: int) -> Raw | BadSample:
        if isinstance(self.rows[i], BadSample):
            return self.rows[i]
        image, caption, label, question = self.rows[i]
        if caption is None and not self.table:
            caption = BadSample("missing caption", "has no .txt beside it")
        where = self.table and f"row {i + 1} of {self.table}"
        return Raw(image, caption, (self.numbers[label],) * len(self.attributes), question, where)


def walk(folder: Path, around: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All that lies below a folder, in order, also behind links; not a folder around itself."""
    around = (*around, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.resolve() not in around:
            yield from walk(path, around)
        else:
            yield path


def open_source(spec: str, split: str, data_root: str, names: list | None) -> Files:
    """All images below a folder; a subfolder's name is the class of its images.

    With `names`, folders of other names have no class: they may just sort the files.
    """
    root, images, texts, unread, left_out = Path(spec), [], {}, set(), Counter()
    for path in walk(root):
        kind, stem = path.suffix.lower(), normal(str(path.with_suffix("")))
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            left_out["hidden file"] += 1
        elif kind in IMAGE_TYPES:
            images.append((path, stem))
        elif kind == ".txt" and stem not in texts:
            texts[stem] = path
        else:
            left_out[f"file of another type ({kind or 'none'})"] += 1
            unread |= {stem} if kind in UNREAD_TYPES else set()
    rows, known = [], number_classes(names) if names else None
    for path, stem in images:
        label = plain_label(path.parent.name) if path.parent != root else None
        if known and label not in known:
            left_out[f"class of a folder: {unknown_label(label, tuple(known))}"] += 1
            label = None
        elif label and not known and re.fullmatch(r"\d{5,}", label):
            left_out["class of a numbered folder"] += 1
            label = None
        rows.append((path, texts.get(stem), label, None))
    alone = sorted(texts.keys() - {stem for _, stem in images})
    left_out["text of an image of another type"] += len(unread.intersection(alone))
    if not images:
        found = describe(left_out + Counter({"text": len(texts)})) or "no file at all"
        raise UserError(f"{root} holds no image ({', '.join(IMAGE_TYPES)}); found: {found}")
    rows += [(None, texts[stem], None, None) for stem in alone if stem not in unread]
    return Files(rows, names, +left_out)
