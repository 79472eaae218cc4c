"""data.py: files to tensors, and tensors to files.

Follow one photo to a tensor: `read_pair`, `open_split`, `get_batch`, `augment`, `labels_to_target`;
and a prediction to a file: `upsample_and_argmax`, `OUTPUTS`, `save_image`. Only this file knows
Pillow. A size is (height, width) everywhere. What a label is:

    value in the mask file   label in the cache (uint8)         target of the loss
    1 pet, 2 background      1 and 0; with species 1, 2 and 0   class index
    3 border                 128 + the class that it borders    as --border says
    255, void, ignore        255                                255: neither learned nor scored
    own data                 class index, see `read_mask`       class index
"""
import contextlib
import csv
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

MEAN, STD = (0.48, 0.45, 0.40), (0.27, 0.27, 0.28)  # of the pets' train images, in 0..1
BORDER_OFFSET, IGNORE_INDEX = 128, 255

# ---------------------------------------------------------------------------- the cache, and batches


class CachedSplit(NamedTuple):
    """A decoded split, memory-mapped: nothing is read from disk before it is used."""
    names: list
    images: np.ndarray   # (N, H, W, 3) uint8
    labels: np.ndarray   # (N, H, W) uint8
    skipped: list        # what could not be read and is left out, a line each


