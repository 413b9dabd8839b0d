"""Icons with the names that their designers gave them: from one tarball to webdataset shards.

    npm pack @iconify/json          # 104 MB, written as iconify-json-VERSION.tgz
    pip install resvg-py
    python experiments/icons.py iconify-json-VERSION.tgz --out data/icons   # six minutes, one core

All cores draw. The archive is read, never extracted. The same tarball gives the same bytes (with
the same versions of resvg-py and Pillow): every choice below is a hash of the icon's key, and
nothing else is random.

    train-*.tar     images and captions to train on, all sets mixed
    labelled-*.tar  those images of train that show exactly one class, with its number
    prompts-*.tar   labelled icons of the training sets that are kept out of train: for choosing
                    prompts and whatever else must not be chosen on the test
    val-*.tar       the test: icons of the held-out sets that show exactly one class
    rare-*.tar      the harder test: likewise, for concepts with few captions in training
    unseen-*.tar    every icon of the held-out sets, for search
    classes.txt, rare.txt   --class-names for labelled, prompts and val, and for rare
    statistics.json, sheet.png   counts of all kinds, and some of the images

Decisions:
- Sets: permissive licences only (LICENCES). Logos, flags and maps, archives, file types and
  products of programming, and sets that Iconify hides are left out: their names say little about
  the drawing. So are such categories within the other sets, and emoji named after a skin tone,
  which are five copies of another one.
- Held out are whole families of sets (HELD_OUT), so that no sibling of a test set, which draws the
  same objects in another weight, is in training.
- Caption: the icon's name with blanks for hyphens, for some icons followed by another name, a
  category or the title of the set. All of it is text that the designers wrote, and nothing is
  removed: words of style ("outline") and size ("24") are the filler words of these captions.
- Drawing: an icon of one colour is dark on a light ground or light on a dark one, in random hues;
  an icon with colours of its own keeps them, on a light ground. With --plain, black on white and
  own colours on white: an encoder learns these sooner (compare.py uses them) but knows nothing
  else.
- With --copies N, an icon is N times in train: each further copy has colours and choices of
  the caption of its own, is up to 10 degrees turned and up to a tenth larger or smaller.
- Duplicates: an icon with the same drawing code or the same grey pixels (at 32 px and in 16
  levels, whatever --size) as an earlier one is dropped. Held-out sets are read first, so that no
  drawing of the test is in training.
- Classes: everyday nouns with their synonyms. A name shows a concept if it holds one of its words
  as a whole word, in the singular or plural; an icon is labelled if its name shows exactly one of
  all concepts, common and rare. val holds at most VAL_PER_CLASS icons of a class, so that no class
  dominates the score.
"""

import argparse
import colorsys
import functools
import hashlib
import importlib.util
import io
import json
import re
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

