"""data.py: files to tensors and tensors to files.

Read from top to bottom: safe writing, one picture and its mask, a folder of labelled pictures, the
download, the toy pets, the cache (every picture decoded once), augmentation and batches, and at the
end the pictures that the program draws. This is the only file that knows Pillow.

A label is a byte: the number of a class, 0 the background; 128 more is the border of that class,
255 a pixel that does not count. `targets` turns labels into what is learned. A size is (height,
width) everywhere.
"""
import csv
import hashlib
import http.client
import io
import json
import math
import os
import re
import shutil
import struct
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from ssl import SSLError
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps


def printable(text):
    """A name or a message on one line: line ends, bytes of no alphabet and marks that would turn
    the writing round appear as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Problem(Exception):
    """Something that the user can mend: one line with what is wrong, where, and what to do."""

    def __str__(self):
        return printable(super().__str__())


class Unreadable(Problem):
    """A picture that is missing or damaged; the caller decides whether to go on without it."""


def generator(*key):
    """A random generator that is a function of `key` alone, say ("shuffle", seed, epoch). What was
    drawn before plays no part, so a resumed run draws what the undisturbed one would have."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def whole(path):
    """A name beside `path` to write a file or a folder under, which takes the name `path` when it
    is complete. A kill, an error or a full disk leaves what stood there before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as temporary:
        new = Path(temporary) / "new"
        yield new
        if new.is_dir() and path.exists():  # a file can be renamed onto another, a folder cannot
            os.replace(path, Path(temporary) / "old")
        os.replace(new, path)


def write(path, content, sync=False):
    """Writes a file whole or not at all; with `sync` it then outlasts a power cut."""
    with whole(path) as new, open(new, "wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    if sync:
        folder = os.open(Path(path).parent, os.O_RDONLY)
        os.fsync(folder)  # the file's name is an entry of its folder
        os.close(folder)


def write_table(path, rows):
    """Rows, which are dicts of the same names, as a CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0] if rows else ())
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode("utf-8", "surrogateescape"))


def write_json(path, content):
    """A small result as a file."""
    write(path, json.dumps(content, indent=2).encode())


def ahead(function, items, report):
    """Yields function(item), or the Problem it met instead, of each item in turn, worked out by as
    many threads as there are cores. Four times as many are begun at most before the first is taken,
    so memory stays flat. `report(done, all)` is told of each."""
    def attempt(item):
        try:
            return function(item)
        except Problem as fault:
            return fault

    # what torchrun has started on one machine shares its cores
    cores = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    rest = iter(items)
    pool = ThreadPoolExecutor(cores)
    try:
        waiting = deque(pool.submit(attempt, item) for item in islice(rest, 4 * cores))
        for done in range(1, len(items) + 1):
            found = waiting.popleft().result()
            waiting.extend(pool.submit(attempt, item) for item in islice(rest, 1))
            report(done, len(items))
            yield found
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only what is begun is brought to its end


# ------------------------------------------------------------------------- one picture, one mask

# what Pillow raises at files that are cut off, damaged, or no pictures at all
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, RuntimeError,
          MemoryError, struct.error)
Image.init()  # of all that Pillow knows those that photos have; EPS would start a program
FORMATS = [kind for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "JPEG2000", "PPM")
           if kind in Image.OPEN]
warnings.filterwarnings("ignore", module="PIL")  # a file is good enough to be read, or it is named
ORIENTATION = 0x0112  # EXIF's tag; from 5 on, width and height change places
LARGE, LARGE_ONE = 25_000_000, threading.RLock()  # pixels; what to hold while such a one is about
EDGE, VOID = 128, 255  # labels: EDGE + 1 is the border of class 1; VOID does not count
COLOUR = 1 << 24  # what a mask's colour #rrggbb is as a number: COLOUR + 0xrrggbb


def allow(pixels):
    """Sets how many pixels a picture may say it has; one of more is refused before it is decoded.
    Pillow looks after it; it warns at the number it is given and refuses at twice that."""
    Image.MAX_IMAGE_PIXELS = pixels / 2


def turn(image):
    """What to hold while working on a picture: of large ones only one is in memory at a time."""
    return LARGE_ONE if image.width * image.height > LARGE else nullcontext()


@contextmanager
def opened(path):
    """A picture of which no more than the head has been read. Whatever Pillow meets in the file
    while it is in use is an Unreadable."""
    try:
        if not os.path.isfile(path):  # a pipe would keep us waiting
            raise OSError("there is no such file")
        with Image.open(path, formats=FORMATS) as image, turn(image):
            if max(image.size) > 10**6:  # Pillow keeps 12 bytes for each row, however short it is
                raise ValueError("one side is longer than a million pixels")
            yield image
    except Image.DecompressionBombError as error:
        raise Unreadable(f"{path} has more than {2 * Image.MAX_IMAGE_PIXELS:,.0f} pixels; to take "
                         "it all the same, raise --max-pixels") from error
    except BROKEN as error:
        raise Unreadable(f"{path}: {error}") from error


def read_image(path, size=None, mask_size=None):
    """A photo in any of FORMATS as an RGB image, upright, scaled to `size`.

    A JPEG much larger than `size` is decoded at ½, ¼ or ⅛ of its side, which its format makes
    cheap, but never below twice `size`: the last halving is left to the better filter.
    """
    with opened(path) as image:
        stored = image.size[::-1]
        turned = image.getexif().get(ORIENTATION, 1) >= 5 and image.format != "TIFF"
        shown = stored[::-1] if turned else stored  # a TIFF has been turned by Pillow already
        if mask_size not in (None, stored, shown):
            raise Problem("{} is {}×{} pixels high and wide, its mask {}×{}; they must agree"
                          .format(path, *shown, *mask_size))
        if size:
            image.draft("RGB", (2 * max(size), 2 * max(size)))
        if mask_size in (None, shown):  # a mask drawn on the stored picture wants it unturned
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):  # 16 bits or more: to the range of a byte
            values = np.array(image, dtype=np.float32)
            np.nan_to_num(values, copy=False, posinf=0, neginf=0)
            top = 65535 if image.mode.startswith("I;16") else max(values.max(), 1)
            values.clip(0, top, out=values)
            values *= 255 / top
            image = Image.fromarray(values.astype(np.uint8))
        if "A" in image.mode or "transparency" in image.info:
            image, ground = image.convert("RGBA"), Image.new("RGB", image.size, "white")
            ground.paste(image, mask=image)
            image = ground
        image.load()  # while the file is open
        image = image if image.mode == "RGB" else image.convert("RGB")
        return image.resize(size[::-1], Image.Resampling.BILINEAR) if size else image