def open_split(dataset, split, size, cache):
    """A split of a dataset at `size`, from the folder `cache`, where the first use decodes it. The
    name there is a hash of sizes and times of all files and of what mask values mean: when any of
    it changes there is a new one."""
    if split not in dataset.splits:
        raise UserError(f"{dataset.folder} has no {split} split; eval can take --split val")
    samples = dataset.splits[split]
    stats = [os.stat(path) if path.exists() else None for s in samples for path in s[1:3]]
    facts = [[s and (s.st_size, s.st_mtime_ns) for s in stats], Image.MAX_IMAGE_PIXELS,
             [(s.name, s.classes and [*s.classes.items()]) for s in samples]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = Path(cache) / f"{dataset.folder.resolve().name}-{split}-{size[0]}x{size[1]}-{key}"
    if not path.is_dir():
        build_cache(path, samples, size, f"cache {split} at {size[0]}×{size[1]}")
    meta = json.loads((path / "meta.json").read_text())
    shape = len(meta["names"]), *size
    return CachedSplit(meta["names"], np.memmap(path / "images", np.uint8, "r", 0, (*shape, 3)),
                       np.memmap(path / "labels", np.uint8, "r", 0, shape), meta["skipped"])


def build_cache(path, samples, size, title):
    """Decodes every sample once, into the files `images` and `labels` of a folder."""
    names, skipped = [], []
    path.parent.mkdir(parents=True, exist_ok=True)
    need, free = 4 * size[0] * size[1] * len(samples), shutil.disk_usage(path.parent).free
    if need > free:
        raise UserError(f"the cache {path} needs {need / 1e6:,.0f} MB, the disk has "
                        f"{free / 1e6:,.0f} MB; make room, or name another disk with --root")
    with atomic_path(path) as folder:
        folder.mkdir()
        pairs = parallel_map(lambda sample: read_pair(sample, size), samples)
        with open(folder / "images", "wb") as images, open(folder / "labels", "wb") as labels:
            for sample, pair in zip(samples, progress(pairs, title, len(samples))):
                if isinstance(pair, ImageError):
                    skipped.append(str(pair))
                elif isinstance(pair, UserError):
                    raise pair
                else:
                    images.write(pair[0].tobytes())
                    labels.write(pair[1].tobytes())
                    names.append(sample.name)
        if not names:
            raise UserError(f"none of {len(samples)} images can be read; the first: {skipped[0]}")
        (folder / "meta.json").write_text(json.dumps({"names": names, "skipped": skipped}))


def to_gpu(split, device):
    """The split in GPU memory, as uint8, where it takes at most half of what is free."""
    size = split.images.nbytes + split.labels.nbytes
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 2:
        return split
    images, labels = (torch.from_numpy(np.array(part)).to(device) for part in split[1:3])
    return split._replace(images=images, labels=labels)


def epoch_order(n, repeat, seed, epoch):
    """The indices of an epoch, shuffled: each of `n` images `repeat` times."""
    return torch.randperm(n * repeat, generator=seeded_generator("shuffle", seed, epoch)) % n


def get_batch(split, indices, device=torch.device("cpu")):
    """The images `indices` of a split: (B, 3, H, W) in 0..1, and labels (B, H, W) in uint8. No
    worker processes: a batch from the memory map takes 0.5 ms, a training step 148 (UNet of width
    16, 8 images of 128×128, two cores)."""
    indices = indices.to(device) if torch.is_tensor(split.images) else np.asarray(indices)
    images, labels = (torch.as_tensor(part[indices]).to(device, non_blocking=True)
                      for part in split[1:3])
    return to_float_nchw(images), labels


def to_float_nchw(images):
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in 0..1; channels-last, nothing moves in memory."""
    return images.permute(0, 3, 1, 2).float() / 255


def normalize(images):
    """Shifts and scales each colour to about zero mean and unit variance."""
    mean, std = (images.new_tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
    return (images - mean) / std


def augment(images, labels, rng, size=None, p=1.0, flip=0.0, vflip=0.0, rotate=0.0, zoom=1.0,
            aspect=1.0, shift=0.0, brightness=0.0, contrast=0.0, saturation=0.0, cutmix=0.0):
    """Augments a batch at random, each image with probability `p`: flip, vflip and cutmix are
    probabilities, rotate is in degrees, zoom and aspect are factors either way, shift is a fraction
    of the side, the colour strengths run from 0 to 1 (saturation 1 reaches down to gray).

    All geometric changes are composed into one affine matrix; one grid_sample applies it (bilinear
    for images, nearest for labels) and resizes to `size`.
    """
    batch, _, height, width = images.shape
    device = images.device
    applied = (torch.rand(batch, generator=rng) < p).float()

    def uniform(magnitude):  # in ±magnitude, 0 for the images that are left alone
        return (2 * torch.rand(batch, generator=rng) - 1) * magnitude * applied

    def random_sign(probability):
        return 1 - 2 * (torch.rand(batch, generator=rng) < probability).float() * applied

    # theta maps a pixel of the result to where to look in the image, both in -1..1
    angle, scale = uniform(math.radians(rotate)), torch.exp(uniform(math.log(zoom)))
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    stretch = torch.exp(uniform(math.log(aspect)))
    flip_x, flip_y = random_sign(flip), random_sign(vflip)
    theta = torch.stack((
        stretch * cos * flip_x, -stretch * sin * height / width * flip_y, uniform(2 * shift),
        sin / stretch * width / height * flip_x, cos / stretch * flip_y, uniform(2 * shift)),
        dim=1).view(-1, 2, 3)                                        # (B, 2, 3)
    grid = F.affine_grid(theta.to(device, non_blocking=True),
                         (batch, 3, *(size or (height, width))), align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    labels = F.grid_sample(labels.unsqueeze(1).float(), grid, "nearest", "reflection",
                           align_corners=False)

    brightness, contrast, saturation = (
        (1 + uniform(magnitude).view(-1, 1, 1, 1)).to(device, non_blocking=True)
        for magnitude in (brightness, contrast, saturation))
    images = images * brightness
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    gray = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    images = (gray + (images - gray) * saturation).clamp(0, 1)

    if cutmix:  # https://arxiv.org/abs/1905.04899, with the next image of the batch
        inside = cutmix_mask(batch, *images.shape[2:], cutmix * applied, rng).to(device)
        images = torch.where(inside, images.roll(1, dims=0), images)
        labels = torch.where(inside, labels.roll(1, dims=0), labels)
    return images, labels.squeeze(1).to(torch.uint8)


def cutmix_mask(batch, height, width, p, rng):
    """Where CutMix shows another image: with the probabilities `p`, a box of 0.2 to 0.9 of each
    side around a random centre; (B, 1, H, W) bool."""
    inside = (torch.rand(batch, generator=rng) < p).view(-1, 1, 1, 1)
    for side, shape in ((height, (batch, 1, -1, 1)), (width, (batch, 1, 1, -1))):
        position = (torch.arange(side) + 0.5) / side
        centre, half_size = torch.rand(2, batch, 1, generator=rng)
        inside = inside & ((position - centre).abs() < 0.1 + 0.35 * half_size).view(shape)
    return inside


def labels_to_target(labels, border="foreground", rng=None, classes=2):
    """Labels to the target of the loss. A border becomes the class it borders ("foreground"),
    "background", "ignore", a "class" of its own, the last of `classes`, or one of the first two by
    a coin per image ("random")."""
    is_border = (labels >= BORDER_OFFSET) & (labels != IGNORE_INDEX)
    foreground = torch.where(is_border, labels - BORDER_OFFSET, labels)
    if border == "foreground":
        return foreground
    if border == "random":
        coin = torch.randint(2, (len(labels), 1, 1), generator=rng).bool().to(labels.device)
        return torch.where(is_border & coin, 0, foreground)
    value = {"background": 0, "ignore": IGNORE_INDEX, "class": classes - 1}[border]
    return torch.where(is_border, value, labels)


# ------------------------------------------------------------------------ one image, and its mask

# what Pillow raises at files that are cut off, damaged, or no images at all
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, RuntimeError,
                 MemoryError, struct.error)
Image.init()  # of all formats that Pillow knows, those that photos have; EPS would run a program
FORMATS = [name for name in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "JPEG2000", "PPM")
           if name in Image.OPEN]
warnings.filterwarnings("ignore", module="PIL")  # a file is read, or it is named
EXIF_ORIENTATION = 0x0112  # from 5 on, width and height are swapped
RGB_FLAG = 1 << 24  # a mask's colour as an integer: RGB_FLAG + 0xrrggbb


class Sample(NamedTuple):
    """An image and its mask; `classes` says what the mask's values mean: {value: label}, or None
    for two classes by the rule of `two_classes`."""
    name: str
    image: Path
    mask: Path
    classes: dict | None


def set_max_pixels(pixels):
    """Images with more pixels are refused before they are decoded. Pillow does it; it warns at the
    number it is given and refuses at twice that."""
    Image.MAX_IMAGE_PIXELS = pixels / 2


@contextlib.contextmanager
def open_image(path):
    """An image of which only the header is read. What Pillow raises while it is in use becomes an
    ImageError."""
    try:
        if not os.path.isfile(path):  # reading a pipe would never end
            raise OSError("there is no such file")
        with Image.open(path, formats=FORMATS) as image:
            if max(image.size) > 10**6:  # Pillow keeps 12 bytes per row, however short it is
                raise ValueError("one side is longer than a million pixels")
            yield image
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} has more than {2 * Image.MAX_IMAGE_PIXELS:,.0f} pixels; to take "
                         "it all the same, raise --max-pixels") from error
    except DECODE_ERRORS as error:
        raise ImageError(f"{path}: {error}") from error


def read_image(path, size=None, mask_size=None):
    """A photo in any of FORMATS as an RGB image, upright, resized to `size`.

    A JPEG much larger than `size` is decoded at 1/2, 1/4 or 1/8, which its format makes cheap, but
    not below twice `size`: the last halving is left to the better filter.
    """
    with open_image(path) as image:
        raw_size = image.size[::-1]
        rotated = image.getexif().get(EXIF_ORIENTATION, 1) >= 5 and image.format != "TIFF"
        upright_size = raw_size[::-1] if rotated else raw_size  # Pillow has rotated a TIFF already
        if mask_size not in (None, raw_size, upright_size):
            raise UserError("{} is {}×{} pixels high and wide, its mask {}×{}; they must agree"
                            .format(path, *upright_size, *mask_size))
        if size:
            image.draft("RGB", (2 * max(size), 2 * max(size)))
        if mask_size in (None, upright_size):  # a mask of the stored image wants it as stored
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):  # more than 8 bits
            values = np.nan_to_num(np.array(image, dtype=np.float32), posinf=0, neginf=0)
            values = values.clip(0) * (255 / white_level(image))
            image = Image.fromarray(values.astype(np.uint8))
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")  # reads the pixels, while the file is open
        return image.resize(size[::-1], Image.Resampling.BILINEAR) if size else image


def white_level(image):
    """The value of white in an image of more than 8 bits: the next 2ᵏ − 1 (1023, 4095, 65535), as a
    12-bit camera stores 12 bits in 16; of floats the largest value."""
    values = np.asarray(image)
    largest = values.max(where=np.isfinite(values), initial=1)
    return largest if image.mode == "F" else 2 ** max(8, int(largest).bit_length()) - 1


def read_mask(path, classes):
    """A mask file as labels (H, W) of its own size; `classes` as in Sample."""
    values = read_mask_values(path, colours=classes and max(classes) >= RGB_FLAG)
    if classes is None:
        labels = two_classes(values)
        if labels is None:
            raise UserError(
                f"the mask {path} holds {describe_values(values)}; without a classes.txt a mask is "
                "0 and 1 (255: ignored), or dark and light; a classes.txt to start from, for the "
                "folder above images and masks:", *(f"{format_value(value)} class{i}" for i, value
                                                    in enumerate(np.unique(values)[:20])))
        return labels
    known = np.array(sorted(classes))
    index = np.searchsorted(known, values).clip(max=len(known) - 1)
    if (unknown := known[index] != values).any():
        raise UserError(f"the mask {path} holds {describe_values(values, unknown)}; expected "
                        + ", ".join(map(format_value, islice(classes, 20))))
    return np.array([classes[value] for value in known.tolist()], np.uint8)[index]


def read_mask_values(path, colours=False):
    """A mask as integers (H, W): its values, or RGB_FLAG + 0xrrggbb where it holds colours, or is
    expected to. Gray RGB is gray."""
    with open_image(path) as image:
        if colours or image.mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
            rgb = np.asarray(image.convert("RGB"))
            if colours or (rgb != rgb[..., :1]).any():
                return RGB_FLAG + rgb.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
            return rgb[..., 0]
        if image.mode not in ("1", "L", "P", "LA", "PA", "I", "I;16", "I;16B"):
            raise UserError(f"the mask {path} is of mode {image.mode}; expected integers or RGB")
        values = np.asarray(image.getchannel(0) if len(image.getbands()) > 1 else image)
        return values.astype(np.uint8) if values.dtype == bool else values


def two_classes(values):
    """Labels of a mask without classes.txt, or None where its values do not say them: 0, 1 and
    maybe 255 (ignored); or dark (≤ 32) background and a light (≥ 223) object. At JPEG's and other
    soft edges up to 5% of the pixels may lie between; they are cut at 128."""
    levels = np.unique(values)
    if 1 in levels and set(levels.tolist()) <= {0, 1, 255}:
        return values.astype(np.uint8)
    dark, light = (levels <= 32).sum(), (levels >= 223).sum()
    clear = dark <= 1 and light <= 1 and dark + light == len(levels)
    soft = dark and light and 0 < soft_fraction(values) <= 0.05
    if levels[0] < 0 or levels[-1] > 255 or not (clear or soft):
        return None
    return (values >= 128).astype(np.uint8)


def soft_fraction(values):
    """The fraction of a mask's pixels between dark and light."""
    return ((values > 32) & (values < 223)).mean()


def format_value(value):
    """A mask's value as classes.txt has it: a number, or R G B."""
    value = int(value)
    return str(value) if value < RGB_FLAG else " ".join(map(str, value.to_bytes(4, "big")[1:]))


def describe_values(values, where=True):
    """The most frequent values of a mask, with their fractions of its pixels."""
    found, counts = np.unique(values[np.broadcast_to(where, values.shape)], return_counts=True)
    order = counts.argsort(kind="stable")[::-1]
    return ", ".join(f"{format_value(found[i])} ({counts[i] / values.size:.2%})"
                     for i in order[:9]) + " …" * (len(order) > 9)


def read_pair(sample, size):
    """A photo and its labels at `size`: uint8 (H, W, 3) and (H, W). Threads are enough to read
    many, as Pillow releases the GIL: two cores read 1,145 JPEGs of 500×375 a second with two
    threads, 599 with one."""
    labels = read_mask(sample.mask, sample.classes)
    image = read_image(sample.image, size, labels.shape)
    return np.asarray(image), resize(labels, size, "NEAREST")


def resize(array, size, resample="BILINEAR"):
    """An image or an array at another size, as an array."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    return np.array(image.resize(size[::-1], Image.Resampling[resample]))


def upsample_and_argmax(probs, size, threshold=0.5):
    """Probabilities (C, h, w) to a mask (H, W) of class indices, and the mean probability of the
    classes in it. One class is enlarged at a time: 9 bytes a pixel, however many there are."""
    mask, best = np.zeros(size, np.uint8), resize(probs[0], size)
    if len(probs) == 1:  # the probability of class 1
        mask, best = (best >= threshold).astype(np.uint8), np.maximum(best, 1 - best)
    for label in range(1, len(probs)):
        p = resize(probs[label], size)
        mask[p > best] = label
        np.maximum(best, p, out=best)
    return mask, float(best.mean(dtype=float))


# ------------------------------------------------------------------------------ folders of samples

PETS, TOYS = "oxford-iiit-pet", "toy-pets"
TRIMAP_TO_LABEL, CAT_TO_LABEL, DOG_TO_LABEL = (
    {1: label, 2: 0, 3: BORDER_OFFSET + label} for label in (1, 1, 2))
IMAGE_FOLDERS = ("images", "imgs", "image", "img", "photos", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "gt", "segmentationclass")
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"),
                 "test": ("test", "testing")}
# the 30 classes of Cityscapes, in the order of their ids from 4 on, and the 19 that are scored
CITYSCAPES = ("static dynamic ground road sidewalk parking rail-track building wall fence "
              "guard-rail bridge tunnel pole polegroup traffic-light traffic-sign vegetation "
              "terrain sky person rider car truck bus caravan trailer train motorcycle "
              "bicycle").split()
CITYSCAPES_EVAL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


class Dataset(NamedTuple):
    """A folder of labelled images, as it was understood."""
    folder: Path
    layout: str          # in words
    class_names: list
    splits: dict         # {"train": [Sample, ...], "val": [...], and maybe "test": [...]}
    random_split: dict   # {"val": names, "test": names} where we drew it, {} where the folder says
    warnings: list       # what is left out, a line each


def scan_dataset(folder, classes="pet", cityscapes_classes="19", random_split=None):
    """Understands a folder by what lies in it. `classes` is for the pets, "pet" or "species";
    `random_split` that of an earlier scan. For a new layout write a function like `scan_pets`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name one with --data")
    if (folder / "annotations" / "trimaps").is_dir():
        return scan_pets(folder, classes)
    if classes != "pet":
        raise UserError(f"--classes {classes} is for the layout of the pets, but {folder} has no "
                        "annotations/trimaps; its classes are those of its masks")
    if (folder / "leftImg8bit").is_dir():
        return scan_cityscapes(folder, cityscapes_classes)
    return scan_pairs(folder, random_split)


def scan_pets(folder, classes):
    """The layout of the Oxford-IIIT Pets. Every tenth line of trainval.txt, the first included, is
    val, the others are train, without shuffling: the split of everyone who does the same. A line is
    NAME, and maybe BREED SPECIES (1 cat, 2 dog) and a number."""
    def samples(path):
        text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
        lines = [line.split() for line in text.splitlines() if line.strip() and line[0] != "#"]
        if len(lines) < 2:
            raise UserError(f"{path} is missing or names fewer than two images; expected a NAME a "
                            "line, of images/NAME.jpg and annotations/trimaps/NAME.png")
        for name, *more in lines:
            values = TRIMAP_TO_LABEL
            if classes == "species":
                values = {"1": CAT_TO_LABEL, "2": DOG_TO_LABEL}.get("".join(more[1:2]))
            if not values:
                raise UserError(f"{path} does not say what species {name} is; expected lines NAME "
                                "BREED SPECIES, where SPECIES is 1 (cat) or 2 (dog)")
            yield Sample(name, folder / "images" / f"{name}.jpg",
                         folder / "annotations" / "trimaps" / f"{name}.png", values)

    trainval = list(samples(folder / "annotations" / "trainval.txt"))
    splits = {"train": [s for i, s in enumerate(trainval) if i % 10], "val": trainval[::10]}
    if (folder / "annotations" / "test.txt").is_file():
        splits["test"] = list(samples(folder / "annotations" / "test.txt"))
    names = ["background", "pet"] if classes == "pet" else ["background", "cat", "dog"]
    return Dataset(folder, "the layout of the pets", names, splits, {}, [])


def scan_cityscapes(folder, number):
    """Cityscapes as it is unpacked (https://www.cityscapes-dataset.com), without its test images,
    whose labels are not published."""
    ids = CITYSCAPES_EVAL_IDS if number == "19" else range(4, 34)
    classes = dict.fromkeys(range(256), IGNORE_INDEX) | {i: label for label, i in enumerate(ids)}
    splits = {"train": [], "val": []}
    for split, samples in splits.items():
        root, masks = folder / "leftImg8bit" / split, folder / "gtFine" / split
        for image in find_images([root]):
            name = image.relative_to(root).as_posix().removesuffix("_leftImg8bit.png")
            samples.append(Sample(name, image, masks / f"{name}_gtFine_labelIds.png", classes))
    return Dataset(folder, "Cityscapes", [CITYSCAPES[i - 4] for i in ids], splits, {}, [])


def scan_pairs(folder, random_split):
    """A folder of images beside one of masks, with train, val, test above or below the two; without
    any, a random split."""
    def child(parent, names):
        folders = {path.name.lower(): path for path in sorted(parent.iterdir()) if path.is_dir()}
        return next((folders[name] for name in names if name in folders), None)

    def find_pair(parent):
        return [child(parent, names) for names in (IMAGE_FOLDERS, MASK_FOLDERS)]

    flat, pairs, notes = find_pair(folder), {}, []
    for split, names in SPLIT_FOLDERS.items():
        above = child(folder, names)
        pair = find_pair(above) if above else [child(each, names) for each in flat if each]
        if len(pair) == 2 and all(pair):
            pairs[split] = match_pairs(*pair, notes)
    if not (all(flat) if not pairs else {"train", "val"} <= pairs.keys()):
        counts = Counter(p.parent for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        raise UserError(
            f"{folder} is not understood{': train or val is missing' * bool(pairs)}; expected a "
            f"folder {' or '.join(IMAGE_FOLDERS)} beside a folder {' or '.join(MASK_FOLDERS)}, with "
            "train, val and maybe test above both or in both, or without any; rename what lies there:",
            *[f"{path.relative_to(folder)}/ with {n} images" for path, n in sorted(counts.items())])
    layout = f"{' and '.join(pairs)}, with images and masks each"
    if pairs:
        random_split = {}
    else:
        layout, matched = f"{flat[0].name}/ and {flat[1].name}/", match_pairs(*flat, notes)
        random_split = random_split or draw_random_split([name for name, *_ in matched], folder)
        split_of = {name: split for split, names in random_split.items() for name in names}
        for pair in matched:
            pairs.setdefault(split_of.get(pair[0], "train"), []).append(pair)
    classes, class_names = read_classes(folder)
    splits = {split: [Sample(*pair, classes) for pair in pairs[split]] for split in SPLIT_FOLDERS
              if split in pairs}
    return Dataset(folder, layout, class_names, splits, random_split, notes)


def match_pairs(images, masks, notes):
    """(name, image, mask) of all images with a mask of the same name, or with the same something
    before or after it in every mask; adds to `notes` what is left out."""
    def by_name(folder):
        paths = {}
        for path in find_images([folder]):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if paths.setdefault(name, path) != path:
                notes.append(f"{path} is left out: {paths[name]} has the same name")
        return paths

    image_of, mask_of = by_name(images), by_name(masks)
    affixes = Counter()
    for mask in islice(mask_of, 0, None, len(mask_of) // 20 + 1):
        stems = (name.rpartition("/")[2] for name in image_of)
        affixes.update(mask.rpartition("/")[2].partition(stem)[::2] for stem in stems if stem in mask)
    [(before, after)] = [affix for affix, _ in affixes.most_common(1)] or [("", "")]
    pairs, without = [], []
    for name, image in image_of.items():
        parent, slash, stem = name.rpartition("/")
        mask = mask_of.pop(f"{parent}{slash}{before}{stem}{after}", None)
        pairs += [(name, image, mask)] * bool(mask)
        without += [image] * (not mask)
    if not pairs:
        raise UserError(f"no image in {images} has a mask in {masks}; expected the same name, or the "
                        "same something before or after it in every mask; the first names are "
                        f"{next(iter(image_of))} and {next(iter(mask_of))}")
    for kind, paths in (("images without a mask", without),
                        ("masks without an image", [*mask_of.values()])):
        if paths:
            notes.append(f"{len(paths)} {kind} are left out; the first: "
                         + ", ".join(map(str, paths[:5])))
    return pairs


def draw_random_split(names, folder):
    """A random split, 10% val and 10% test, always the same for the same names."""
    if len(names) < 3:
        raise UserError(f"{folder} has {len(names)} labelled images; at least 3 are needed, for "
                        "train, val and test")
    n = max(1, len(names) // 10)
    order = [names[i] for i in torch.randperm(len(names), generator=seeded_generator("split"))]
    return {"val": sorted(order[:n]), "test": sorted(order[n:2 * n])}


# a line of classes.txt: VALUE NAME, R G B NAME, or NAME; and what was its form before
CLASS_LINE = re.compile(r"(?:(\d+)[\s,]+(?:(\d+)[\s,]+(\d+)[\s,]+)?)?(\S.*)")
OLD_CLASS_LINE = re.compile(r"(\D.*?)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\d+)")


def read_classes(folder):
    """What classes.txt says: ({value: label}, names); without one (None, ["background",
    "foreground"]). A class `background` comes first; `void` or `ignore` is neither learned nor
    scored, nor is 255 where it has no line."""
    path = folder / "classes.txt"
    if not path.is_file():
        return None, ["background", "foreground"]
    text = path.read_bytes()
    utf16 = text.startswith((b"\xff\xfe", b"\xfe\xff"))  # as Windows may write it
    lines = text.decode("utf-16" if utf16 else "utf-8-sig", "replace").splitlines()
    value_of, kinds = {}, set()  # {name: value}; how many numbers a line has
    for i, line in enumerate(filter(None, map(str.strip, lines))):
        *numbers, name = CLASS_LINE.fullmatch(line).groups()
        numbers = [int(number) for number in numbers if number]
        kinds.add(len(numbers))
        expected = "expected VALUE NAME, or R G B NAME, or NAME, the same in all lines"
        if old := OLD_CLASS_LINE.fullmatch(line):
            expected = f"the colour comes first: {' '.join(old.group(2, 3, 4, 1))}"
        if old or len(kinds) > 1 or len(numbers) == 3 and max(numbers) > 255:
            raise UserError(f"{path} has the line {line!r}; {expected}")
        value = RGB_FLAG + int.from_bytes(numbers, "big") if len(numbers) == 3 else (*numbers, i)[0]
        if name in value_of or value in value_of.values():
            raise UserError(f"{path} has the name or value of {line!r} twice; each class has its own")
        value_of[name] = value
    names = [name for name in value_of if name.lower() not in ("void", "ignore")]
    names.sort(key=lambda name: name.lower() != "background")
    if not 2 <= len(names) <= 100:
        raise UserError(f"{path} names {len(names)} classes; 2 to 100 can be learned")
    classes = {} if kinds == {3} else {255: IGNORE_INDEX}
    classes |= dict.fromkeys(value_of.values(), IGNORE_INDEX)
    return classes | {value_of[name]: label for label, name in enumerate(names)}, names


SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def find_images(paths):
    """All images among files and folders, sorted within each: in a folder, the files with one of
    SUFFIXES; a file that is named is taken as it is. Links to folders are not followed."""
    found = []
    for path in map(Path, paths):
        if not path.is_dir() and not path.is_file():
            raise UserError(f"there is no file or folder {path}")
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
                        and p.name[0] != ".") if path.is_dir() else [path]
        if not inside:
            raise UserError(f"there are no images in the folder {path}")
        found += inside
    return found


def find_ground_truth(image):
    """The trimap of a photo that lies in a folder of the pets, or None."""
    path = Path(image).absolute().parent.parent / "annotations" / "trimaps" / f"{image.stem}.png"
    return path if os.path.isfile(path) else None  # Path.is_file raises where a name is too long


def unique_names(names):
    """A name for the outputs of each: on one line, at most 200 bytes, which leaves room for an
    ending; with a number where it comes again."""
    taken = {}  # in lower case: in upper case
    for name in names:
        stem = escape_nonprintable(name).encode()[:200].decode(errors="ignore")
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken[name.casefold()] = name
    return [*taken.values()]


class Check(NamedTuple):
    """What `verify` says of a split."""
    errors: list           # a line for each image that cannot be used
    notes: list            # what was read in a way that one might not expect
    fractions: np.ndarray  # of the pixels, by class


def verify(dataset):
    """Reads every image and mask: {split: Check}."""
    def inspect(sample):
        labels, notes = read_pair(sample, (32, 32))[1], []
        with open_image(sample.image) as image:
            if image.mode.startswith("I"):
                notes.append(f"16-bit images, white at {white_level(image)}")
        if sample.classes is None and soft_fraction(read_mask_values(sample.mask)):
            notes.append("masks with soft edges, cut at 128")
        target = labels_to_target(torch.from_numpy(labels))
        return notes, np.bincount(target.flatten(), minlength=256)[:IGNORE_INDEX]

    result = {}
    for split, samples in dataset.splits.items():
        found = list(progress(parallel_map(inspect, samples), f"check {split}", len(samples)))
        errors = [str(each) for each in found if isinstance(each, UserError)]
        good = [each for each in found if not isinstance(each, UserError)]
        notes = Counter(note for some, _ in good for note in some)
        pixels = sum((counts for _, counts in good), np.zeros(IGNORE_INDEX, int))
        result[split] = Check(errors, [f"{n} {note}" for note, n in notes.items()],
                              pixels / max(pixels.sum(), 1))
    return result


# -------------------------------------------------------------------------------------- download

PETS_MD5 = {"images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
            "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f"}
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, OSError)


def get_pets(root, url, archives=PETS_MD5, retry_delays=(1, 2, 4, 8, 16)):
    """Downloads and unpacks what is missing of the pets; returns their folder."""
    folder = Path(root) / PETS
    for name, md5 in archives.items():
        archive, content = folder / name, folder / name.removesuffix(".tar.gz")
        if content.is_dir():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            download(f"{url.rstrip('/')}/{name}", archive, retry_delays)
        digest = hashlib.md5(usedforsecurity=False)
        with open(archive, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != md5:
            archive.unlink()
            raise DownloadError(f"{archive} had a wrong checksum and was deleted; try again, or name "
                                "another mirror with --url")
        with atomic_path(content) as new, tarfile.open(archive) as tar:
            tar.extractall(new.parent, filter="data")  # refuses what would leave the folder
            os.rename(new.parent / content.name, new)
        archive.unlink()
    return folder


def download(url, path, retry_delays):
    """Downloads to `path`.part, goes on after a break, then renames. Gives up after as many breaks
    in a row as there are delays."""
    part, failures = path.with_name(f"{path.name}.part"), 0
    while not path.exists():
        offset = part.stat().st_size if part.exists() else 0
        try:
            download_range(url, part, offset)
            os.replace(part, path)
        except NETWORK_ERRORS as error:
            progressed = part.exists() and part.stat().st_size > offset
            failures = 1 if progressed else failures + 1
            status = getattr(error, "code", 500)  # of HTTP
            if status < 500 and status not in (408, 429) or failures > len(retry_delays):
                raise DownloadError(f"cannot download {url}: {error}; check the network, or name a "
                                    "mirror with --url") from error
            time.sleep(retry_delays[failures - 1])
        except ValueError as error:
            raise UserError(f"{url} cannot be used: {error}") from error


def download_range(url, part, offset):
    """One request: appends what `part`, `offset` bytes long, lacks."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:  # nothing is left to send
            return
        raise
    with response, open(part, "ab") as file:
        if offset and response.status != 206:  # the server does not know ranges: from the start
            offset = 0
            file.truncate(0)
        total = offset + response.length if response.length else None
        chunks = iter(lambda: response.read1(1 << 18), b"")
        for chunk in progress(chunks, f"download {part.stem}", total, offset, "MB", 1e6, len):
            file.write(chunk)
    if total and part.stat().st_size < total:
        raise ConnectionError(f"the connection broke after {part.stat().st_size} of {total} bytes")


# ----------------------------------------------------------- errors, safe files, threads, progress


def escape_nonprintable(text):
    """Escapes newlines, undecodable bytes and bidi control characters, so that a file name stays on
    one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """Something that the user can mend: what is wrong, where, and what to do; further arguments are
    lines of detail."""

    def __str__(self):
        return "\n  ".join(map(escape_nonprintable, self.args))


class ImageError(UserError):
    """An image that is missing or damaged; the caller decides whether to go on without it."""


class DownloadError(UserError):
    """The network or the server failed; `--data auto` then takes the toy pets."""


def seeded_generator(*key):
    """A torch.Generator seeded by a hash of `key`, e.g. ("shuffle", seed, epoch): an exact resume
    needs no state of a global generator."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextlib.contextmanager
def atomic_path(path):
    """Yields a path to write a file or folder to, which is renamed to `path` at the end; after an
    error or a kill the old `path` is still there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as temporary:
        new = Path(temporary) / "new"
        yield new
        if new.is_dir() and path.exists():  # a file can be renamed onto another, a folder cannot
            os.replace(path, Path(temporary) / "old")
        os.replace(new, path)


def write_json(path, content):
    """Writes a JSON file atomically."""
    with atomic_path(path) as new:
        new.write_text(json.dumps(content, indent=2))


def write_csv(path, rows):
    """Writes dicts with the same keys as a CSV file, atomically."""
    with atomic_path(path) as new, open(new, "w", newline="", encoding="utf-8",
                                        errors="surrogateescape") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ())
        writer.writeheader()
        writer.writerows(rows)


def take_lock(folder, wait=True):
    """Locks a folder, and clears away what killed processes have left half-written in it. Returns
    a handle, or None where another process has the lock. The kernel releases it with the process,
    however that ends."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not fcntl:
        return os.open(os.devnull, os.O_RDONLY)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return os.close(handle)
    for leftover in (*folder.glob(".part-*"), *folder.glob("*/.part-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    return handle


@contextlib.contextmanager
def lock(folder):
    """Holds a folder for this process alone while a block runs."""
    handle = take_lock(folder)
    try:
        yield
    finally:
        os.close(handle)


def parallel_map(function, items, threads=None):
    """Ordered map() on a thread pool with at most 4 results per thread in flight. A UserError is
    yielded, not raised."""
    def call(item):
        try:
            return function(item)
        except UserError as error:
            return error

    threads = threads or torch.get_num_threads()
    remaining, pool = iter(items), ThreadPoolExecutor(threads)
    try:
        pending = deque(pool.submit(call, item) for item in islice(remaining, 4 * threads))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(call, item) for item in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only what has begun is finished


def format_time(seconds):
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StatusLine:
    """A line on stderr that is redrawn in a terminal; in a log, a line every 30 seconds."""

    def __init__(self):
        self.terminal, self.last = sys.stderr.isatty(), time.monotonic()

    def due(self):
        """Whether it is time for the next text; never on ranks above 0, which do not talk."""
        return (os.environ.get("RANK", "0") == "0"
                and time.monotonic() - self.last > (0.2 if self.terminal else 30))

    def show(self, text):
        self.last = time.monotonic()
        print(f"\r\x1b[K{text}" if self.terminal else text, file=sys.stderr, flush=True,
              end="" if self.terminal else "\n")


def progress(items, title, total, done=0, unit="images", scale=1, size=lambda item: 1):
    """Yields the items, while a line says how much is done, how fast, and how long it will take."""
    line, start, first = StatusLine(), time.monotonic(), done
    for item in items:
        yield item
        done += size(item)
        if line.due() or done == total:
            seconds = time.monotonic() - start
            left = format_time(seconds * (total - done) / (done - first)) if total else "?"
            line.show(f"{title}: {done / scale:,.0f} of {(total or 0) / scale:,.0f} {unit}, "
                      f"{(done - first) / seconds / scale:,.1f} {unit}/s, {left} left")


# ----------------------------------------------------------------------- masks, overlays, cut-outs

# the colours of classes 1, 2, …: those of Okabe and Ito, distinct for colour-blind eyes, then the
# same lighter and darker; the background is black, and left as it is in overlays
OKABE_ITO = np.array([(213, 94, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
                      (204, 121, 167), (230, 159, 0), (150, 150, 150)])
PALETTE = [(0, 0, 0), *map(tuple, np.concatenate(
    [OKABE_ITO, 255 - (255 - OKABE_ITO) * 0.45, OKABE_ITO * 0.55] * 5)[:100].astype(int).tolist())]


def to_image(array):
    """A uint8 array as an image; a bool one in white on black."""
    return Image.fromarray(array * np.uint8(255) if array.dtype == bool else np.asarray(array))


def save_image(image, path):
    """Writes an image atomically, in the format that its name ends in."""
    path = Path(path)
    with atomic_path(path) as new:
        format = Image.registered_extensions()[path.suffix.lower()]
        options = {"quality": 90} if format == "JPEG" else {"compress_level": 1}
        image.save(new, format, **options)


def colorize_mask(mask, class_names):
    """A mask of class indices as an image: white on black, or with the palette of the classes."""
    if len(class_names) == 2:
        return to_image(mask > 0)
    image = Image.fromarray(mask, "L")
    image.putpalette(sum(PALETTE[:len(class_names)], ()))
    return image


def overlay(photo, mask):
    """The photo with each class tinted and its contour drawn, dark beside light on any ground."""
    result = photo.copy()
    for label in range(1, int(mask.max()) + 1):
        inside = to_image(mask == label)
        if inside.getbbox():
            contour = inside.filter(ImageFilter.BoxBlur(max(1, max(photo.size) / 300))).point(
                [255 * (6 < value < 249) for value in range(256)])
            result.paste(PALETTE[label], mask=inside.point(lambda value: value * 0.35))
            result.paste((20, 20, 20), mask=contour)
            result.paste("white", mask=ImageChops.darker(contour, inside))
    return result


def cutout(photo, mask):
    """The foreground alone; everything else is transparent, and black."""
    rgba = Image.new("RGBA", photo.size)
    rgba.paste(photo, mask=to_image(mask > 0))
    return rgba


def panel(photo, truth, mask, caption, class_names, side=256):
    """photo | ground truth (where known) | prediction, each `side` high and at most four times as
    wide, with captions and, for more than two classes, a legend."""
    width = min(max(1, round(side * photo.width / photo.height)), 4 * side)
    photo = photo.resize((width, side), Image.Resampling.BICUBIC)
    tiles = [(caption, photo)] + [
        (name, overlay(photo, resize(labels, (side, width), "NEAREST")))
        for name, labels in (("ground truth", truth), ("prediction", mask)) if labels is not None]
    row = Image.new("RGB", (len(tiles) * (width + 4) - 4, side + 24), "white")
    for i, (name, tile) in enumerate(tiles):
        row.paste(tile, (i * (width + 4), 24))
        ImageDraw.Draw(row).text((i * (width + 4), 4), name, "black", ImageFont.load_default(13))
    return row if len(class_names) == 2 else add_legend(row, class_names)


def add_legend(image, class_names):
    """The image with the colour and name of each class but the background below it."""
    result = Image.new("RGB", (image.width, image.height + 18 * len(class_names)), "white")
    result.paste(image)
    draw, font, x, y = ImageDraw.Draw(result), ImageFont.load_default(13), 0, image.height + 4
    for name, colour in zip(class_names[1:], PALETTE[1:]):
        width = 28 + int(font.getlength(name))
        if x and x + width > image.width:
            x, y = 0, y + 18
        draw.rectangle((x, y + 2, x + 12, y + 14), colour)
        draw.text((x + 17, y), name, "black", font)
        x += width
    return result.crop((0, 0, image.width, y + 18))


OUTPUTS = {  # what `infer` can write: the ending, and how from photo, mask, ground truth, classes
    "mask": (".png", lambda photo, mask, truth, names: colorize_mask(mask, names)),
    "overlay": (".jpg", lambda photo, mask, truth, names: overlay(photo, mask)),
    "cutout": (".png", lambda photo, mask, truth, names: cutout(photo, mask)),
    "panel": (".jpg", lambda photo, mask, truth, names: panel(photo, truth, mask, "photo", names)),
}


def output_path(out, name, output):
    """Where `infer` writes one output of an image."""
    return out / f"{name}_{output}{OUTPUTS[output][0]}"


def is_own_output(path, out):
    """Whether an image is one that `infer` has written to the folder `out`."""
    return out.resolve() in path.resolve().parents and path.stem.rpartition("_")[2] in OUTPUTS


def image_grid(images, columns=2):
    """Images side by side on white."""
    width, height = max(i.width for i in images) + 12, max(i.height for i in images) + 12
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width + 6, i // columns * height + 6))
    return grid


# ---------------------------------------------------------------------------------------- curves

LINE_COLORS = [tuple(OKABE_ITO[i].tolist()) for i in (4, 0, 2, 5, 6, 1)]


def ticks(low, high, most=6):
    """Round numbers, 1, 2 or 5 times a power of ten apart, that cover low..high."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9) / most))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= most + 1e-9)
    return [round(i * step, 10) for i in range(math.floor(low / step + 1e-9),
                                               math.ceil(high / step - 1e-9) + 1)]


def draw_plot(draw, box, title, curves):
    """Title, legend, axes, grid and curves inside `box`. A curve is (label, colour, line width,
    points, the index of the point that gets a marker or None)."""
    left, top, right, bottom = box
    small, large, gray = ImageFont.load_default(24), ImageFont.load_default(30), (60, 60, 60)
    draw.text(((left + right) / 2, top), title, "black", large, anchor="mt")
    top += 62
    for i, (label, colour, width, *_) in enumerate(curves):  # the legend, two in a row
        x, y = left + i % 2 * (right - left) / 2, top + i // 2 * 36
        draw.line([(x, y), (x + 46, y)], colour, width)
        draw.text((x + 56, y), label[:34], gray, small, anchor="lm")
    top += 36 * math.ceil(len(curves) / 2)

    xs, ys = zip(*(point for curve in curves for point in curve[3]))
    y_ticks, x_low, x_high = ticks(min(ys), max(ys)), min(xs) - 0.5, max(xs) + 0.5
    y_low, y_high = y_ticks[0], y_ticks[-1] + 1e-9

    def to_pixel(x, y):
        return (left + 12 + (right - left - 24) * (x - x_low) / (x_high - x_low),
                bottom - (bottom - top) * (y - y_low) / (y_high - y_low))

    for tick in y_ticks:
        y = to_pixel(x_low, tick)[1]
        draw.line([(left, y), (right, y)], (225, 225, 225), 2)
        draw.text((left - 12, y), f"{tick:g}", gray, small, anchor="rm")
    for tick in ticks(min(xs), max(xs), 8):
        if x_low <= tick <= x_high and tick == int(tick):
            x = to_pixel(tick, y_low)[0]
            draw.line([(x, top), (x, bottom + 8)], (225, 225, 225), 2)
            draw.text((x, bottom + 14), f"{tick:g}", gray, small, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], gray, 3)
    draw.text(((left + right) / 2, bottom + 50), "epoch", "black", small, anchor="mt")
    for _, colour, width, points, marker in curves:
        pixels = [to_pixel(*point) for point in points]
        draw.line(pixels, colour, width, "curve")
        draw.circle(pixels[-1], width, colour)  # all there is after one epoch
        if marker is not None:
            x, y = pixels[marker]
            draw.line([(x, y), (x, bottom)], colour, 2)
            draw.circle((x, y), 9, "white", colour, 5)


def draw_curves(path, runs, metric="dice"):
    """Loss and a metric, "dice" or "mean_iou", over the epochs; `runs` is {name: rows of
    metrics.csv}; the best epochs are marked. One run has a colour for train and one for val,
    several have one each."""
    image = Image.new("RGB", (2400, 1080), "white")  # twice the size, for smooth edges
    draw, single = ImageDraw.Draw(image), len(runs) == 1
    for left, quantity in ((110, "loss"), (1310, metric)):
        title, curves = {"loss": "Loss", "dice": "Dice", "mean_iou": "Mean IoU"}[quantity], []
        for i, (name, rows) in enumerate(runs.items()):
            scores = [row[f"val_{metric}"] for row in rows]
            best = scores.index(max(scores))
            colours = LINE_COLORS[:2] if single else [LINE_COLORS[i % len(LINE_COLORS)]] * 2
            for split, colour, width, marker in zip(("train", "val"), colours, (4, 7),
                                                    (None, best)):
                points = [(row["epoch"], row[f"{split}_{quantity}"]) for row in rows]
                curves.append((split if single else f"{name} {split}", colour, width, points,
                               marker))
        if single and quantity == metric:
            title += f": best {scores[best]:.4f}, epoch {rows[best]['epoch']}"
        draw_plot(draw, (left, 30, left + 1040, 960), title, curves)
    save_image(image.resize((1200, 540), Image.Resampling.LANCZOS), path)
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
TOY_COLOURS = np.array([
    (30, 27, 25), (240, 234, 224), (130, 127, 124), (205, 128, 55), (98, 64, 40), (226, 200, 160),
    (160, 112, 74), (72, 76, 86), (96, 128, 70), (76, 112, 150), (150, 76, 76), (190, 178, 120),
])  # a coat is of the first eight; the world around it is of all, so colour alone tells little


def ellipse_polygon(x, y, rx, ry, tilt=0.0, corners=28):
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
        parts.append((ellipse_polygon(cx, cy, rx, ry, tilt + rng.normal(0, 0.12)), shade))
    x, y, r = x + rng.normal(0, 0.03), y + rng.normal(0, 0.05), r * rng.uniform(0.88, 1.12)
    pointed = cat or rng.random() < 0.4
    for side in (-1, 1):
        ear = (side * 0.55, -0.85, 0.45, 0.6, side * 0.4, 3) if pointed else (
            side * 0.95, 0.1, 0.3, 0.75, side * -0.3)
        parts.append((r * ellipse_polygon(*ear) + (x, y), 100))
    parts.append((ellipse_polygon(x, y, r, r * 0.9), 135))
    x += rng.uniform(-0.25, 0.25) * r  # the face looks to one side
    parts.append((ellipse_polygon(x, y + r * 0.4, r * (0.4 if cat else 0.55), r * 0.4), 152))
    eyes = [ellipse_polygon(x + side * r * 0.4, y - r * 0.1, r * 0.11, r * 0.14) for side in (-1, 1)]
    return parts, [*eyes, ellipse_polygon(x, y + r * 0.25, r * 0.13, r * 0.09)]


def noise_texture(rng, size, across, down):
    """Smooth noise in 0..1 whose bumps are about `across` × `down` pixels large."""
    coarse = rng.random((max(2, round(size[0] / down)), max(2, round(size[1] / across))))
    return resize(coarse.astype(np.float32), size, "BICUBIC")[..., None].clip(0, 1)


def two_tone(rng, size, colours, bumps):
    """A surface between two of `colours`, mottled by noise of the size `bumps`."""
    one, two = colours[rng.integers(len(colours), size=2)] + rng.normal(0, 10, (2, 3))
    mixed = noise_texture(rng, size, *bumps)
    return one.astype(np.float32) + (two - one).astype(np.float32) * mixed


def rasterize(size, shapes):
    """Draws (polygon, value) shapes at double size and halves it: a float array, smooth edges."""
    image = Image.new("L", (2 * size[1], 2 * size[0]))
    draw = ImageDraw.Draw(image)
    for polygon, value in shapes:
        draw.polygon((2 * polygon).ravel().tolist(), fill=int(value))
    return np.asarray(image.reduce(2), dtype=np.float32)[..., None]


def draw_clutter(rng, photo, number, sizes):
    """Paints `number` cushions, boxes and planks over the photo; returns where, in 0..1."""
    size, covered = photo.shape[:2], np.zeros_like(photo[..., :1])
    for _ in range(number):
        x, y = rng.uniform(0, size[1]), rng.uniform(0, size[0])
        rx, ry = rng.uniform(*sizes, 2) * min(size)
        shape = ellipse_polygon(x, y, rx, ry, rng.uniform(0, 3), rng.choice([4, 28]))
        alpha = rasterize(size, [(shape, 255)]) / 255
        photo += (two_tone(rng, size, TOY_COLOURS, rng.choice([3, 8, 25], size=2)) - photo) * alpha
        covered = np.maximum(covered, alpha)
    return covered


def draw_toy(rng, breed):
    """One toy pet: its photo (an RGB image) and its trimap (1 pet, 2 background, 3 border)."""
    width, height = rng.integers(150, 231, 2).tolist()
    size = height, width
    photo = two_tone(rng, size, TOY_COLOURS, rng.choice([4, 15, 60], size=2))
    draw_clutter(rng, photo, rng.integers(3, 8), (0.05, 0.3))

    parts, face = draw_figure(rng, cat=breed[0].isupper())
    scale, turn = min(size) * rng.uniform(0.42, 0.72), rng.normal(0, 0.2)
    facing = np.array([[rng.choice([-1, 1]), 0], [0, 1]])
    place = facing @ (scale * np.array([[math.cos(turn), math.sin(turn)],
                                        [-math.sin(turn), math.cos(turn)]]))
    centre = np.array([width, height]) * rng.uniform(0.38, 0.62, 2)
    parts = [(part @ place + centre, shade) for part, shade in parts]
    alpha = rasterize(size, [(part, 255) for part, _ in parts]) / 255

    coat = two_tone(rng, size, TOY_COLOURS[:8], (30, 30))
    bumps = {"stripes": (7, 60), "spots": (11, 11), "patches": (45, 45)}.get(COATS[breed])
    if bumps:
        marks = two_tone(rng, size, TOY_COLOURS[:8], (30, 30))
        coat += (marks - coat) * (noise_texture(rng, size, *bumps) > 0.55)
    hair = noise_texture(rng, size, 2, 7) + noise_texture(rng, size, 2, 4) - 1
    coat = coat * (0.55 + rasterize(size, parts) / 280) + 38 * hair
    photo += (coat - photo) * alpha
    features = [(part @ place + centre, 255) for part in face]
    photo += (np.array([18, 14, 12]) - photo) * rasterize(size, features) / 255

    hidden = draw_clutter(rng, photo, rng.integers(0, 3), (0.04, 0.14))
    photo *= 0.75 + 0.5 * noise_texture(rng, size, width, height)  # uneven light
    photo += 5 * rng.standard_normal(photo.shape, dtype=np.float32)
    pet = to_image((255 * alpha * (1 - hidden))[..., 0] >= 128)
    near = np.asarray(pet.filter(ImageFilter.BoxBlur(2)))
    trimap = np.where(near > 240, 1, np.where(near < 15, 2, 3)).astype(np.uint8)
    return Image.fromarray(photo.clip(0, 255).astype(np.uint8)), Image.fromarray(trimap)


def make_toys(root, seed=0, trainval=400, test=100):
    """Draws the toy pets in exactly the pets' layout; returns their folder."""
    folder = Path(root) / TOYS
    with atomic_path(folder) as new:
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

        total = trainval + test
        lines = list(progress(parallel_map(draw, range(total)), "draw toy pets", total))
        head = "# name class species(1 cat, 2 dog) breed\n"
        (annotations / "trainval.txt").write_text(head + "".join(lines[:trainval]))
        (annotations / "test.txt").write_text(head + "".join(lines[trainval:]))
    return folder