LICENCES = ("MIT", "ISC", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "OFL-1.1")
LICENCES += ("CC0-1.0", "Unlicense", "CC-BY-3.0", "CC-BY-4.0")
LEFT_OUT_CATEGORIES = ("Logos", "Flags / Maps", "Archive / Unmaintained", "Programming")
LEFT_OUT_SETS = ("academicons", "svg-spinners")  # logos of publishers; animations
LEFT_OUT_ICONS = re.compile(r"(flag|brand|logo).*", re.IGNORECASE)  # categories within a set
SKIN_TONE = "-skin-tone"
HELD_OUT = {  # family: its sets, all of which are kept out of training
    "Bootstrap Icons": ("bi",),
    "Font Awesome": ("fa7-regular", "fa7-solid"),
    "Lucide": ("lucide", "lucide-lab"),
    "Marketeq": ("marketeq",),
    "Pepicons": ("pepicons-pencil", "pepicons-pop", "pepicons-print"),
    "Phosphor": ("ph",),
    "Pixelarticons": ("pixelarticons",),
    "Twitter Emoji": ("twemoji",),
    "Unicons": ("uil", "uim", "uis", "uit"),
}
# A concept's name and its synonyms; in RARE, none is in more than 60 captions of training.
CLASSES = """
airplane, plane; alien; ambulance; anchor; apple; backpack; bag, handbag; balloon; barcode;
baseball; basket; basketball; bathtub, bath; battery; bed; bell; bicycle, bike; bird; boat, ship,
sailboat; book, notebook; bookmark; bottle; bowl; briefcase; brush, paintbrush; bug; bus; cake;
calculator; calendar; camera; car, automobile; cart, shopping cart, trolley; cat; chair, armchair;
chess; clipboard; clock; cloud; coffee; coin; compass; computer, monitor, desktop; cookie; credit
card; crown; cube; cup, mug; database; diamond, gem; dice; dog; door; egg; envelope, mail, email;
eraser; eye; factory; film; fingerprint; fire, flame; fish; flag; flask; floppy disk, floppy,
diskette; flower; folder; funnel; gauge, speedometer; gear, cog; gift, present; globe, earth;
hammer; handshake; hat; headphone, headphones; heart; highlighter; hospital; hourglass; house, home;
key; keyboard; lamp; laptop; leaf; lightbulb, light bulb, bulb; lightning, bolt, thunderbolt; lock,
padlock; magnet; magnifying glass, magnifier; medal; megaphone, bullhorn; microphone, mic;
microscope; moon; motorcycle, motorbike; mountain; newspaper; package, parcel; palette; paperclip;
pencil, pen; phone, telephone, smartphone, cellphone; photo, picture, image; pill; planet, saturn;
plant; plug; printer; projector; puzzle; radio; receipt; robot; rocket; ruler; scissors; server;
shield; shirt, t shirt, tshirt; skull; snowflake, snow; speaker, loudspeaker; star; stethoscope;
stopwatch; store, shop; suitcase, luggage; sun; sword; syringe; taxi; television, tv; tent;
thermometer; ticket; toilet; train; trash, garbage; tree; trophy; truck, lorry; umbrella; virus;
wallet; wand; watch, smartwatch; webcam; wrench, spanner
"""
RARE = """
acorn; astronaut; avocado; barn; belt; binoculars; bowling; boxing glove; butterfly; cable car;
cactus; campfire; carrot; cassette; chalkboard; cheese; church; cigarette; clover; coat; comet; cow;
crane; dress; drum; fire extinguisher; gavel; helicopter; infinity; jar; ladder; lasso; lighthouse;
martini; mosque; parachute; pepper; piggy bank; popcorn; popsicle; seedling; shovel; shrimp, prawn;
snowboard; sock; spider; stool; sunglasses; synagogue; toilet paper; towel; tractor; traffic cone;
tram; ufo, flying saucer; van; vinyl; washing machine; yarn; yin yang
"""
ALIAS, CATEGORY, TITLE = 0.4, 0.25, 0.15  # the share of captions with each, where there is one
PROMPTS = 0.04  # the share of labelled icons that is kept out of training
VAL_PER_CLASS = 50
SHARD = 5000  # samples at most
MARGIN = 1 / 16  # of the icon's longer side, on each side
TURN, SCALE = 10, 0.1  # of further copies, at most: degrees, and the share of the side


class UserError(Exception):
    """A mistake of the user's, told in one sentence."""


class Icon(NamedTuple):
    """An icon of a set that is used, as the set's file has it."""

    key: str
    name: str
    extra: tuple  # (other names, ALIAS), (categories, CATEGORY), (titles, TITLE)
    svg: dict  # its body and box
    coloured: bool
    held_out: bool


class Sample(NamedTuple):
    """An icon as it is written; `number` is the line of its concept in classes.txt or rare.txt."""

    key: str
    caption: str
    png: bytes
    number: int | None