def bands(size, pixels=1 << 20):
    """The rows of a picture of `size` in slices of about a million pixels: what is worked out from
    each pixel need not lie in memory for all of them."""
    step = max(1, pixels // size[1])
    return [slice(top, min(top + step, size[0])) for top in range(0, size[0], step)]


def mask_numbers(path):
    """A mask as one whole number a pixel: the one that stands there, or its colour."""
    with opened(path) as image:
        if image.format == "JPEG":
            raise Problem(f"the mask {path} is a JPEG, which blurs numbers: are images and masks "
                          "swapped? Keep masks as PNG")
        if image.mode in ("RGB", "RGBA"):
            numbers = np.empty(image.size[::-1], np.int32)
            for rows in bands(numbers.shape):
                band = image.crop((0, rows.start, image.width, rows.stop)).convert("RGB")
                numbers[rows] = COLOUR + np.asarray(band, np.int32) @ (1 << 16, 1 << 8, 1)
            return numbers
        if image.mode not in ("1", "L", "P", "LA", "PA", "I", "I;16"):
            raise Problem(f"the mask {path} is of the kind {image.mode}; expected a number or a "
                          "colour a pixel")
        numbers = np.asarray(image.getchannel(0) if len(image.getbands()) > 1 else image)
        return numbers.view(np.uint8) if numbers.dtype == bool else numbers


def shown(numbers):
    """Numbers of a mask as people write them, the first nine."""
    words = [f"#{n - COLOUR:06x}" if n >= COLOUR else str(n) for n in list(numbers)[:10]]
    return ", ".join(words[:9]) + (" …" if len(words) > 9 else "")


def read_mask(path, codes):
    """A mask as labels of its own size; `codes` says which label each of its numbers stands for."""
    numbers, known = mask_numbers(path), np.array(sorted(codes))
    meant = np.array([codes[number] for number in known.tolist()], dtype=np.uint8)
    labels, right = np.empty(numbers.shape, np.uint8), True
    for rows in bands(numbers.shape):
        places = np.searchsorted(known, numbers[rows]).clip(max=len(known) - 1)
        right = right and (known[places] == numbers[rows]).all()
        labels[rows] = meant[places]
    if not right:
        words = {0: "background", VOID: "void", **dict.fromkeys(range(EDGE, VOID), "border")}
        expected = [f"{number} = {words.get(label, f'class {label}')}"
                    for number, label in codes.items()]
        raise Problem(f"the mask {path} holds {shown(np.unique(numbers))}; expected "
                      f"{', '.join(expected[:9])}")
    return labels


def picture(array):
    """An array of bytes as a picture; a boolean one as white on black."""
    return Image.fromarray(array * np.uint8(255) if array.dtype == bool else np.asarray(array))


def resized(image, size, how="BILINEAR"):
    """A picture, or an array as one, at another size, as an array."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.array(image.resize(size[::-1], Image.Resampling[how]))


def enlarged(small, size):
    """Yields (rows, those rows of floats (C, H, W) enlarged to `size`), band by band."""
    channels, (_, height, width) = [Image.fromarray(each) for each in small], small.shape
    for rows in bands(size, (1 << 20) // len(small) + 1):
        high, scale = rows.stop - rows.start, height / size[0]
        box = (0, rows.start * scale, width, min(rows.stop * scale, height))
        # down before across: Pillow's own order makes 128 rows of a picture of one very wide row
        found = [each.resize((width, high), Image.Resampling.BILINEAR, box)
                 .resize((size[1], high), Image.Resampling.BILINEAR) for each in channels]
        yield rows, np.stack(found)


def read_pair(sample, size):
    """One photo and its labels as arrays of bytes, (H, W, 3) and (H, W).

    Threads are enough to read many: Pillow lets go of Python's lock while it decodes and scales.
    Two cores read 1,145 JPEGs of 500×375 a second with two threads, 599 with one."""
    labels = read_mask(sample.mask, sample.codes)
    image = read_image(sample.image, size, labels.shape)
    return np.asarray(image), resized(labels, size, "NEAREST")


# ------------------------------------------------------------------ a folder of labelled pictures

PETS, TOYS = "oxford-iiit-pet", "toy-pets"
PET_CODES, CAT_CODES, DOG_CODES = ({1: pet, 2: 0, 3: EDGE + pet} for pet in (1, 1, 2))


class Sample(NamedTuple):
    """One labelled photo: its name, where its files are, and what its mask's numbers stand for."""
    name: str
    image: Path
    mask: Path
    codes: dict


class Source(NamedTuple):
    """A folder of labelled pictures, as it was understood."""
    folder: Path
    layout: str    # in words
    classes: list  # their names
    splits: dict   # {"train": [Sample, ...], "valid": [...], "test": [...] where there is one}
    drawn: dict    # the names in "valid" and "test", where not the folder says it but the lot
    notes: list    # what was left out or might be meant otherwise, a line each


def look_at_pets(folder, classes):
    """The layout of the Oxford-IIIT Pets. Every tenth line of trainval.txt, the first included, is
    valid, the others are train: nothing is shuffled, so the split is that of everyone who does the
    same. A line is a name, and may go on with a breed, a species (1 cat, 2 dog), and another."""
    lists = {}
    for listing in ("trainval", "test"):
        path = folder / "annotations" / f"{listing}.txt"
        if listing == "test" and not path.is_file():
            continue
        if not path.is_file():
            raise Problem(f"{folder} does not look like the pets: there is no {path}; expected "
                          "images/NAME.jpg, annotations/trimaps/NAME.png, annotations/trainval.txt")
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        lists[listing] = [line.split() for line in lines
                          if line.strip() and not line.startswith("#")]
    lines = lists.pop("trainval")
    lists["train"] = [line for i, line in enumerate(lines) if i % 10]
    lists["valid"] = lines[::10]

    def sample(line):
        name, codes = line[0], PET_CODES
        if classes == "species":
            codes = {"1": CAT_CODES, "2": DOG_CODES}.get("".join(line[2:3]))
            if not codes:
                raise Problem(f"{folder} does not say of what species {name} is: expected in its "
                              "list NAME BREED SPECIES, a species being 1 (cat) or 2 (dog)")
        return Sample(name, folder / "images" / f"{name}.jpg",
                      folder / "annotations" / "trimaps" / f"{name}.png", codes)

    for split, lines in lists.items():
        if not lines:
            listing = folder / "annotations" / ("test.txt" if split == "test" else "trainval.txt")
            raise Problem(f"the {split} split of {folder} is empty; {listing} names too few "
                          "pictures")
    names = ["background", "pet"] if classes == "pet" else ["background", "cat", "dog"]
    splits = {split: [*map(sample, lists[split])] for split in ("train", "valid", "test")
              if split in lists}
    return Source(folder, "the pets' layout", names, splits, {}, [])


# the 30 classes of Cityscapes, in the order of their ids from 4 on, and the 19 of its benchmark
CITYSCAPES = ("static dynamic ground road sidewalk parking rail-track building wall fence "
              "guard-rail bridge tunnel pole polegroup traffic-light traffic-sign vegetation "
              "terrain sky person rider car truck bus caravan trailer train motorcycle "
              "bicycle").split()
BENCHMARK = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def look_at_cityscapes(folder, number):
    """Cityscapes as it is unpacked (https://www.cityscapes-dataset.com); its test part has no
    truth."""
    ids, notes = BENCHMARK if number == "19" else range(4, 34), []
    codes = dict.fromkeys(range(256), VOID) | {each: label for label, each in enumerate(ids)}
    splits = {}
    for split, name in (("train", "train"), ("valid", "val")):
        photos, masks = (folder / part / name for part in ("leftImg8bit", "gtFine"))
        pairs = match(photos, masks, notes, "_leftImg8bit", ("_gtFine_labelIds",))
        splits[split] = [Sample(*pair, codes) for pair in pairs]
    return Source(folder, "Cityscapes", [CITYSCAPES[each - 4] for each in ids], splits, {}, notes)


def find_pictures(paths):
    """All pictures among files and folders, sorted within each; a folder's are those whose name
    ends like that of one of FORMATS, a file named is taken as it is. Links to folders are not
    followed, so no loop of them is."""
    kinds = Image.registered_extensions()
    endings, found = {ending for ending, kind in kinds.items() if kind in FORMATS}, []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*")
                            if p.suffix.lower() in endings and p.is_file() and p.name[0] != ".")
            if not inside:
                raise Problem(f"there are no pictures in the folder {path}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise Problem(f"there is no file or folder {path}")
    return found


def match(photos, masks, notes, photo_end="", mask_ends=("", "_mask", "_label", "_gt")):
    """(name, photo, mask) for all photos that have a mask of the same name, ending aside; adds to
    `notes` what is left out."""
    def by_name(folder):
        if not folder.is_dir():
            raise Problem(f"there is no folder {folder}; photos and masks lie beside each other")
        found = {}
        for path in find_pictures([folder]):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if found.setdefault(name, path) != path:
                notes.append(f"{path} is left out, as it has the name of {found[name]}")
        return found

    pairs, of, lonely = [], by_name(masks), []
    for name, photo in by_name(photos).items():
        name = name.removesuffix(photo_end)
        mask = next((of.pop(name + end) for end in mask_ends if name + end in of), None)
        if mask:
            pairs.append((name, photo, mask))
        else:
            lonely.append(photo)
    spare = [path for name, path in of.items() if name.endswith(mask_ends)]
    for what, paths, other in (("pictures", lonely, masks), ("masks", spare, photos)):
        if paths:
            notes.append(f"{len(paths)} {what} have no partner in {other} and are left out; the "
                         f"first: {', '.join(map(str, paths[:5]))}")
    if not pairs:
        raise Problem(f"no picture in {photos} has a mask in {masks}; expected the same name, or "
                      f"with one of {', '.join(filter(None, mask_ends))} after it")
    return pairs


def draw_lots(names, folder):
    """Which of the names are to choose by and to test with, a tenth each, by lot: always the same
    of the same names."""
    if len(names) < 3:
        raise Problem(f"{folder} has {len(names)} labelled pictures; at least 3 are needed, to "
                      "train with, to choose the best epoch by, and to test with")
    tenth = max(1, len(names) // 10)
    lots = [names[i] for i in torch.randperm(len(names), generator=generator("split"))]
    return {"valid": sorted(lots[:tenth]), "test": sorted(lots[tenth:2 * tenth])}


def fingerprint(paths, *more):
    """A short text that changes with the files' sizes and times, what `allow` has set, and what
    else is given."""
    stats = [os.stat(path) if path.exists() else None for path in paths]
    facts = [[(s.st_size, s.st_mtime_ns) if s else 0 for s in stats], Image.MAX_IMAGE_PIXELS, *more]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def numbers_in(masks, cache, report):
    """Every number, or colour, that stands in one of the masks, in order; looked up once."""
    place = Path(cache) / f"numbers-{fingerprint(masks, [str(mask) for mask in masks])}.json"
    if not place.is_file():
        found = set()
        for numbers in ahead(lambda mask: np.unique(mask_numbers(mask))[:10**4], masks, report):
            if isinstance(numbers, Problem) and not isinstance(numbers, Unreadable):
                raise numbers
            found.update(() if isinstance(numbers, Problem) else numbers.tolist())
        write_json(place, sorted(found))
    return json.loads(place.read_text())


# a line of classes.txt: a name and, where masks hold colours, its colour
LINE = re.compile(r"(?P<name>.+?)([\s,]+(?P<red>\d+)[\s,]+(?P<green>\d+)[\s,]+(?P<blue>\d+))?")


def meaning(folder, numbers, listed, notes):
    """What the numbers found in masks stand for: {number: label}, and the names of the classes.
    `listed` are the lines of classes.txt, a name each, or a name and a colour as in car 64 0 128;
    a last line "void" stands for what does not count."""
    if len(numbers) < 2:
        raise Problem(f"all masks of {folder} hold {shown(numbers) or 'nothing'}; there is nothing "
                      "to tell apart")
    coloured = numbers[0] >= COLOUR
    if not coloured and numbers[-1] >= COLOUR:
        raise Problem(f"some masks of {folder} hold numbers, others colours; make them all alike")
    if len(numbers) > 100 and not listed:
        raise Problem(f"the masks of {folder} hold {len(numbers):,} numbers or colours: so do "
                      "photos, and masks kept as JPEG; are images and masks swapped?")
    void, named = {255: VOID}, [LINE.fullmatch(line.strip()) for line in listed]
    listed = [line["name"] for line in named]
    if len(set(listed)) < len(listed):
        raise Problem(f"{folder / 'classes.txt'} has a name twice; each class has one of its own")
    if coloured and listed:
        if lacking := [line["name"] for line in named if not line["red"]]:
            raise Problem(f"the masks of {folder} hold colours, and classes.txt has none for "
                          f"{', '.join(lacking[:5])}; a line is a name and its colour, as in: "
                          "car 64 0 128")
        keys = [COLOUR + int(np.array(line.group("red", "green", "blue"), int)
                             @ (1 << 16, 1 << 8, 1)) for line in named]
        names = listed
    elif coloured:
        keys, names = numbers, [shown([number]) for number in numbers]
    elif set(numbers) <= {0, 255} and (not listed or listed[-1].lower() != "void"):
        keys, names, void = [0, 255], listed or ["background", "foreground"], {}
        notes.append("masks hold 0 and 255 alone: 255 is taken as class 1")
    elif listed:
        keys, names = [*range(len(listed))], listed
    else:
        keys = [number for number in numbers if number != 255]
        names = ["background", "foreground"] if keys == [0, 1] else [f"class {n}" for n in keys]
    if names[-1].lower() == "void":
        void, keys, names = void | {keys[len(names) - 1]: VOID}, keys[:len(names) - 1], names[:-1]
    if unknown := set(numbers) - set(keys) - set(void):
        raise Problem(f"masks of {folder} hold {shown(sorted(unknown))}, which its classes.txt "
                      f"does not name; it names {shown(keys)}")
    if not 2 <= len(names) <= 100:
        raise Problem(f"{folder} has {len(names)} classes; 2 to 100 can be learned")
    if 255 in numbers and void.get(255) == VOID:
        notes.append("255 in masks is taken as void: neither learned nor scored")
    return void | {key: label for label, key in enumerate(keys)}, names


def look(folder, cache, report, classes="pet", cityscapes="19", drawn=None):
    """Understands a folder by what lies in it. `classes` is for the pets, "pet" or "species";
    `cityscapes` 19 or 30 classes; `drawn` what another Source of this folder said."""
    folder = Path(folder)
    if not folder.is_dir():
        raise Problem(f"there is no folder {folder}; name one with --data")
    if (folder / "annotations").is_dir():
        return look_at_pets(folder, classes)
    if classes != "pet":
        raise Problem(f"--classes {classes} is for the pets' layout, which {folder} has not; its "
                      "classes are those of its masks")
    if (folder / "leftImg8bit").is_dir():
        return look_at_cityscapes(folder, cityscapes)
    parts = {"train": ["train"], "valid": ["val", "valid"], "test": ["test"]}
    parts = {split: folder / name for split, names in parts.items() for name in names
             if (folder / name / "images").is_dir()}
    if "train" in parts and "valid" not in parts:
        raise Problem(f"{folder} has a train/, but no val/ to choose the best epoch by; make one, "
                      "or put all into images/ and masks/ without train/")
    if "train" not in parts and not (folder / "images").is_dir():
        raise Problem(f"{folder} is not understood; expected images/ and masks/, or train/ and val/"
                      " with images/ and masks/ in each, or the pets' images/ and annotations/, or "
                      "Cityscapes' leftImg8bit/ and gtFine/")
    notes = []
    if "train" in parts:
        layout = ", ".join(f"{path.name}/" for path in parts.values()) + " with images/ and masks/"
        found = {split: match(path / "images", path / "masks", notes)
                 for split, path in parts.items()}
        drawn = {}
    else:
        layout, pairs = "images/ and masks/", match(folder / "images", folder / "masks", notes)
        drawn = drawn or draw_lots([name for name, *_ in pairs], folder)
        of = {name: split for split, names in drawn.items() for name in names}
        found = {split: [pair for pair in pairs if of.get(pair[0], "train") == split]
                 for split in ("train", "valid", "test")}
        found = {split: pairs for split, pairs in found.items() if pairs}  # files may have gone
    masks = [mask for pairs in found.values() for *_, mask in pairs]
    listed = folder / "classes.txt"
    text = listed.read_bytes() if listed.is_file() else b""
    utf16 = text.startswith((b"\xff\xfe", b"\xfe\xff"))  # as Windows may write it
    lines = text.decode("utf-16" if utf16 else "utf-8-sig", "replace").splitlines()
    codes, classes = meaning(folder, numbers_in(masks, cache, report),
                             [line for line in lines if line.strip()], notes)
    return Source(folder, layout, classes, {
        split: [Sample(*pair, codes) for pair in pairs] for split, pairs in found.items()},
        drawn, notes)


def samples(source, split):
    """The samples of a split, where there is such a split."""
    if split not in source.splits:
        raise Problem(f"{source.folder} has no {split} split"
                      + "; eval can take --split valid" * (split == "test"))
    return source.splits[split]


def unique_names(paths):
    """A name for the outputs of each picture: its own, on one line and cut to 200 bytes, which
    leaves room for an ending; with a number where it comes again."""
    taken, names = set(), []
    for path in paths:
        stem = printable(path.stem).encode()[:200].decode(errors="ignore")
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def find_truth(image):
    """The trimap of a photo that lies in a pets' folder, or None."""
    path = Path(image).absolute().parent.parent / "annotations" / "trimaps" / f"{image.stem}.png"
    return path if os.path.isfile(path) else None  # Path.is_file raises where a name is too long


def check(source, progress):
    """Reads every picture of every split; returns {split: (number, [what is wrong, ...], how many
    pixels of 32×32 a picture have each label, the border counted as what it is the border of)}.
    `progress(what)` gives the function that is told of each step, here and in `get_pets`."""
    result = {}
    for split, samples in source.splits.items():
        pairs = ahead(lambda each: read_pair(each, (32, 32)), samples, progress(f"check {split}"))
        faults, counts = [], np.zeros(256, np.int64)
        for pair in pairs:
            if isinstance(pair, Problem):
                faults.append(str(pair))
            else:
                counts += np.bincount(targets(torch.tensor(pair[1])).flatten(), minlength=256)
        result[split] = len(samples), faults, counts
    return result


# ---------------------------------------------------------------------------------- the download

ARCHIVES = {
    "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
}
MOST_BYTES, MOST_MEMBERS = 4 * 10**9, 10**5  # of an archive or all in it; the pets: 0.8e9, 7,390
SLOWEST = 1000  # bytes a second, below which a download counts as broken
NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError,
           SSLError)


class DownloadFailed(Problem):
    """The network or the server is at fault; "auto" then takes the toy pets instead."""


class OtherScheme(urllib.request.UnknownHandler):
    """Refuses what is neither http nor https, such as a server's redirection to a file."""

    def unknown_open(self, request):
        raise ValueError(f"only http and https are taken, not {request.type}")


BROWSER = urllib.request.OpenerDirector()  # urllib's own would open ftp: and file: too
for handler in (OtherScheme, urllib.request.ProxyHandler, urllib.request.HTTPHandler,
                urllib.request.HTTPSHandler, urllib.request.HTTPRedirectHandler,
                urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor):
    BROWSER.add_handler(handler())


def get_pets(root, url, progress, archives=ARCHIVES, pauses=(1, 2, 4, 8, 16), patience=60):
    """Downloads and unpacks what of the pets is not there yet; returns their folder."""
    folder = Path(root) / PETS
    for archive, md5 in archives.items():
        if not (folder / archive.split(".")[0]).is_dir():
            path = folder / archive
            report = progress(f"download {archive}", "MB", 1e6)
            fetch(url.rstrip("/") + "/" + archive, path, md5, report, pauses, patience)
            unpack(path, folder)
            path.unlink()
    return folder


def fetch(url, path, md5, report, pauses, patience):
    """Downloads to `path`.part, goes on where a break left it, checks the sum, then renames. It
    gives up after as many breaks as there are `pauses` without as much as a slow line brings."""
    part, failures = path.with_name(path.name + ".part"), 0
    part.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        have = part.stat().st_size if part.exists() else 0
        try:
            append(url, part, have, report, patience)
        except ValueError as error:
            raise Problem(f"{url} cannot be used: {error}") from error
        except NETWORK as error:
            gained = part.stat().st_size - have if part.exists() else 0
            failures = 1 if gained > SLOWEST * patience else failures + 1
            code = getattr(error, "code", None)  # a server's answer; without one, did any come?
            final = code < 500 and code not in (408, 429) if code else not part.exists()
            if final or failures > len(pauses):
                raise DownloadFailed(f"cannot download {url}: {error}; check the network, or name "
                                     "a mirror with --url") from error
            time.sleep(pauses[failures - 1])
            continue
        found = hashlib.md5(usedforsecurity=False)
        with open(part, "rb") as file:
            while chunk := file.read(1 << 20):
                found.update(chunk)
        if found.hexdigest() != md5:
            part.unlink()
            raise DownloadFailed(f"{url} arrived with a wrong checksum and was deleted; try again, "
                                 "or another mirror with --url")
        os.replace(part, path)


def append(url, part, have, report, patience):
    """One request: appends to `part`, `have` bytes long, what it lacks. A break is one of
    NETWORK, and so are `patience` seconds that bring next to nothing."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = BROWSER.open(request, timeout=min(30, patience))
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send
            return
        raise
    with response, open(part, "ab") as file:
        if response.status != 206:  # the server does not know ranges: from the start
            have = 0
            file.truncate(0)
        total = have + response.length if response.length else 0  # not every server says it
        since, then = have, time.monotonic()
        while chunk := response.read1(1 << 18):  # what has come, without waiting for more
            file.write(chunk)
            have += len(chunk)
            report(have, total or MOST_BYTES)
            if max(have, total) > MOST_BYTES:
                raise DownloadFailed(f"{url} has more than {MOST_BYTES / 1e9:g} GB and cannot be "
                                     "the pets; name another mirror with --url")
            if time.monotonic() - then > patience:
                if have - since < SLOWEST * patience:
                    raise TimeoutError(f"fewer than {SLOWEST} bytes a second came")
                since, then = have, time.monotonic()
    if have < total:
        raise ConnectionError(f"the connection broke after {have} of {total} bytes")


def unpack(archive, folder):
    """Unpacks ARCHIVE.tar.gz, whose members all lie in ARCHIVE/, to folder/ARCHIVE, which appears
    when it is whole. Only plain files and folders inside ARCHIVE/ are accepted, each once."""
    name, total = archive.name.split(".")[0], 0
    try:
        with whole(folder / name) as new, tarfile.open(archive) as tar:
            for count, member in enumerate(tar):
                parts = Path(member.name).parts
                plain = member.isfile() or member.isdir()
                if parts[:1] != (name,) or ".." in parts or not plain:
                    raise Problem(f"{archive} is refused: its member {member.name!r} would not be "
                                  f"a plain file in {name}/; get it from another place")
                total += member.size
                if total > MOST_BYTES or member.size < 0 or count >= MOST_MEMBERS:
                    raise Problem(f"{archive} is refused: it unpacks to more than "
                                  f"{MOST_BYTES / 1e9:g} GB or {MOST_MEMBERS:,} files, or lies "
                                  f"about {member.name!r}; get it from another place")
                target = new.joinpath(*parts[1:])
                (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
                if member.isfile():
                    with tar.extractfile(member) as source, open(target, "xb") as file:
                        shutil.copyfileobj(source, file)
            tar.fileobj.seek(tar.offset)  # where a size was a lie, something else stands here
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("it does not end where its members do")
    except (tarfile.TarError, zlib.error, EOFError, ValueError, FileExistsError,
            NotADirectoryError) as error:
        raise Problem(f"{archive} cannot be unpacked: {error}; delete it, try again") from error


# ---------------------------------------------------------------------------------- the toy pets
# Cats and dogs drawn from a seed, to try everything without a download. A figure is a table of
# (x, y, half width, half height, tilt, shade) in pet lengths, y downwards: ellipses, later ones
# in front; a tilt is in radians. A pose is where the head is, how large it is, and the rest.

COATS = {"Tabby": "stripes", "Calico": "patches", "Smoke": "plain",     # cats in capitals,
         "pointer": "spots", "collie": "patches", "terrier": "plain"}   # as in the pets' dataset
POSES = (
    ((0.55, -0.32, 0.22), (  # standing: tail, far legs, trunk, near legs, neck
        (-0.72, -0.25, 0.32, 0.04, 0.8, 110), (-0.4, 0.33, 0.06, 0.28, 0.1, 90),
        (0.28, 0.33, 0.06, 0.28, -0.1, 90), (0, 0, 0.55, 0.23, 0, 125),
        (-0.28, 0.35, 0.07, 0.28, 0, 120), (0.4, 0.35, 0.07, 0.28, 0, 120),
        (0.42, -0.1, 0.14, 0.26, 0.6, 128))),
    ((0.08, -0.5, 0.27), (  # sitting: tail, trunk, haunch, front legs
        (-0.45, 0.3, 0.36, 0.04, 0.5, 110), (0, 0.12, 0.3, 0.5, 0, 122),
        (-0.15, 0.38, 0.26, 0.22, 0, 114), (0.03, 0.34, 0.07, 0.32, 0, 130),
        (0.2, 0.34, 0.07, 0.32, 0, 138))),
    ((0.55, -0.05, 0.24), (  # lying: tail, trunk, front leg
        (-0.75, 0.05, 0.35, 0.04, 0.3, 110), (0, 0.08, 0.6, 0.24, 0, 124),
        (0.5, 0.27, 0.3, 0.06, 0, 132))),
    ((0, -0.1, 0.46), ((0, 0.75, 0.55, 0.6, 0, 115),)),  # from close by
)
COLOURS = np.array([
    (30, 27, 25), (240, 234, 224), (130, 127, 124), (205, 128, 55), (98, 64, 40), (226, 200, 160),
    (160, 112, 74), (72, 76, 86), (96, 128, 70), (76, 112, 150), (150, 76, 76), (190, 178, 120),
])  # a coat is of the first eight; the world around it is of all, so colour alone tells little


def blob(x, y, rx, ry, tilt=0.0, corners=28):
    """An ellipse, or with few corners a triangle or box that points upwards, as a polygon."""
    angle = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    across, down = rx * np.sin(angle), -ry * np.cos(angle)
    cos, sin = math.cos(tilt), math.sin(tilt)
    return np.stack((x + cos * across - sin * down, y + sin * across + cos * down), axis=1)


def draw_figure(rng, cat):
    """A pet in some pose, slightly varied: its (polygon, shade) parts, and its eyes and nose."""
    (x, y, r), rows = POSES[rng.integers(len(POSES))]
    parts = []
    for cx, cy, rx, ry, tilt, shade in rows:
        rx, ry = np.array((rx, ry)) * rng.uniform(0.85, 1.2, 2)
        parts.append((blob(cx, cy, rx, ry, tilt + rng.normal(0, 0.12)), shade))
    x, y, r = x + rng.normal(0, 0.03), y + rng.normal(0, 0.05), r * rng.uniform(0.88, 1.12)
    pointed = cat or rng.random() < 0.4
    for side in (-1, 1):
        ear = (side * 0.55, -0.85, 0.45, 0.6, side * 0.4, 3) if pointed else (
            side * 0.95, 0.1, 0.3, 0.75, side * -0.3)
        parts.append((r * blob(*ear) + (x, y), 100))
    parts.append((blob(x, y, r, r * 0.9), 135))
    x += rng.uniform(-0.25, 0.25) * r  # the face looks to one side
    parts.append((blob(x, y + r * 0.4, r * (0.4 if cat else 0.55), r * 0.4), 152))
    eyes = [blob(x + side * r * 0.4, y - r * 0.1, r * 0.11, r * 0.14) for side in (-1, 1)]
    return parts, [*eyes, blob(x, y + r * 0.25, r * 0.13, r * 0.09)]


def noise(rng, size, across, down):
    """Smooth noise in 0..1 whose bumps are about `across` × `down` pixels large."""
    coarse = rng.random((max(2, round(size[0] / down)), max(2, round(size[1] / across))))
    return resized(coarse.astype(np.float32), size, "BICUBIC")[..., None].clip(0, 1)


def paint(rng, size, colours, bumps):
    """A surface between two of `colours`, mottled by noise of the size `bumps`."""
    one, two = colours[rng.integers(len(colours), size=2)] + rng.normal(0, 10, (2, 3))
    mixed = noise(rng, size, *bumps)
    return one.astype(np.float32) + (two - one).astype(np.float32) * mixed


def stencil(size, shapes):
    """Draws (polygon, value) shapes at double size and halves it: a float array, smooth edges."""
    image = Image.new("L", (2 * size[1], 2 * size[0]))
    draw = ImageDraw.Draw(image)
    for polygon, value in shapes:
        draw.polygon((2 * polygon).ravel().tolist(), fill=int(value))
    return np.asarray(image.reduce(2), dtype=np.float32)[..., None]


def draw_things(rng, photo, number, sizes):
    """Paints `number` cushions, boxes and planks over the photo; returns where, in 0..1."""
    size, covered = photo.shape[:2], np.zeros_like(photo[..., :1])
    for _ in range(number):
        x, y = rng.uniform(0, size[1]), rng.uniform(0, size[0])
        rx, ry = rng.uniform(*sizes, 2) * min(size)
        shape = blob(x, y, rx, ry, rng.uniform(0, 3), rng.choice([4, 28]))
        alpha = stencil(size, [(shape, 255)]) / 255
        photo += (paint(rng, size, COLOURS, rng.choice([3, 8, 25], size=2)) - photo) * alpha
        covered = np.maximum(covered, alpha)
    return covered


def draw_toy(rng, breed):
    """One toy pet: its photo (an RGB image) and its trimap (1 pet, 2 background, 3 border)."""
    width, height = rng.integers(150, 231, 2).tolist()
    size = height, width
    photo = paint(rng, size, COLOURS, rng.choice([4, 15, 60], size=2))
    draw_things(rng, photo, rng.integers(3, 8), (0.05, 0.3))

    parts, face = draw_figure(rng, cat=breed[0].isupper())
    scale, turn = min(size) * rng.uniform(0.42, 0.72), rng.normal(0, 0.2)
    facing = np.array([[rng.choice([-1, 1]), 0], [0, 1]])
    place = facing @ (scale * np.array([[math.cos(turn), math.sin(turn)],
                                        [-math.sin(turn), math.cos(turn)]]))
    centre = np.array([width, height]) * rng.uniform(0.38, 0.62, 2)
    parts = [(part @ place + centre, shade) for part, shade in parts]
    alpha = stencil(size, [(part, 255) for part, _ in parts]) / 255

    coat = paint(rng, size, COLOURS[:8], (30, 30))
    bumps = {"stripes": (7, 60), "spots": (11, 11), "patches": (45, 45)}.get(COATS[breed])
    if bumps:
        marks = paint(rng, size, COLOURS[:8], (30, 30))
        coat += (marks - coat) * (noise(rng, size, *bumps) > 0.55)
    hair = noise(rng, size, 2, 7) + noise(rng, size, 2, 4) - 1
    coat = coat * (0.55 + stencil(size, parts) / 280) + 38 * hair
    photo += (coat - photo) * alpha
    features = [(part @ place + centre, 255) for part in face]
    photo += (np.array([18, 14, 12]) - photo) * stencil(size, features) / 255

    hidden = draw_things(rng, photo, rng.integers(0, 3), (0.04, 0.14))
    photo *= 0.75 + 0.5 * noise(rng, size, width, height)  # uneven light
    photo += 5 * rng.standard_normal(photo.shape, dtype=np.float32)
    pet = picture((255 * alpha * (1 - hidden))[..., 0] >= 128)
    near = np.asarray(pet.filter(ImageFilter.BoxBlur(2)))
    trimap = np.where(near > 240, 1, np.where(near < 15, 2, 3)).astype(np.uint8)
    return Image.fromarray(photo.clip(0, 255).astype(np.uint8)), Image.fromarray(trimap)


def make_toys(root, report, seed=0, trainval=400, test=100):
    """Draws the toy pets in exactly the pets' layout; returns their folder."""
    folder = Path(root) / TOYS
    with whole(folder) as new:
        images, annotations = new / "images", new / "annotations"
        images.mkdir(parents=True)
        (annotations / "trimaps").mkdir(parents=True)

        def draw(i):
            breed = list(COATS)[i % len(COATS)]
            name = f"{breed}_{i // len(COATS) + 1}"
            image, trimap = draw_toy(np.random.default_rng((seed, i)), breed)
            image.save(images / f"{name}.jpg", quality=90)
            trimap.save(annotations / "trimaps" / f"{name}.png")
            return f"{name} {i % len(COATS) + 1} {1 if breed[0].isupper() else 2} 1\n"

        lines = list(ahead(draw, range(trainval + test), report))
        head = "# name class species(1 cat, 2 dog) breed\n"
        (annotations / "trainval.txt").write_text(head + "".join(lines[:trainval]))
        (annotations / "test.txt").write_text(head + "".join(lines[trainval:]))
    return folder


# ------------------------------------------------------------------------------------- the cache


class Split(NamedTuple):
    """A decoded split, memory-mapped: nothing is read from disk before it is asked for."""
    names: list
    images: np.ndarray   # (N, H, W, 3) bytes
    labels: np.ndarray   # (N, H, W) bytes
    skipped: list        # what could not be read and is left out, a line each


def open_split(source, split, size, cache, report):
    """A split of a source at `size`, from `cache`, where its first use writes it.

    The cache's name holds names, sizes and times of all files, what their numbers stand for, and
    what `allow` has set: when any of it changes there is a new one.
    """
    found = samples(source, split)
    key = fingerprint([path for sample in found for path in (sample.image, sample.mask)],
                      [(sample.name, [*sample.codes.items()]) for sample in found])
    place = Path(cache) / f"{source.folder.resolve().name}-{split}-{size[0]}x{size[1]}-{key}"
    if not place.is_dir():
        try:
            build_cache(place, found, size, report)
        except OSError:
            if not place.is_dir():  # else another run has written the same cache in the meantime
                raise
    about = json.loads((place / "about.json").read_text())
    shape = len(about["names"]), *size
    return Split(about["names"], np.memmap(place / "images", np.uint8, "r", 0, (*shape, 3)),
                 np.memmap(place / "labels", np.uint8, "r", 0, shape), about["skipped"])


def build_cache(place, samples, size, report):
    """Decodes every sample once into the files images and labels, byte after byte, in the folder
    `place`."""
    names, skipped = [], []
    pairs = ahead(lambda sample: read_pair(sample, size), samples, report)
    with whole(place) as new:
        need, free = 4 * size[0] * size[1] * len(samples), shutil.disk_usage(new.parent).free
        if need > free:
            raise Problem(f"the cache {place} needs {need / 1e6:,.0f} MB, the disk has "
                          f"{free / 1e6:,.0f} MB; make room, or name another disk with --root")
        new.mkdir()
        with open(new / "images", "wb") as images, open(new / "labels", "wb") as labels:
            for sample, pair in zip(samples, pairs):
                if isinstance(pair, Unreadable):
                    skipped.append(str(pair))
                elif isinstance(pair, Problem):
                    raise pair
                else:
                    images.write(pair[0].tobytes())
                    labels.write(pair[1].tobytes())
                    names.append(sample.name)
        if not names:
            raise Problem(f"none of {len(samples)} pictures can be read; the first: {skipped[0]}")
        (new / "about.json").write_text(json.dumps({"names": names, "skipped": skipped}))


# ---------------------------------------------------------------------- batches and augmentation

MEAN, STD = (0.48, 0.45, 0.40), (0.27, 0.27, 0.28)  # of the pets' train part, in 0..1


def onto(split, device):
    """The split in a GPU's own memory, as bytes, where it takes no more than half of what is free:
    a step then asks nothing of the host."""
    size = split.images.nbytes + split.labels.nbytes
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 2:
        return split
    images, labels = (torch.from_numpy(np.array(part)).to(device) for part in split[1:3])
    return split._replace(images=images, labels=labels)


def send(tensor, device):
    """The tensor on a device, without waiting for what a GPU is still at work on."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def floats(images):
    """Bytes (B, H, W, 3) to (B, 3, H, W) in 0..1, seen so without being moved: channels-last."""
    return images.permute(0, 3, 1, 2).float() / 255


def load(split, index, device=torch.device("cpu")):
    """The pictures `index` of a split: images (B, 3, H, W) in 0..1 and labels (B, H, W) in bytes.

    No worker processes: taking a batch from the memory map costs 0.5 ms, a training step 148
    (UNet of width 16, 8 images of 128×128, two cores).
    """
    # an array lies here, a tensor on the GPU, see `onto`
    index = send(index, device) if torch.is_tensor(split.images) else np.asarray(index)
    images, labels = (send(torch.as_tensor(part[index]), device) for part in split[1:3])
    return floats(images), labels


def normalise(images, mean=MEAN, std=STD):
    """Shifts and scales each colour to about zero mean and unit variance."""
    mean, std = (send(torch.tensor(v).view(1, 3, 1, 1), images.device) for v in (mean, std))
    return (images - mean) / std


def shuffled(number, repeat, seed, epoch):
    """The order of an epoch: each of `number` pictures `repeat` times, shuffled."""
    return torch.randperm(number * repeat, generator=generator("shuffle", seed, epoch)) % number


def boxes(images, probability, random):
    """Where a picture shows the next one, with the probability of each: in a box of 0.2 to 0.9 of
    each side, about any place of it (B, 1, H, W)."""
    number, _, height, width = images.shape
    inside = (torch.rand(number, generator=random) < probability).view(-1, 1, 1, 1)
    for side, shape in ((height, (number, 1, -1, 1)), (width, (number, 1, 1, -1))):
        places = (torch.arange(side) + 0.5) / side
        centre, reach = torch.rand(2, number, 1, generator=random)
        inside = inside & ((places - centre).abs() < 0.1 + 0.35 * reach).view(shape)
    return inside


def augment(images, labels, random, size=None, share=1.0, flip=0.0, vflip=0.0, rotate=0.0, zoom=1.0,
            aspect=1.0, shift=0.0, brightness=0.0, contrast=0.0, saturation=0.0, mix=0.0):
    """Changes a `share` of a batch at random: flip and vflip are probabilities, rotate is in
    degrees, zoom and aspect are factors either way (enlarged, it is a random crop), shift is a part
    of the side, the colours' strengths run from 0 to 1 (saturation 1 reaches down to grey), mix is
    the probability that a box shows the next picture (https://arxiv.org/abs/1905.04899).

    Image and labels go through one warp to `size`, a single sampling at the end of all movements.
    """
    number, _, height, width = images.shape
    touched = (torch.rand(number, generator=random) < share).float()

    def draw(strength):
        return (2 * torch.rand(number, generator=random) - 1) * strength * touched

    def mirror(probability):
        return 1 - 2 * (torch.rand(number, generator=random) < probability).float() * touched

    # the warp: for each pixel of the result, where to look in the picture, in -1..1 (B, 2, 3)
    angle, scale = draw(math.radians(rotate)), torch.exp(draw(math.log(zoom)))
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    stretch = torch.exp(draw(math.log(aspect)))
    across, down = mirror(flip), mirror(vflip)
    warp = torch.stack((
        stretch * cos * across, -stretch * sin * height / width * down, draw(2 * shift),
        sin / stretch * width / height * across, cos / stretch * down, draw(2 * shift)),
        dim=1).view(-1, 2, 3)
    grid = F.affine_grid(send(warp, images.device), (number, 3, *(size or (height, width))),
                         align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    labels = F.grid_sample(labels.unsqueeze(1).float(), grid, "nearest", "reflection",
                           align_corners=False)

    light, spread, colour = (send(1 + draw(strength).view(-1, 1, 1, 1), images.device)
                             for strength in (brightness, contrast, saturation))
    grey = send(torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1), images.device)
    images = images * light
    average = images.mean(dim=(1, 2, 3), keepdim=True)
    images = average + (images - average) * spread
    grey = (images * grey).sum(dim=1, keepdim=True)
    images = (grey + (images - grey) * colour).clamp(0, 1)

    if mix:
        inside = send(boxes(images, mix * touched, random), images.device)
        images = torch.where(inside, images.roll(1, dims=0), images)
        labels = torch.where(inside, labels.roll(1, dims=0), labels)
    return images, labels.squeeze(1).to(torch.uint8)


def targets(labels, border="foreground", random=None, classes=2):
    """Labels to what is learned: the number of a class, 255 not counted. A border is taken as what
    it is the border of ("foreground"), as "background", "ignore", as a "class" of its own, the last
    of `classes`, or each connected region as one of the first two with probability ½ ("random")."""
    edge = (labels >= EDGE) & (labels != VOID)
    inner = torch.where(edge, labels - EDGE, labels)
    if border == "foreground":
        return inner
    if border != "random":
        return torch.where(edge, {"background": 0, "ignore": VOID, "class": classes - 1}[border],
                           labels)
    root = torch.arange(labels.numel() + 1, device=labels.device)
    numbers = root[1:].view_as(labels)               # (B, H, W): at first each is its own region
    first, numbers = numbers[:, :1, :1].clone(), numbers * edge
    while True:
        # among 8 neighbours; less its picture's first, for floats count no further than to 2**24
        largest = (F.max_pool2d((numbers - first).float(), 3, 1, 1).long() + first) * edge
        if torch.equal(largest, numbers):
            break
        root.scatter_reduce_(0, numbers.flatten(), largest.flatten(), "amax")  # regions that touch
        root = root[root]  # follow the chains that this makes; some five rounds join everything
        numbers = root[root][numbers]
    drawn = torch.randint(2, root.shape, generator=random).to(labels.device, torch.uint8)
    return torch.where(edge, drawn[numbers] * inner, labels)


# ----------------------------------------------------------------------------- pictures: results

# the colours of classes 1, 2, …: those of Okabe and Ito, which colour-blind eyes tell apart, then
# the same lighter and darker; 0, the background, is black, and left as it is in overlays
HUES = np.array([(213, 94, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
                 (204, 121, 167), (230, 159, 0), (150, 150, 150)])
COLOURS_OF_CLASSES = [(0, 0, 0), *map(tuple, np.concatenate(
    [HUES, 255 - (255 - HUES) * 0.45, HUES * 0.55] * 5)[:100].astype(int).tolist())]


def png(image):
    """Yields the parts of a PNG file (https://www.w3.org/TR/png-3/) of a picture in grey, RGB, RGBA
    or a palette.

    Each row is stored as its difference from the row above, and packed by run lengths: an overlay
    of 500×375 in 4.4 ms where Pillow, which tries five kinds of difference, takes 10.8 at its
    fastest, for as many bytes.
    """
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    colour, above = {"L": 0, "RGB": 2, "P": 3, "RGBA": 6}[image.mode], 0
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
    yield b"\x89PNG\r\n\x1a\n"
    yield chunk(b"IHDR", struct.pack(">IIBBBBB", *image.size, 8, colour, 0, 0, 0))
    if image.mode == "P":
        yield chunk(b"PLTE", bytes(image.getpalette()))
    for rows in bands(image.size[::-1]):
        pixels = np.asarray(image.crop((0, rows.start, image.width, rows.stop)))
        pixels = pixels.reshape(len(pixels), -1)
        content = np.empty((len(pixels), 1 + pixels.shape[1]), dtype=np.uint8)
        content[:, 0], content[0, 1:] = 2, pixels[0] - above  # 2 means: the difference from above
        np.subtract(pixels[1:], pixels[:-1], out=content[1:, 1:])  # of bytes: modulo 256
        above = pixels[-1]
        yield chunk(b"IDAT", packer.compress(content))
    yield chunk(b"IDAT", packer.flush())
    yield chunk(b"IEND", b"")


def save_picture(image, path):
    """Writes a picture whole or not at all, in the format of its name's ending, else as PNG."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    with whole(path) as new:
        if kind in Image.SAVE and kind != "PNG":
            image.save(new, kind)
        else:
            with open(new, "wb") as file:
                file.writelines(png(image))


def mask_picture(mask, classes):
    """A mask of class numbers as a picture: white on black, or in the palette of the classes."""
    if len(classes) == 2:
        return picture(mask > 0)
    image = Image.fromarray(mask, "L")
    image.putpalette(sum(COLOURS_OF_CLASSES[:len(classes)], ()))
    return image


def overlay(photo, mask):
    """The photo with each class tinted and its contour drawn, dark beside light on any ground."""
    result = photo.copy()
    for label in range(1, int(mask.max()) + 1):
        inside = picture(mask == label)
        if inside.getbbox():
            contour = inside.filter(ImageFilter.BoxBlur(max(1, max(photo.size) / 300))).point(
                [255 * (6 < value < 249) for value in range(256)])
            result.paste(COLOURS_OF_CLASSES[label], mask=inside.point(lambda value: value * 0.35))
            result.paste((20, 20, 20), mask=contour)
            result.paste("white", mask=ImageChops.darker(contour, inside))
    return result


def cutout(photo, mask):
    """What is no background alone; everything else is transparent, and gone."""
    alone = Image.new("RGBA", photo.size)
    alone.paste(photo, mask=picture(mask > 0))
    return alone


def panel(photo, truth, mask, caption, classes, side=256):
    """photo | truth (where known) | prediction in a row, each `side` high and no more than four
    times as wide, with names above and, of more than two classes, a legend below."""
    width = min(max(1, round(side * photo.width / photo.height)), 4 * side)
    photo = photo.resize((width, side), Image.Resampling.BICUBIC)
    tiles = [(caption, photo)] + [
        (name, overlay(photo, resized(each, (side, width), "NEAREST")))
        for name, each in (("truth", truth), ("prediction", mask)) if each is not None]
    row = Image.new("RGB", (len(tiles) * (width + 4) - 4, side + 24), "white")
    for i, (name, tile) in enumerate(tiles):
        row.paste(tile, (i * (width + 4), 24))
        ImageDraw.Draw(row).text((i * (width + 4), 4), name, "black", ImageFont.load_default(13))
    return row if len(classes) == 2 else with_legend(row, classes)


def with_legend(row, classes):
    """A picture with the colour and the name of each class, the background's aside, below it."""
    result = Image.new("RGB", (row.width, row.height + 18 * len(classes)), "white")
    result.paste(row)
    draw, font, x, y = ImageDraw.Draw(result), ImageFont.load_default(13), 0, row.height + 4
    for name, colour in zip(classes[1:], COLOURS_OF_CLASSES[1:]):
        wide = 28 + int(font.getlength(name))
        if x and x + wide > row.width:
            x, y = 0, y + 18
        draw.rectangle((x, y + 2, x + 12, y + 14), colour)
        draw.text((x + 17, y), name, "black", font)
        x += wide
    return result.crop((0, 0, row.width, y + 18))


RESULTS = {  # what `infer` can write, each from photo, mask, true mask or None, and the classes
    "mask": lambda photo, mask, truth, classes: mask_picture(mask, classes),
    "overlay": lambda photo, mask, truth, classes: overlay(photo, mask),
    "cutout": lambda photo, mask, truth, classes: cutout(photo, mask),
    "panel": lambda photo, mask, truth, classes: panel(photo, truth, mask, "photo", classes),
}


def is_result(path, out):
    """Whether a picture is one that `infer` has written to the folder `out`."""
    return out.resolve() in path.resolve().parents and path.stem.rpartition("_")[2] in RESULTS


def gallery(panels):
    """Panels two and two beside each other, on white."""
    wide, high = max(p.width for p in panels) + 12, max(p.height for p in panels) + 12
    sheet = Image.new("RGB", (2 * wide, math.ceil(len(panels) / 2) * high), "white")
    for i, p in enumerate(panels):
        sheet.paste(p, (i % 2 * wide + 6, i // 2 * high + 6))
    return sheet


# ------------------------------------------------------------------------------ pictures: curves

LINES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))


def ticks(low, high, most=6):
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low..high."""
    rough = max(high - low, 1e-9) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def draw_plot(draw, box, title, curves):
    """Title, legend, axes, grid and curves inside `box`. A curve is (label, colour, width, points,
    the number of the point that gets a mark or None)."""
    left, top, right, bottom = box
    small, large, grey = ImageFont.load_default(24), ImageFont.load_default(30), (60, 60, 60)
    draw.text(((left + right) / 2, top), title, "black", large, anchor="mt")
    x, y = left, top + 62
    for label, colour, width, *_ in curves:  # the legend is above the axes: nothing runs into it
        wide = 60 + draw.textlength(label, small)
        if x > left and x + wide > right:
            x, y = left, y + 36
        draw.line([(x, y), (x + 46, y)], colour, width)
        draw.text((x + 56, y), label, grey, small, anchor="lm")
        x += wide + 30
    top = y + 34

    xs, ys = zip(*(point for curve in curves for point in curve[3]))
    y_ticks, x_low, x_high = ticks(min(ys), max(ys)), min(xs) - 0.5, max(xs) + 0.5
    y_low, y_high = y_ticks[0], y_ticks[-1] + 1e-9

    def place(x, y):
        return (left + 12 + (right - left - 24) * (x - x_low) / (x_high - x_low),
                bottom - (bottom - top) * (y - y_low) / (y_high - y_low))

    for tick in y_ticks:
        at = place(x_low, tick)[1]
        draw.line([(left, at), (right, at)], (225, 225, 225), 2)
        draw.text((left - 12, at), f"{tick:g}", grey, small, anchor="rm")
    for tick in ticks(min(xs), max(xs), 8):
        if x_low <= tick <= x_high and tick == int(tick):
            at = place(tick, y_low)[0]
            draw.line([(at, top), (at, bottom + 8)], (225, 225, 225), 2)
            draw.text((at, bottom + 14), f"{tick:g}", grey, small, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], grey, 3)
    draw.text(((left + right) / 2, bottom + 50), "epoch", "black", small, anchor="mt")
    for _, colour, width, points, _ in curves:
        points = [place(*point) for point in points]
        draw.line(points, colour, width, "curve")
        draw.circle(points[-1], width, colour)  # all there is after one epoch
    for _, colour, _, points, mark in curves:
        if mark is not None:
            x, y = place(*points[mark])
            draw.line([(x, y), (x, bottom)], colour, 2)
            draw.circle((x, y), 9, "white", colour, 5)


def draw_curves(path, runs, score="dice"):
    """Loss and a score, "dice" or "iou", over the epochs; `runs` is {name: rows of metrics}; marks
    stand at the best epochs. One run alone has a colour for training and one for validation,
    several one each."""
    image = Image.new("RGB", (2400, 1080), "white")  # at twice the size, for smooth edges
    alone = len(runs) == 1
    for left, measure in ((110, "loss"), (1310, score)):
        title, curves = {"loss": "Loss", "dice": "Dice", "iou": "Mean IoU"}[measure], []
        for i, (name, rows) in enumerate(runs.items()):
            scores = [row[f"valid_{score}"] for row in rows]
            best = scores.index(max(scores))
            colours = LINES[:2] if alone else [LINES[i % len(LINES)]] * 2
            for part, colour, width, mark in zip(("train", "valid"), colours, (4, 7), (None, best)):
                points = [(row["epoch"], row[f"{part}_{measure}"]) for row in rows]
                curves.append((part if alone else f"{name} {part}", colour, width, points, mark))
        if alone and measure == score:
            title += f": best {scores[best]:.4f}, epoch {rows[best]['epoch']}"
        draw_plot(ImageDraw.Draw(image), (left, 30, left + 1040, 960), title, curves)
    save_picture(image.resize((1200, 540), Image.Resampling.LANCZOS), path)
