"""Labels of samples, and the classes that they mean: what folders, tables and shards share."""

import difflib
import functools
import re
from collections import Counter

from data import UserError, normal


def plain_label(text: str) -> str:
    """A label as it is compared: "hot_dog" is "hot dog"."""
    return normal(text.replace("_", " ")).strip()


def number_classes(names: list[list[str]]) -> dict[str | None, int]:
    """The class of each label: its names, or its number from 0; -1 without a label.

    Raises UserError if two classes have one name: the second could never be right.
    """
    counts = Counter(name for aliases in names for name in {*map(plain_label, aliases)})
    if twice := [name for name, n in counts.items() if n > 1]:
        raise UserError(f"--class-names: '{twice[0]}' names {counts[twice[0]]} classes")
    named = {plain_label(name): c for c, aliases in enumerate(names) for name in aliases}
    if not any(name.isdecimal() for name in named):  # else a label could mean two classes
        named |= {str(c): c for c in range(len(names))}
    return {None: -1} | named


@functools.lru_cache
def unknown_label(label: str, known: tuple[str | None, ...]) -> str:
    """Says that a label is not one of --class-names, and which one comes close."""
    simple = {re.sub(r"[\W_]+", " ", name).casefold(): name for name in known if name}
    close = difflib.get_close_matches(re.sub(r"[\W_]+", " ", label).casefold(), simple, 1, 0.8)
    hint = f"; close to it: '{simple[close[0]]}'" if close else ""
    return f"'{label}' is not in --class-names{hint}"