def chance(key: str, what: str) -> float:
    """A number in [0, 1) for a decision about an icon: a hash, so it depends on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{what} {key}".encode()).digest()[:8], "big") / 2**64


# ------------------------------------------------------------------------------------------------
# Sets, captions and concepts.


def choose_sets(collections: dict) -> dict[str, bool]:
    """{prefix: whether it is held out} of the sets that are used, held-out ones first."""
    held_out = [prefix for family in HELD_OUT.values() for prefix in family]
    used = [
        prefix
        for prefix, info in sorted(collections.items())
        if info["license"].get("spdx") in LICENCES
        and info.get("category", "Logos") not in LEFT_OUT_CATEGORIES
        and not info.get("hidden")
        and prefix not in LEFT_OUT_SETS
    ]
    return {p: True for p in used if p in held_out} | {p: False for p in used if p not in held_out}


def open_tarball(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read as a tarball: {error}") from None


def read_json(tar: tarfile.TarFile, name: str) -> dict:
    """A JSON member of the npm package."""
    try:
        return json.load(tar.extractfile(f"package/{name}.json"))
    except KeyError:
        raise UserError(f"{tar.name} holds no package/{name}.json: is it @iconify/json?") from None
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{tar.name} is damaged: {error}") from None


def read_icons(tar: tarfile.TarFile) -> Iterator[Icon]:
    """The icons of all sets that are used, those of held-out sets first."""
    collections = read_json(tar, "collections")
    for prefix, held_out in choose_sets(collections).items():
        icons = read_json(tar, f"json/{prefix}")
        aliases, categories = {}, {}
        for alias, entry in icons.get("aliases", {}).items():
            if entry.keys() == {"parent"}:  # others are mirrored
                aliases.setdefault(entry["parent"], []).append(alias.replace("-", " "))
        for category, names in icons.get("categories", {}).items():
            for name in names:
                categories.setdefault(name, []).append(category)
        box = {"left": 0, "top": 0, "width": 16, "height": 16}
        box |= {side: icons[side] for side in box if side in icons}
        coloured, titles = bool(collections[prefix].get("palette")), [icons["info"]["name"]]
        for name, svg in sorted(icons["icons"].items()):
            groups = categories.get(name, [])
            if svg.get("hidden") or SKIN_TONE in name or any(map(LEFT_OUT_ICONS.match, groups)):
                continue
            extra = (aliases.get(name), ALIAS), (groups, CATEGORY), (titles, TITLE)
            yield Icon(f"{prefix}_{name}", name, extra, box | svg, coloured, held_out)


def caption(icon: Icon, key: str) -> str:
    """The icon's name, with what `key` decides to add."""
    parts = [icon.name.replace("-", " ")]
    for what, (texts, share) in zip(("alias", "category", "title"), icon.extra, strict=True):
        if texts and chance(key, what) < share:
            parts.append(texts[int(chance(key, f"which {what}") * len(texts))])
    return ", ".join(dict.fromkeys(parts))


def parse_concepts(text: str) -> list[list[str]]:
    """[[name, synonym, ...], ...] of CLASSES or RARE."""
    return [[name.strip() for name in c.split(",")] for c in " ".join(text.split()).split(";")]


CONCEPTS = {
    name: (kind, number)
    for kind, text in (("val", CLASSES), ("rare", RARE))
    for number, names in enumerate(parse_concepts(text))
    for name in names
}
# The longest names first: "toilet paper" is no toilet. "bell2" is a bell.
PATTERN = re.compile(rf"\b({'|'.join(sorted(CONCEPTS, key=len, reverse=True))})(?:s|es)?\d*\b")


def find_concepts(text: str) -> set[tuple[str, int]]:
    """{("val" or "rare", number), ...}: the concepts in an icon's name or a caption."""
    return {CONCEPTS[name] for name in PATTERN.findall(text.replace("-", " ").lower())}


# ------------------------------------------------------------------------------------------------
# Drawing.


def draw(svg: dict, size: int, turn: float = 0, scale: float = 1) -> Image.Image:
    """The icon as RGBA in the middle of a transparent square; ValueError when that fails."""
    import resvg_py  # --list works without it

    side = max(svg["width"], svg["height"]) * (1 + 2 * MARGIN) / scale
    left = svg["left"] - (side - svg["width"]) / 2
    top = svg["top"] - (side - svg["height"]) / 2
    body = svg["body"]
    if turn:
        body = f'<g transform="rotate({turn} {left + side / 2} {top + side / 2})">{body}</g>'
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{left} {top} {side} {side}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=text, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def random_colour(key: str, what: str, darkest: float, lightest: float) -> tuple[int, ...]:
    """An RGB colour of any hue whose lightness, 0 to 1, is between the two."""
    hue, position, saturation = (chance(key, f"{what} {part}") for part in ("hue", "light", "sat"))
    rgb = colorsys.hls_to_rgb(hue, darkest + position * (lightest - darkest), saturation)
    return tuple(round(255 * part) for part in rgb)


def paint(drawn: Image.Image, key: str, coloured: bool, plain: bool) -> Image.Image:
    """The icon as RGB on a ground; one without colours of its own gets one."""
    ink, ground = random_colour(key, "dark", 0, 0.35), random_colour(key, "light", 0.85, 1)
    if not coloured and chance(key, "reverse") < 0.5:
        ink, ground = ground, ink
    if plain:
        ink, ground = (0, 0, 0), (255, 255, 255)
    image = Image.new("RGB", drawn.size, ground)
    ink = drawn.convert("RGB") if coloured else ink
    image.paste(ink, (0, 0, *drawn.size), drawn.getchannel("A"))
    return image


