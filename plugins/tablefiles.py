"""Tables of images and captions, gzip'd (.gz) or not.

--data FILE.csv | FILE.tsv | FILE.jsonl | FILE.json     columns filepath, relative to the file, and
                                                        caption (or title); optional label, question

A .csv quotes fields as RFC 4180 does. A .tsv has no quoting: a tab ends a field, a line ends a row.
A .json is one list of the objects that a .jsonl has on its lines.
"""

import csv
import gzip
import json
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import BadSample, UserError, printable
from plugins.files import Files
from plugins.labels import plain_label

csv.field_size_limit(2**31 - 1)  # the default refuses a long caption, and the table with it

COLUMNS = ("filepath", "caption", "title", "label", "question")
NOT_GIVEN = ("", "nan", "NaN")  # as pandas writes what it does not have


def open_source(spec: str, split: str, root: str, class_names: list | None) -> Files:
    """The rows of a table; those that cannot be used say why."""
    path, rows, columns, left_out = Path(spec), [], {}, Counter()
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    # surrogateescape carries bad bytes to `read_caption`, which reports their row.
    text = {"newline": "", "encoding": "utf-8-sig", "errors": "surrogateescape"}
    with opener(path, "rt", **text) as lines:
        read = {"csv": read_csv, "tsv": read_tsv, "jsonl": read_lines, "json": read_list}[kind]
        try:
            for record in read(lines):
                if isinstance(record, dict | list):  # a JSON object may lack what others have
                    columns |= dict.fromkeys(record)
                row = make_row(record, path.parent) if isinstance(record, dict) else record
                if isinstance(row, str):
                    row = f"row {len(rows) + 1} of {path} {row}"
                    rows.append(BadSample("unreadable row", row))
                elif isinstance(row, tuple):
                    rows.append(row)
                left_out["blank line"] += row is None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            rows.append(BadSample("unreadable row", f"after row {len(rows)} of {path}: {error}"))
    if "filepath" not in columns or not {"caption", "title", "label"} & columns.keys():
        found = printable(", ".join(columns) or "none")
        raise UserError(f"{path} needs the columns filepath and caption (or title); found: {found}")
    if not rows:
        raise UserError(f"{path} holds no row")
    return Files(rows, class_names, +left_out, spec)


def make_row(record: dict, folder: Path) -> tuple | str:
    """The path, caption, label and question of a record, or what is wrong with it."""
    texts = [record.get(key) for key in ("filepath", "caption", "title", "question")]
    label = record.get("label")
    if not all(isinstance(text, str | None) for text in texts) or isinstance(label, list | dict):
        return "has something else than text"
    if not record.get("filepath"):
        return "has no filepath"
    caption = record.get("caption", record.get("title"))
    caption = None if caption in NOT_GIVEN[1:] else caption
    # A column of whole numbers with gaps is one of floats to pandas: 3.0 is the label 3.
    label = "" if label is None else str(label).strip()
    label = label.removesuffix(".0") if label[:-2].isdecimal() else label
    label = None if label in NOT_GIVEN else plain_label(label)
    return folder / record["filepath"], caption, label, record.get("question")


# ------------------------------------------------------------------------------------------------
# Each of these yields the names of the columns, if it has a header, and for each row what it holds
# by column, or says what is wrong with it; None for a blank line.


def read_csv(lines: Iterable[str]) -> Iterator[list | dict | str | None]:
    """The rows after the header; without a good row where one should start, its line is bad.

    A quotation mark that is never closed swallows the rows that follow, which are then read again.
    """
    lines, waiting, used = iter(lines), deque(), []
    header, blank = None, True

    def reader() -> Iterator[list[str]]:  # `blank`: "filepath, caption" has one after the comma
        return csv.reader(feed(), strict=True, skipinitialspace=blank)

    def feed() -> Iterator[str]:
        while waiting or (line := next(lines, None)) is not None:
            used.append(waiting.popleft() if waiting else line)
            yield used[-1]

    rows = reader()
    while True:
        used.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            row = f"is no row: {error}"
        if header is None and isinstance(row, list):
            header, blank = name_columns(row), ", " in used[0]
            rows = reader()
            yield header
        elif isinstance(row, str) or (len(used) > 1 and len(row) != len(header)):
            waiting.extendleft(reversed(used[1:]))  # one that failed does not go on
            rows = reader()
            yield row if isinstance(row, str) else "has a quotation mark too many"
        else:
            yield make_record(header, row)


def read_tsv(lines: Iterable[str]) -> Iterator[list | dict | str | None]:
    rows = (line.rstrip("\r\n").split("\t") for line in lines)
    yield (header := name_columns(next(rows, [])))
    yield from (make_record(header, row) for row in rows)


def name_columns(row: list[str]) -> list[str]:
    """The names in a header; UserError if one of ours stands there twice."""
    header = [name.strip() for name in row]
    for name in COLUMNS:
        if header.count(name) > 1:
            raise UserError(f"a table may have one column '{name}', not {header.count(name)}")
    return header


def make_record(header: list[str], row: list[str]) -> dict | str | None:
    if not any(map(str.strip, row)):
        return None
    if len(row) != len(header):
        return f"has {len(row)} fields, the header {len(header)}"
    return dict(zip(header, row, strict=True))


def read_lines(lines: Iterable[str]) -> Iterator[list | dict | str | None]:
    """JSON lines."""
    for line in lines:
        try:
            record = json.loads(line, object_pairs_hook=no_repeats) if line.strip() else None
            yield record if isinstance(record, dict | None) else "is no JSON object"
        except (ValueError, RecursionError) as error:
            yield f"is no JSON object: {error}"


def read_list(lines: Iterable[str]) -> Iterator[list | dict | str | None]:
    """One JSON list of objects."""
    try:
        records = json.loads("".join(lines), object_pairs_hook=no_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the table is not JSON: {error}") from None
    if not isinstance(records, list):
        raise UserError("the .json is no list of objects, one for each image: use .jsonl or .csv")
    yield from (r if isinstance(r, dict) else "is no JSON object" for r in records)


def no_repeats(pairs: list[tuple]) -> dict:
    """A JSON object; ValueError if two values have one name, of which Python would drop one."""
    if len(record := dict(pairs)) < len(pairs):
        raise ValueError("two values have one name")
    return record
