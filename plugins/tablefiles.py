"""Tables of images and captions.

--data FILE.csv | FILE.tsv | FILE.jsonl      columns filepath, relative to the file, and caption
                                             (or title); optional label and question
"""

import contextlib
import csv
import json
from pathlib import Path

from data import Files, UserError


def open_source(spec: str, split: str, root: str, class_names: list | None) -> Files:
    """A CSV, TSV or JSON-lines file: filepath, caption (or title), optional label and question."""
    path, rows, columns = Path(spec), [], {}
    # surrogateescape carries bad bytes to `read_caption`, which reports their row.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        records = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for record in map(parse_json, lines) if path.suffix == ".jsonl" else records:
                columns |= dict.fromkeys(record)  # a JSON object may leave out what others have
                file, text = record.get("filepath"), record.get("caption", record.get("title"))
                label, question = record.get("label"), record.get("question")
                label = None if label in (None, "") else str(label).replace("_", " ")
                rows.append((path.parent / file, text, label, question) if file else None)
        except csv.Error as error:
            raise UserError(f"{path} is not a table: row {len(rows) + 2}: {error}") from None
    if "filepath" not in columns or not {"caption", "title", "label"} & columns.keys():
        found = ", ".join(map(str, columns)) or "none"
        raise UserError(f"{path} needs the columns filepath and caption (or title); found: {found}")
    return Files(rows, class_names)


def parse_json(line: str) -> dict:
    """One JSON object whose path, caption and question are text; an empty one if there is none."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        record = json.loads(line)
        texts = [record.get(key) for key in ("filepath", "caption", "title", "question")]
        if all(isinstance(text, str | None) for text in texts):
            return record
    return {}