def digest_pixels(drawn: Image.Image) -> bytes:
    """A hash of the drawing in grey on white, in 16 levels: these hide differences of rounding."""
    grey = Image.new("RGBA", drawn.size, "white")
    grey.alpha_composite(drawn)
    return hashlib.sha256(grey.convert("L").point([i // 16 for i in range(256)]).tobytes()).digest()


def render(icon: Icon, size: int, plain: bool, copies: int) -> tuple[bytes | str, list[bytes]]:
    """The digest of an icon's pixels, and it and its copies as PNG; or why it cannot be used."""
    try:
        small = draw(icon.svg, 32)
        drawn = [small if size == 32 else draw(icon.svg, size)]
        for key in keys(icon, copies)[1:]:
            turn, scale = (2 * chance(key, what) - 1 for what in ("turn", "scale"))
            drawn.append(draw(icon.svg, size, TURN * turn, 1 + SCALE * scale))
    except ValueError:
        return "could not be drawn", []
    if not small.getchannel("A").getbbox():
        return "blank", []
    pngs = []
    for key, image in zip(keys(icon, copies), drawn, strict=True):
        buffer = io.BytesIO()
        paint(image, key, icon.coloured, plain).save(buffer, "PNG")
        pngs.append(buffer.getvalue())
    return digest_pixels(small), pngs


def keys(icon: Icon, copies: int) -> list[str]:
    """The keys of an icon and its further copies; those that are tested have none."""
    names, _ = choose_splits(icon)
    return [icon.key] + [f"{icon.key}+{n}" for n in range(1, copies if "train" in names else 1)]


# ------------------------------------------------------------------------------------------------
# From the tarball to shards.


def build(tar: tarfile.TarFile, size: int, plain: bool, copies: int) -> tuple[dict, dict]:
    """{split: samples in the order of the shards}, and the statistics; all images are in memory."""
    left_out = {kind: [] for kind in ("same code", "same pixels", "blank", "could not be drawn")}
    splits = {name: [] for name in ("train", "labelled", "prompts", "val", "rare", "unseen")}
    icons, codes, seen = [], set(), set()
    for icon in read_icons(tar):
        code = hashlib.sha256(icon.svg["body"].encode()).digest()
        if code in codes:
            left_out["same code"].append(icon.key)
        else:
            codes.add(code), icons.append(icon)
    draw_one = functools.partial(render, size=size, plain=plain, copies=copies)
    with ProcessPoolExecutor() as pool:  # as many processes as cores
        drawn = pool.map(draw_one, icons, chunksize=64)
        for icon, (found, pngs) in zip(icons, drawn, strict=True):
            why = found if isinstance(found, str) else "same pixels" if found in seen else None
            if why:
                left_out[why].append(icon.key)
                continue
            seen.add(found)
            names, number = choose_splits(icon)
            for key, png in zip(keys(icon, copies), pngs, strict=True):
                for split in names if key == icon.key else ["train"]:
                    splits[split].append(Sample(key, caption(icon, key), png, number))
    for samples in splits.values():
        samples.sort(key=lambda sample: chance(sample.key, "order"))
    splits["val"] = list(first_of_each(splits["val"], VAL_PER_CLASS))
    return splits, count(splits, read_json(tar, "collections"), left_out)


def choose_splits(icon: Icon) -> tuple[list[str], int | None]:
    """The splits that an icon is in, and the line of its concept if it shows exactly one."""
    concepts = find_concepts(icon.name)
    kind, number = concepts.pop() if len(concepts) == 1 else (None, None)
    if icon.held_out:
        return ["unseen", kind] if kind else ["unseen"], number
    if kind == "val":
        held_back = chance(icon.key, "prompts") < PROMPTS
        return ["prompts"] if held_back else ["train", "labelled"], number
    return ["train"], number


def first_of_each(samples: list[Sample], most: int) -> Iterator[Sample]:
    """The samples without those that come after the first `most` of their class."""
    taken = Counter()
    for sample in samples:
        taken[sample.number] += 1
        if taken[sample.number] <= most:
            yield sample


def count(splits: dict[str, list[Sample]], collections: dict, left_out: dict) -> dict:
    """What statistics.json holds."""
    captions = [sample.caption for sample in splits["train"]]
    words = [re.findall(r"\w+", caption.lower()) for caption in captions]
    frequent, lengths = Counter(word for row in words for word in row), sorted(map(len, words))
    mentions = Counter(concept for caption in captions for concept in find_concepts(caption))
    labels = {split: Counter(s.number for s in samples) for split, samples in splits.items()}
    written = splits["train"] + splits["prompts"] + splits["unseen"]
    sets = Counter(sample.key.split("_")[0] for sample in written)
    licences = Counter(collections[s.key.split("_")[0]]["license"]["spdx"] for s in written)
    return {
        "icons": {split: len(samples) for split, samples in splits.items()},
        "left out": {kind: len(keys) for kind, keys in left_out.items()},
        "blank or not drawn": left_out["blank"] + left_out["could not be drawn"],
        "icons by licence": dict(licences.most_common()),
        "icons by set": dict(sets),
        "different captions": len(set(captions)),
        "different words": len(frequent),
        "words per caption at quantiles": {
            q: lengths[int(q * (len(lengths) - 1))] for q in (0, 0.25, 0.5, 0.75, 0.95, 1)
        },
        "most frequent words": dict(frequent.most_common(60)),
        "classes: captions in train, icons in labelled, prompts, val": {
            names[0]: [mentions["val", c], *(labels[s][c] for s in ("labelled", "prompts", "val"))]
            for c, names in enumerate(parse_concepts(CLASSES))
        },
        "rare: captions in train, icons in rare": {
            names[0]: [mentions["rare", c], labels["rare"][c]]
            for c, names in enumerate(parse_concepts(RARE))
        },
    }


def write_shards(out: Path, split: str, samples: list[Sample]):
    """Write SPLIT-00000.tar and so on, of nearly equal length; times and owners are zero."""
    shards = -(-len(samples) // SHARD)
    for shard in range(shards):
        with tarfile.open(out / f"{split}-{shard:05d}.tar", "w") as tar:
            for sample in samples[shard::shards]:
                parts = {"png": sample.png, "txt": sample.caption.encode()}
                if split in ("labelled", "prompts", "val", "rare"):
                    parts["cls"] = str(sample.number).encode()
                for kind, content in parts.items():
                    info = tarfile.TarInfo(f"{sample.key}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def contact_sheet(rows: list[list[Sample]], side: int = 96) -> Image.Image:
    """A picture of samples with their captions, a row for each list."""
    wide, high = side + 8, side + 48
    sheet = Image.new("RGB", (wide * max(map(len, rows)), high * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, sample in enumerate(row):
            left, top = x * wide + 4, y * high + 4
            image = Image.open(io.BytesIO(sample.png))
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
            text = "\n".join(textwrap.wrap(sample.caption, 17)[:4])
            pen.text((left, top + side), text, "black", font_size=10, spacing=0)
    return sheet


def write(out: Path, splits: dict[str, list[Sample]], figures: dict):
    """Write all that the module's docstring lists."""
    out.mkdir(parents=True, exist_ok=True)
    for split, samples in splits.items():
        write_shards(out, split, samples)
    for name, text in (("classes.txt", CLASSES), ("rare.txt", RARE)):
        lines = [", ".join(names) + "\n" for names in parse_concepts(text)]
        (out / name).write_text("".join(lines))
    (out / "statistics.json").write_text(json.dumps(figures, indent=1) + "\n")
    rows = [splits["train"][i : i + 16] for i in range(0, 96, 16)]
    contact_sheet([*rows, splits["val"][:16], splits["rare"][:16]]).save(out / "sheet.png")


def list_sets(collections: dict):
    """Print a line for each set that is used."""
    print("split\tlicence\ticons\tcategory\tset")
    for prefix, held_out in choose_sets(collections).items():
        info = collections[prefix]
        parts = info["license"]["spdx"], str(info["total"]), info["category"]
        print("\t".join(("test" if held_out else "train", *parts, f"{prefix} ({info['name']})")))


def run(args: argparse.Namespace):
    out = args.out
    if not args.list and out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise UserError(f"--out {out} is not an empty folder: remove it or name another")
    with open_tarball(args.tarball) as tar:
        if args.list:
            return list_sets(read_json(tar, "collections"))
        if importlib.util.find_spec("resvg_py") is None:
            raise UserError("icons are drawn by resvg-py: pip install resvg-py")
        splits, figures = build(tar, args.size, args.plain, args.copies)
    write(out, splits, figures)
    for what in ("icons", "left out"):
        print(f"{what}: {', '.join(f'{name} {n:,}' for name, n in figures[what].items())}")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tarball", type=Path, help="of the npm package @iconify/json")
    parser.add_argument("--out", type=Path, default=Path("data/icons"), help="a new folder")
    parser.add_argument("--size", type=int, choices=(32, 64), default=32, help="pixels")
    parser.add_argument("--plain", action="store_true", help="black on white, no random colours")
    copies = {"type": int, "choices": range(1, 17), "metavar": "1..16", "default": 1}
    parser.add_argument("--copies", **copies, help="drawings of each training icon")
    parser.add_argument("--list", action="store_true", help="only list the sets that are used")
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
