"""data.py: files to tensors, and tensors to files.

Follow one photo to a tensor: `read_pair`, `open_split`, `get_batch`, `augment`, `labels_to_target`;
and a prediction to a file: `upsample_and_argmax`, `cutout`, `save_image`. Only this file imports
Pillow. A size is (height, width) everywhere. What a label is:

    value in the mask file   label in the cache (uint8)         target of the loss
    1 pet, 2 background      1 and 0; by species 1 cat, 2 dog   class index
    3 border                 128 + the class that it borders    as --border says
    255, void, ignore        255                                255: ignored by loss and metrics
    own data                 class index, see `read_mask`       class index
"""
import contextlib
import csv
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import urllib.request
import warnings
import zipfile
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps, ImageStat

MEAN, STD = (0.48, 0.45, 0.40), (0.27, 0.27, 0.28)  # of the pets' train images, in 0..1
BORDER_OFFSET, IGNORE_INDEX = 128, 255

# --------------------------------------------------------------------------- the cache, and batches
CachedSplit = namedtuple("CachedSplit", "names images labels")
# images (N, H, W, 3) and labels (N, H, W): uint8, memory-mapped, or by `to_gpu` on the GPU

def get_samples(dataset, split):
    """The samples of a split, if there is such a split."""
    if not dataset.splits.get(split):
        raise UserError(f"{dataset.folder} has no {split} split; eval can take --split val")
    return dataset.splits[split]

def open_split(dataset, split, size, root):
    """A split of a dataset at `size`, from root/cache, where the first use decodes it. The name
    there ends in a hash of all files' sizes and times and of what changes how they are read."""
    samples = get_samples(dataset, split)
    stats = [os.access(p, os.R_OK) and os.stat(p) for s in samples for p in (s.image, s.mask)]
    facts = [[stat and (stat.st_size, stat.st_mtime_ns) for stat in stats], Image.MAX_IMAGE_PIXELS,
             sorted(FORMATS), [(s.name, s.value_to_label) for s in samples]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    name = f"{dataset.folder.resolve().name}-{split}-{size[0]}x{size[1]}-{key}"
    path = Path(root) / "cache" / name
    with take_lock(root):
        if not path.is_dir():
            build_cache(path, samples, size, f"cache {split} at {size[0]}×{size[1]}")
    names, skipped = json.loads((path / "meta.json").read_text())
    if skipped:
        warnings.warn(f"{split} lacks unreadable images: {len(skipped)}: {'; '.join(skipped[:5])}")
    images, labels = (np.memmap(path / name, np.uint8, "r") for name in ("images", "labels"))
    return CachedSplit(names, images.reshape(-1, *size, 3), labels.reshape(-1, *size))

def build_cache(path, samples, size, title):
    """Decodes every sample once, into the files `images` and `labels` of a folder."""
    names, skipped = [], []
    with atomic_path(path) as folder:
        folder.mkdir()
        pairs = parallel_map(lambda sample: read_pair(sample, size), samples, errors=ImageError)
        with open(folder / "images", "wb") as images, open(folder / "labels", "wb") as labels:
            for pair, sample in zip(progress(pairs, title, len(samples)), samples):
                if isinstance(pair, ImageError):
                    skipped.append(str(pair))
                else:
                    names.append(sample.name)
                    images.write(pair[0].tobytes())
                    labels.write(pair[1].tobytes())
        if not names:
            raise UserError(f"none of {len(samples)} images can be read; the first: {skipped[0]}")
        (folder / "meta.json").write_text(json.dumps([names, skipped]))

def to_gpu(split, device):
    """The split in GPU memory, as uint8, where it takes at most half of what is free."""
    size = split.images.nbytes + split.labels.nbytes
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 2:
        return split
    return CachedSplit(split.names, *(torch.tensor(part, device=device) for part in split[1:]))

def get_batch(split, indices, device=torch.device("cpu")):
    """Images of a split, (B, 3, H, W) in 0..1, and their labels, (B, H, W) uint8."""
    indices = indices.to(device) if torch.is_tensor(split.images) else np.asarray(indices)
    images, labels = split.images[indices], split.labels[indices]
    return to_float_nchw(torch.as_tensor(images).to(device)), torch.as_tensor(labels).to(device)

def to_float_nchw(images):
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in 0..1; in memory the channels stay last."""
    return images.permute(0, 3, 1, 2).float() / 255

def normalize(images):
    """Shifts and scales each colour to about zero mean and unit variance."""
    mean, std = (images.new_tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
    return (images - mean) / std

def augment(images, labels, rng, size=None, p=1.0, flip=0.0, vflip=0.0, rotate=0.0, zoom=1.0,
            aspect=1.0, shift=0.0, brightness=0.0, contrast=0.0, saturation=0.0, cutmix=0.0):
    """Augments a batch at random, each image with probability `p`: flip, vflip and cutmix are
    probabilities, rotate is in degrees, zoom and aspect are factors either way, shift is a fraction
    of the size, colour strengths run from 0 to 1. All geometric changes are composed into one
    affine matrix; grid_sample applies it at `size`: to images bilinear, to labels nearest."""
    batch, _, height, width = images.shape
    applied = (torch.rand(batch, generator=rng) < p).float()

    def uniform(magnitude):  # on the CPU, as rng; 0 where an image is left alone
        return (2 * torch.rand(batch, generator=rng) - 1) * magnitude * applied

    # theta maps a pixel of the result to where to look in the image, both in -1..1 each way
    angle, scale = uniform(math.radians(rotate)), torch.exp(uniform(math.log(zoom)))
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale  # and the zoom
    stretch = torch.exp(uniform(math.log(aspect)))
    flip_x, flip_y = (1 - 2 * (torch.rand(batch, generator=rng) < probability).float() * applied
                      for probability in (flip, vflip))
    theta = torch.stack((
        stretch * cos * flip_x, -stretch * sin * height / width * flip_y, uniform(2 * shift),
        sin / stretch * width / height * flip_x, cos / stretch * flip_y, uniform(2 * shift)),
        dim=1).view(-1, 2, 3)                                        # (B, 2, 3)
    shape = batch, 3, *(size or (height, width))
    grid = F.affine_grid(theta.to(images.device), shape, align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    labels = labels.unsqueeze(1).float()
    labels = F.grid_sample(labels, grid, "nearest", "reflection", align_corners=False)

    brightness, contrast, saturation = (  # strengths to factors (B, 1, 1, 1)
        (1 + uniform(magnitude).view(-1, 1, 1, 1)).to(images.device)
        for magnitude in (brightness, contrast, saturation))
    images = images * brightness
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    gray = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    images = (gray + (images - gray) * saturation).clamp(0, 1)

    if cutmix:  # https://arxiv.org/abs/1905.04899, with the image before it in the batch
        inside = cutmix_mask(batch, *images.shape[2:], cutmix * applied, rng).to(images.device)
        images, labels = (torch.where(inside, x.roll(1, dims=0), x) for x in (images, labels))
    return images, labels.squeeze(1).to(torch.uint8)

def cutmix_mask(batch, height, width, p, rng):
    """With probabilities `p` a box of 0.2 to 0.9 of height and width, anywhere: (B, 1, H, W)."""
    inside = (torch.rand(batch, generator=rng) < p).view(-1, 1, 1, 1)
    for length, shape in ((height, (batch, 1, -1, 1)), (width, (batch, 1, 1, -1))):
        position = (torch.arange(length) + 0.5) / length
        centre, u = torch.rand(2, batch, 1, generator=rng)
        inside = inside & ((position - centre).abs() < 0.1 + 0.35 * u).view(shape)
    return inside

def labels_to_target(labels, border="foreground", rng=None, classes=2):
    """Labels to the target of the loss. A border becomes the class it borders ("foreground"), or
    "background", "ignore", the last class ("class"), or at "random" foreground or background."""
    is_border = (labels >= BORDER_OFFSET) & (labels != IGNORE_INDEX)
    value = labels - BORDER_OFFSET  # the class that it borders
    if border == "random":
        coin = torch.randint(2, (len(labels), 1, 1), generator=rng).bool().to(labels.device)
        value = torch.where(coin, 0, value)
    elif border != "foreground":
        value = {"background": 0, "ignore": IGNORE_INDEX, "class": classes - 1}[border]
    return torch.where(is_border, value, labels)

# ------------------------------------------------------------------------ one image, and its mask
# what Pillow and torch raise at files that are truncated, damaged, or malicious
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, RuntimeError,
                 MemoryError, struct.error, AttributeError, AssertionError, ArithmeticError,
                 zipfile.BadZipFile, pickle.UnpicklingError)
with contextlib.suppress(ImportError):  # photos of iPhones, where this package is installed
    import pillow_heif
    pillow_heif.register_heif_opener()
FORMATS = {"JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "JPEG2000", "PPM", "HEIF"}
FORMATS &= {*Image.registered_extensions().values()}  # as built; no EPS: it would run a program
SUFFIXES = {".heic", ".heif"} | {
    suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
warnings.filterwarnings("ignore", module="PIL")  # what cannot be read is an ImageError
RGB_FLAG = 1 << 24  # a mask's colour as an integer: RGB_FLAG + 0xrrggbb

Sample = namedtuple("Sample", "name image mask value_to_label")
# value_to_label: {value in the mask: label}, or None for the rule of `binary_labels`

def set_max_pixels(pixels):
    """Refuses larger images before they are decoded: Pillow does so at twice what it is given."""
    Image.MAX_IMAGE_PIXELS = (pixels or 50_000_000) / 2

@contextlib.contextmanager
def open_image(path):
    """An image, its header read; `-` is stdin. DECODE_ERRORS in the block become an ImageError."""
    try:
        if str(path) != "-" and not os.path.isfile(path):  # reading a pipe would never end
            raise OSError("no such file")
        file = io.BytesIO(sys.stdin.buffer.read()) if str(path) == "-" else path
        with Image.open(file, formats=[*FORMATS]) as image:
            if max(image.size) > 65_500:
                raise OSError("more than 65,500 pixels high or wide, the limit of JPEG")
            yield image
    except Image.DecompressionBombError:
        raise ImageError(f"{path} has over {2 * Image.MAX_IMAGE_PIXELS:,.0f} pixels (--max-pixels)")
    except DECODE_ERRORS as error:
        if Path(path).suffix.lower() in (".heic", ".heif") and "HEIF" not in FORMATS:
            error = f"to read it: {sys.executable} -m pip install pillow-heif"
        raise ImageError(f"{path}: {(str(error) or repr(error)).partition(' <_io')[0]}") from None

def read_image(path, size=None, mask_size=None):
    """A photo as an RGB image at `size`, upright, or as stored where its mask is."""
    with open_image(path) as image:
        raw_size = image.size[::-1]
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5 and image.format != "TIFF"
        upright_size = raw_size[::-1] if rotated else raw_size  # Pillow has rotated a TIFF already
        if mask_size not in (None, raw_size, upright_size):
            raise UserError("{} is {}×{} pixels high and wide, its mask {}×{}; they must agree"
                            .format(path, *upright_size, *mask_size))
        if size:
            image.draft("RGB", (2 * max(size), 2 * max(size)))  # decodes a JPEG at 1/2 to 1/8
        if mask_size in (None, upright_size):  # else the mask is of the image as stored
            ImageOps.exif_transpose(image, in_place=True)
        image = to_photo(image)  # reads the pixels, while the file is open
        return image.resize(size[::-1], Image.Resampling.BILINEAR) if size else image

def to_photo(image):
    """An RGB image of a path, a PIL image or an array (H, W, 3). What was transparent is white. Its
    `info` keeps the alpha channel, and the ICC profile if it is one of RGB."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    image = image if isinstance(image, Image.Image) else to_image(image)
    profile, alpha = image.info.get("icc_profile"), image.info.get("alpha")  # a PNG's may be texts
    profile = profile if isinstance(profile, bytes) and image.mode.startswith(("RGB", "P")) else b""
    alpha = alpha if getattr(alpha, "size", None) == image.size else None  # or of before a crop
    if image.mode.startswith(("I", "F")):  # over 8 bits
        values = np.nan_to_num(np.array(image, dtype=np.float32), posinf=0, neginf=0).clip(0)
        image = to_image((values * (255 / white_level(image))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {"icc_profile": profile, "alpha": alpha}
    return image

def white_level(image):
    """White beyond 8 bits: the next 2ᵏ − 1, as 12 bits are stored in 16; of floats the largest."""
    largest = np.max(image, where=np.isfinite(image), initial=1)
    return largest if image.mode == "F" else max(255, 2 ** int(largest).bit_length() - 1)

def read_mask(path, value_to_label):
    """A mask file as labels (H, W) of its own size; `value_to_label` as in Sample."""
    values = read_mask_values(path, colours=value_to_label and max(value_to_label) >= RGB_FLAG)
    if value_to_label is None:
        return binary_labels(values, path)
    known = np.array(sorted(value_to_label))
    index = np.searchsorted(known, values).clip(max=len(known) - 1)
    if (unknown := known[index] != values).any():
        raise UserError(f"the mask {path} holds {describe_values(values, unknown)}; classes.txt or "
                        f"the layout knows only {', '.join(map(format_value, known[:20]))}")
    return np.array([value_to_label[value] for value in known.tolist()], np.uint8)[index]

def read_mask_values(path, colours=None):
    """A mask as integers (H, W); colours, where it has or should have them, as RGB_FLAG + rgb."""
    with open_image(path) as image:
        ImageOps.exif_transpose(image, in_place=True)  # if a mask has a rotation of its own
        if colours is None and image.mode == "P":  # a palette of black and white, in any order
            gray = np.asarray(image.convert("L"))
            if {*np.unique(gray)} <= {0, 255} and len(np.unique(gray)) == len(np.unique(image)):
                return gray
            colours = any(image.getpalette()[:3])  # where index 0 is black, the indices count
        if colours or image.mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
            rgb = np.asarray(image.convert("RGB"))
            if colours or (rgb != rgb[..., :1]).any():
                return RGB_FLAG + rgb.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
            return rgb[..., 0]
        if image.mode not in ("1", "L", "P", "LA", "PA", "I", "I;16", "I;16B"):
            raise UserError(f"the mask {path} is of mode {image.mode}; expected integers or RGB")
        values = np.asarray(image.getchannel(0) if len(image.getbands()) > 1 else image)
        return values.astype(np.uint8) if values.dtype == bool else values

def binary_labels(values, path):
    """Labels of a mask without classes.txt: 0, 1 and maybe 255 (ignored), but in JPEG a 1 is dark;
    or one value ≤ 32 and one ≥ 223; or more with at most 5% between, at soft edges, cut at 128."""
    levels, jpeg = np.unique(values), Path(path).read_bytes()[:2] == b"\xff\xd8"
    if 1 in levels and set(levels.tolist()) <= {0, 1, 255} and not jpeg:
        return values.astype(np.uint8)
    dark, light, soft = (levels <= 32).sum(), (levels >= 223).sum(), soft_fraction(values)
    two_levels = dark <= 1 and light <= 1 and not soft
    edges = dark and light and (soft or light > 1)  # but {0, 15, 255} are classes and void
    if 0 <= levels[0] and levels[-1] <= 255 and soft <= 0.05 and (two_levels or edges or jpeg):
        return (values >= 128).astype(np.uint8)
    names = ["background", *(f"class{i}" for i in range(1, 20))]
    raise UserError(
        f"the mask {path} holds {describe_values(values)}; expected 0 and 1 (255: ignored), or "
        "dark and light, or a classes.txt in the folder that --data names, to start from:",
        *(f"{format_value(v)} {'void' if v == 255 else name}" for v, name in zip(levels, names)))

def soft_fraction(values):
    """The fraction of a mask's pixels between dark and light."""
    return ((values > 32) & (values < 223)).mean()

def format_value(value):
    """A mask's value as classes.txt has it: a number, or R G B."""
    return str(value) if value < RGB_FLAG else " ".join(map(str, int(value).to_bytes(4, "big")[1:]))

def describe_values(values, where=slice(None)):
    """The most frequent values of a mask, with their fractions of its pixels."""
    counts = Counter(dict(zip(*np.unique(values[where], return_counts=True))))
    return ", ".join(f"{format_value(value)} ({n / values.size:.2%})"
                     for value, n in counts.most_common(9)) + (" …" if len(counts) > 9 else "")

def read_pair(sample, size):
    """A photo and its labels at `size`: uint8 (H, W, 3) and (H, W)."""
    labels = read_mask(sample.mask, sample.value_to_label)
    return np.asarray(read_image(sample.image, size, labels.shape)), resize(labels, size, "NEAREST")

def read_sample(sample):
    """A photo and its labels, if any, at their own size; where damaged, the photo alone."""
    if sample.mask:
        try:
            labels = read_mask(sample.mask, sample.value_to_label)
            return read_image(sample.image, mask_size=labels.shape), labels
        except UserError as error:
            photo = read_image(sample.image)  # where it is damaged too, only that is said
            warnings.warn(str(error))
            return photo, None
    return read_image(sample.image), None

def resize(array, size, resample="BILINEAR"):
    """An image or an array at another size, as an array."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    return np.array(image.resize(size[::-1], Image.Resampling[resample]))

def upsample_and_argmax(probs, size, threshold=0.5):
    """Probabilities (C, h, w) to a mask (H, W) of class indices, one enlarged class at a time."""
    best = resize(probs[0], size)
    if len(probs) == 1:  # the probability of class 1
        return (best >= threshold).astype(np.uint8)
    mask = np.zeros(size, np.uint8)
    for label in range(1, len(probs)):
        p = resize(probs[label], size)
        mask[p > best] = label
        np.maximum(best, p, out=best)
    return mask

# ------------------------------------------------------------------------------ folders of samples
PETS, TOYS = "oxford-iiit-pet", "toy-pets"
TRIMAP_TO_LABEL = {1: 1, 2: 0, 3: BORDER_OFFSET + 1}
SPECIES_TO_LABEL = {"1": TRIMAP_TO_LABEL, "2": {1: 2, 2: 0, 3: BORDER_OFFSET + 2}}  # cat, dog
IMAGE_FOLDERS = ("images", "imgs", "image", "img", "photos", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "gt", "segmentationclass")
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"),
                 "test": ("test", "testing"), "all": ("",)}  # all: where there are no splits
# the 30 classes of Cityscapes, in the order of their ids from 4 on, and the 19 that are scored
CITYSCAPES = """static dynamic ground road sidewalk parking rail-track building wall fence
    guard-rail bridge tunnel pole polegroup traffic-light traffic-sign vegetation terrain sky person
    rider car truck bus caravan trailer train motorcycle bicycle""".split()
CITYSCAPES_EVAL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]

Dataset = namedtuple("Dataset", "folder layout class_names splits random_split")
# splits: {"train": [Sample, ...], "val": ..., and maybe "test": ...}; random_split: {"val": names,
# "test": names} where we drew it, {} where the folder says

def scan_dataset(folder, classes=None, random_split=None, border_class=False):
    """Finds a folder's layout and its samples. A new layout is a function like `scan_pets`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name one with --data")
    if (folder / "annotations/trimaps").is_dir() and classes in (None, "pet", "species"):
        return scan_pets(folder, classes, border_class)
    if (folder / "leftImg8bit").is_dir() and classes in (None, "19", "30") and not border_class:
        return scan_cityscapes(folder, classes)
    if classes in ("species", "30") or border_class:
        raise UserError("--classes species and --border class need the layout of the pets, "
                        f"--classes 30 that of Cityscapes; {folder} has another")
    return scan_image_and_mask_folders(folder, random_split)

def scan_pets(folder, classes, border_class):
    """The layout of the Oxford-IIIT Pets. Every tenth line of trainval.txt, the first included, is
    val, the others are train; nothing is shuffled, so that the split is the same everywhere."""
    images, trimaps = folder / "images", folder / "annotations" / "trimaps"
    def read_samples(path):  # of lines NAME, or NAME BREED SPECIES
        text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
        rows = re.findall(r"(?m)^([^#\s]\S*)(?:[ \t]+\S+[ \t]+(\S+))?", text)
        if len(rows) < 2:
            raise UserError(f"{path} is missing or lists fewer than two NAMEs, of images/NAME.jpg")
        for name, species in rows:
            values = TRIMAP_TO_LABEL if classes != "species" else SPECIES_TO_LABEL.get(species)
            if not values:
                raise UserError(f"{path}: say what species {name} is: NAME BREED 1 (cat), 2 (dog)")
            yield Sample(name, images / f"{name}.jpg", trimaps / f"{name}.png", values)

    trainval = list(read_samples(folder / "annotations" / "trainval.txt"))
    splits = {"train": [s for i, s in enumerate(trainval) if i % 10], "val": trainval[::10]}
    if (folder / "annotations" / "test.txt").is_file():
        splits["test"] = list(read_samples(folder / "annotations" / "test.txt"))
    names = ["background", *(["cat", "dog"] if classes == "species" else ["pet"])]
    names += ["border"] if border_class else []
    return Dataset(folder, "the layout of the pets", names, splits, {})

def scan_cityscapes(folder, classes):
    """https://www.cityscapes-dataset.com without its test images, whose labels are secret."""
    ids = range(4, 34) if classes == "30" else CITYSCAPES_EVAL_IDS
    values = dict.fromkeys(range(256), IGNORE_INDEX) | {i: label for label, i in enumerate(ids)}
    splits = {"train": [], "val": []}
    for split, samples in splits.items():
        root, masks = folder / "leftImg8bit" / split, folder / "gtFine" / split
        for image in find_images([root]):
            name = image.relative_to(root).as_posix().removesuffix("_leftImg8bit.png")
            samples.append(Sample(name, image, masks / f"{name}_gtFine_labelIds.png", values))
    return Dataset(folder, "Cityscapes", [CITYSCAPES[i - 4] for i in ids], splits, {})

def scan_image_and_mask_folders(folder, random_split):
    """Images beside masks, with train, val, test above or below the two, or with a random split."""
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_dir()]
    folders = {Path(str(path.relative_to(folder)).lower()): path for path in sorted(paths)}

    def find(names, splits):
        return next((folders[place] for name in names for split in splits
                     for place in (Path(split, name), Path(name, split)) if place in folders), None)

    pairs = {split: pair for split, names in SPLIT_FOLDERS.items()
             if all(pair := (find(IMAGE_FOLDERS, names), find(MASK_FOLDERS, names)))}
    if len(pairs) > 1:
        pairs.pop("all", None)
    if "all" not in pairs and not {"train", "val"} <= pairs.keys():
        counts = Counter(p.parent for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        raise UserError(
            f"{folder} is not understood{': train or val is missing' * bool(pairs)}; expected a "
            f"folder {' or '.join(IMAGE_FOLDERS)} beside a folder {' or '.join(MASK_FOLDERS)}, "
            "with train, val and maybe test above or in both, or without; rename what lies there:",
            *[f"{path.relative_to(folder)}/ with {n} images" for path, n in sorted(counts.items())]
            or ["no images at all"])
    layout = " and ".join(f"{p.relative_to(folder)}/" for pair in pairs.values() for p in pair)
    value_to_label, class_names = read_classes(folder)
    splits = {split: match_pairs(*pair, value_to_label) for split, pair in pairs.items()}
    if "all" in splits:
        return split_at_random(folder, layout, class_names, splits["all"], random_split)
    return Dataset(folder, layout, class_names, splits, {})

def split_at_random(folder, layout, class_names, samples, random_split):
    """A Dataset with 10% val and 10% test by a hash of names, or by `random_split` if it fits."""
    if len(samples) < 3:
        raise UserError(f"{folder} has {len(samples)} labelled images; at least 3 are needed")
    drawn, n = sum((random_split or {}).values(), []), max(1, len(samples) // 10)
    order = sorted((s.name for s in samples), key=lambda s: seeded_generator(s).initial_seed())
    if not drawn or len({*drawn} & {*order}) < len(drawn) / 2:  # none yet, or of other data
        random_split = {"val": order[:n], "test": order[n:2 * n]}
    split_of = {name: split for split, names in random_split.items() for name in names}
    splits = {split: chosen for split in ("train", "val", "test")
              if (chosen := [s for s in samples if split_of.get(s.name, "train") == split])}
    return Dataset(folder, layout, class_names, splits, random_split)

def match_pairs(images, masks, value_to_label):
    """Pairs images with masks of the same name, or with the same text around it in every mask."""
    image_of, mask_of = {}, {}
    for folder, paths in ((images, image_of), (masks, mask_of)):
        for path in find_images([folder]):
            first = paths.setdefault(path.relative_to(folder).with_suffix(""), path)
            if first != path:
                warnings.warn(f"{path} is left out: {first} has the same name")
    affixes = Counter()  # what stands before and after the names of some images in names of masks
    for stem in [name.name for name in image_of][::len(image_of) // 20 + 1]:
        for mask in [name.name for name in mask_of if stem in name.name]:
            for before, _, after in (mask.partition(stem), mask.rpartition(stem)):
                if not (before[-1:].isdigit() or after[:1].isdigit()):  # 1 is not the image of 15
                    affixes[before, after] += 1
    before, after = max(affixes, key=affixes.get, default=("", ""))
    partner = {name: name.with_name(f"{before}{name.name}{after}") for name in image_of}
    samples = [Sample(name.as_posix(), image_of.pop(name), mask_of.pop(mask), value_to_label)
               for name, mask in partner.items() if mask in mask_of]
    if not samples:
        raise UserError(f"no mask in {masks} has the name of an image in {images}, with or without "
                        f"more text; the first: {next(iter(image_of))} and {next(iter(mask_of))}")
    for kind, rest in (("images without a mask", image_of), ("masks without an image", mask_of)):
        if rest:
            warnings.warn(f"{len(rest)} {kind} are left out, such as {next(iter(rest.values()))}")
    return samples

def read_classes(folder):
    """({value: label}, names) as classes.txt says. The class `background` comes first; `void` or
    `ignore` is neither learned nor scored, nor is 255 where it has no line."""
    path = folder / "classes.txt"
    if not path.is_file():
        return None, ["background", "foreground"]
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    lines = re.sub("(?m)^#.*", "", content.decode(encoding, errors="replace")).splitlines()
    name_of, number_counts = {}, set()  # {value: name, or None for void}; 0, 1 or 3 in a line
    for i, line in enumerate(filter(None, map(str.strip, lines))):
        pattern = r"(?:(\d+)[\s,:=]+(?:(\d+)[\s,]+(\d+)[\s,:=]+)?)?(\S.*)"
        *numbers, name = re.fullmatch(pattern, line).groups()
        numbers = [int(number) for number in numbers if number]
        number_counts.add(len(numbers))
        if len(number_counts) > 1 or max(numbers, default=0) > (255 if numbers[1:] else 65535):
            raise UserError(f"{path} has the line {line!r}; expected VALUE NAME, or R G B NAME, or "
                            "NAME, the same in all lines")
        value = RGB_FLAG + int.from_bytes(numbers, "big") if numbers[1:] else (numbers or [i])[0]
        name = None if name.lower() in ("void", "ignore") else name
        if value in name_of or name and name in name_of.values():
            raise UserError(f"{path} has the name or value of {line!r} twice")
        name_of[value] = name
    names = sorted(filter(None, name_of.values()), key=lambda name: name.lower() != "background")
    if not 2 <= len(names) <= 100:
        raise UserError(f"{path} names {len(names)} classes; 2 to 100 can be learned")
    label_of = {None: IGNORE_INDEX} | {name: label for label, name in enumerate(names)}
    value_to_label = {} if number_counts == {3} else {255: IGNORE_INDEX}
    return value_to_label | {value: label_of[name] for value, name in name_of.items()}, names

def find_images(paths):
    """Yields files, and all images of folders but hidden ones, sorted, not through links."""
    for path in map(Path, paths):
        files = [path] if path.is_file() or str(path) == "-" else sorted(
            p for p in path.rglob("*") if p.is_file() and "/." not in f"/{p.relative_to(path)}")
        images = [p for p in files if p == path or p.suffix.lower() in SUFFIXES]
        if not images:
            raise UserError(f"there is no {path}, or no image in it")
        if len(images) < len(files):
            warnings.warn(f"{path} holds files that are no images: {len(files) - len(images)}")
        yield from images

def find_ground_truth(image):
    """The trimap of a photo that lies in a folder of the pets, or None."""
    path = image.absolute().parent.parent / "annotations" / "trimaps" / f"{image.stem}.png"
    return path if os.path.isfile(path) else None  # Path.is_file raises where a name is too long

def unique_names(names):
    """A file name for each: on one line, cut at 200 bytes, and then numbered if it comes again."""
    taken = {}  # {without case: name}: some file systems ignore case
    for name in names:
        stem = escape_nonprintable(name).encode()[:200].decode(errors="ignore")
        numbered = (f"{stem}-{i}" if i > 1 else stem for i in count(1))
        name = next(name for name in numbered if name.casefold() not in taken)
        taken[name.casefold()] = name
    return [*taken.values()]

def verify(dataset):
    """Reads all: (errors {split: [...]}, notes, fractions of pixels by label {split: (255,)})."""
    def inspect(sample):
        labels, notes = read_pair(sample, (32, 32))[1], []
        with open_image(sample.image) as image:
            if image.mode.startswith("I"):
                notes.append(f"images of over 8 bits, white at {white_level(image)}")
        if sample.value_to_label is None and soft_fraction(read_mask_values(sample.mask)):
            notes.append("masks with soft edges, cut at 128")
        target = labels_to_target(torch.from_numpy(labels))
        return notes, np.bincount(target.flatten(), minlength=256)[:IGNORE_INDEX]

    errors, notes, fractions = {}, Counter(), {}
    for split, samples in dataset.splits.items():
        results = list(progress(parallel_map(inspect, samples), f"check {split}", len(samples)))
        errors[split] = [r for r in results if isinstance(r, UserError)]
        good = [r for r in results if not isinstance(r, UserError)]
        notes.update(f"{split}: {note}" for some, _ in good for note in some)
        pixels = sum((counts for _, counts in good), np.zeros(IGNORE_INDEX, int))
        fractions[split] = pixels / max(pixels.sum(), 1)
    return errors, [f"{note} ({n})" for note, n in notes.items()], fractions

# -------------------------------------------------------------------------------------- download
PETS_MD5 = {"images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
            "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f"}

def get_pets(root, url, archives=PETS_MD5, retry_delays=(1, 2, 4, 8, 16)):
    """Downloads and unpacks what is missing of the pets; returns their folder."""
    folder = Path(root) / PETS
    for name, md5 in archives.items():
        archive, content = folder / name, folder / name.removesuffix(".tar.gz")
        if any(content.glob("*")):  # an empty folder is not the data
            continue
        folder.mkdir(parents=True, exist_ok=True)
        download(f"{url.rstrip('/')}/{name}", archive, retry_delays)
        if hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            archive.unlink()
            raise DownloadError(f"{archive} with a wrong checksum is deleted; try again, or --url")
        with atomic_path(content) as new, tarfile.open(archive) as tar:
            tar.extractall(new.parent, filter="data")  # refuses what would leave the folder
            os.rename(new.parent / content.name, new)
        archive.unlink()
    return folder

def find_data(choice, root, url):
    """The folder that --data means, downloaded or drawn if need be."""
    if choice not in ("auto", "pets", "toy"):
        return Path(choice)
    with take_lock(root):  # two runs that start together do not download twice
        if choice != "toy":
            try:
                return get_pets(root, url)
            except DownloadError as error:
                if choice == "pets":
                    raise
                warnings.warn(f"the pets are not in {root} and could not be downloaded: {error}.\n"
                              "!!! What follows uses TOY PETS, drawn by this program: its scores\n"
                              "!!! say nothing about photos. For real ones: --data pets or FOLDER.")
        toys = Path(root) / TOYS
        return toys if toys.is_dir() else make_toys(root)

def download(url, path, retry_delays):
    """Downloads to `path`.part, where it goes on after breaks; gives up when the delays end."""
    part, delays = path.with_name(f"{path.name}.part"), iter(retry_delays)
    while not path.exists():
        with open(part, "ab") as file:
            offset, status = file.tell(), 200
            try:
                download_rest(url, file)
            except (ValueError, http.client.InvalidURL) as error:
                raise UserError(f"{url} cannot be used: {error}") from error
            except (OSError, http.client.HTTPException) as error:
                status = getattr(error, "code", 500)
                delays = iter(retry_delays) if file.tell() > offset else delays
                delay = next(delays, None)
                if delay is None or status < 500 and status not in (408, 416, 429):
                    raise DownloadError(f"cannot download {url}: {error}; --url names a mirror")
                time.sleep(delay)
        if status in (200, 416):  # 416: nothing was left to send
            os.replace(part, path)

def download_rest(url, file):
    """Appends to a file what it lacks, in one request."""
    offset = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"})
    with urllib.request.urlopen(request, timeout=30) as response:
        if response.status != 206:  # the server does not know ranges: from the start
            offset = file.seek(0)
            file.truncate()
        length = getattr(response, "length", None)  # neither every server nor file:// says it
        total, title = offset + length if length else None, f"download {Path(file.name).stem}"
        chunks = iter(lambda: response.read1(1 << 18), b"")
        file.writelines(progress(chunks, title, total, offset, unit="MB", scale=1e6, size=len))
    if total and file.tell() < total:
        raise ConnectionError(f"the connection broke after {file.tell()} of {total} bytes")

# ----------------------------------------------------------- errors, safe files, threads, progress
def escape_nonprintable(text):
    """Escapes newlines, undecodable bytes and bidi controls: a file name stays on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

class UserError(Exception):
    """What the user can mend: what is wrong, where, and what to do; then lines of detail."""
    def __str__(self):
        return "\n  ".join(map(escape_nonprintable, self.args))

class ImageError(UserError):
    """An image that is missing or damaged; the caller decides whether to go on without it."""

class DownloadError(UserError):
    """The network or the server failed; `--data auto` then takes the toy pets."""

def seeded_generator(*key):
    """A torch.Generator seeded by a hash of `key`, so that no state need be kept for a resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

@contextlib.contextmanager
def atomic_path(path):
    """Yields a path to write to, renamed to `path` at the end; after an error the old one stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as temporary:
        new = Path(temporary) / "new"
        yield new
        os.replace(new, path)

def write_text(path, text):
    """Writes a text file atomically."""
    with atomic_path(path) as new:
        new.write_text(text, encoding="utf-8")

def write_csv(path, rows):
    """Writes dicts as a CSV file, atomically; a column that a row lacks is empty."""
    with atomic_path(path) as new, open(new, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)

def read_predictions(path):
    """{output name: row} of an earlier predictions.csv."""
    rows = csv.DictReader(path.read_text("utf-8", errors="replace").splitlines())
    return {row["output"]: row for row in rows if {"output", "file"} <= row.keys()}

def format_table(rows):
    """Dicts with the same keys as a Markdown table, the first column left-aligned."""
    styles = {float: "{:.4f}", int: "{:,}", type(None): "-"}
    lines = [[name.replace("_", " ") for name in rows[0]]]
    lines += [[styles.get(type(cell), "{}").format(cell) for cell in row.values()] for row in rows]
    first, *others = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    return "\n".join(f"| {' | '.join((line[0].ljust(first), *map(str.rjust, line[1:], others)))} |"
                     for line in lines)

def take_lock(folder, wait=True):
    """Locks a folder until a `with` block or the process ends, and clears away what killed
    processes left half-written. None: another process has the lock."""
    os.makedirs(folder, exist_ok=True)
    release = contextlib.ExitStack()
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl
        handle = os.open(folder, os.O_RDONLY)
        release.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return release.close()  # None
        for place in ("", "cache", PETS):  # a run within the folder has a lock of its own
            for leftover in Path(folder, place).glob(".part-*"):
                shutil.rmtree(leftover, ignore_errors=True)
    return release

def parallel_map(function, items, threads=None, errors=UserError):
    """Ordered map() on threads, 4 results each in flight; `errors` are yielded, not raised."""
    threads = threads or torch.get_num_threads()
    items, pool = iter(items), ThreadPoolExecutor(threads)
    try:
        pending = deque(pool.submit(function, item) for item in islice(items, 4 * threads))
        while pending:
            future = pending.popleft()
            error = future.exception()  # waits until it is done
            pending.extend(pool.submit(function, item) for item in islice(items, 1))
            yield error if isinstance(error, errors) else future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only what has begun is finished

def log(text, end="\n", every_rank=False):
    """A line on stderr, in place of an unfinished one; of several processes rank 0 writes."""
    if every_rank or os.environ.get("RANK", "0") == "0":
        text = "\n".join(map(escape_nonprintable, text.split("\n")))
        with contextlib.suppress(OSError):  # a log that is full, or closed, ends no run
            print("\r\x1b[K" * sys.stderr.isatty() + text, end=end, file=sys.stderr, flush=True)

def print_result(args, text, result):
    """The result of a command on stdout, as text or as one line of JSON."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result) if args.json else text, flush=True)

def progress(items, title, total, done=0, unit="images", scale=1, size=lambda item: 1):
    """Yields the items, while a line on stderr says how much is done, how fast, and how long it
    will take: redrawn in a terminal; in a log, a line every 30 seconds."""
    terminal, first, start = sys.stderr.isatty(), done, time.monotonic()
    updated = start
    for item in items:
        yield item
        done, now = done + size(item), time.monotonic()
        if now - updated > (0.2 if terminal else 30):
            updated, speed = now, (done - first) / (now - start)
            of = f"{total / scale:,.0f}" if total else "?"
            left = timedelta(0, round((total - done) / speed)) if total else "?"
            log(f"{title}: {done / scale:,.0f} of {of} {unit}, {speed / scale:,.1f}/s, {left} left",
                "" if terminal else "\n")
    log("", "")  # clears the line

# ----------------------------------------------------------------------- masks, overlays, cut-outs
# the colours of classes 1, 2, …: of Okabe and Ito (gray for black), distinct for colour-blind eyes,
# then the same lighter and darker, then all again; the background is black, in overlays untouched
OKABE_ITO = np.array([(213, 94, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
                      (204, 121, 167), (230, 159, 0), (150, 150, 150)])
SHADES = np.concatenate([OKABE_ITO, 255 - (255 - OKABE_ITO) * 0.45, OKABE_ITO * 0.55])
PALETTE = [(0, 0, 0), *map(tuple, SHADES.astype(int).tolist() * 5)]

def to_image(array):
    """A uint8 array as an image; a bool one in white on black."""
    return Image.fromarray(array * np.uint8(255) if array.dtype == bool else np.asarray(array))

def save_image(image, path):
    """Writes an image atomically, in the format that its name ends in; to `-`, stdout, as PNG. Of
    zlib's strategies for PNG, 3 (Z_RLE) takes 10 ms instead of 12 for a cut-out, and less space."""
    options = dict(quality=90, compress_type=3, icc_profile=image.info.get("icc_profile", b""))
    if str(path) == "-":
        return image.save(sys.stdout.buffer, "PNG", **options)
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    if kind == "WEBP" and max(image.size) > 16_383:
        raise UserError(f"{path}: a WebP is at most 16,383 pixels high and wide; take png or jpg")
    image = to_photo(image) if kind == "JPEG" else image  # JPEG has no alpha
    with atomic_path(path) as new:
        image.save(new, kind, **options)

def colorize_mask(mask, class_names):
    """A mask of class indices as an image: white on black, or with the palette of the classes."""
    if len(class_names) == 2:
        return to_image(mask > 0)
    image = to_image(mask)
    image.putpalette(sum(PALETTE[:len(class_names)], ()))
    return image

def overlay(photo, mask, class_names):
    """The photo with each class tinted and its contour drawn, dark beside light on any ground."""
    result, blur = photo.copy(), ImageFilter.BoxBlur(max(1, max(photo.size) / 300))
    for label in [value for _, value in to_image(mask).getcolors() if 0 < value < IGNORE_INDEX]:
        inside = to_image(mask == label)
        contour = inside.filter(blur).point(lambda value: 255 * (6 < value < 249))
        colours = PALETTE[1:9] if len(class_names) == 2 else [PALETTE[label]]
        own = np.array(ImageStat.Stat(photo, inside).mean)
        tint = max(colours, key=lambda colour: np.linalg.norm(colour - own))  # stands out most
        result.paste(tint, mask=inside.point(lambda value: value * 0.5))
        result.paste(inside.convert("RGB"), mask=contour)
    return result

def remove_islands(mask):
    """A bool mask (H, W) without regions under 5% of the largest, and holes under 1% of it."""
    def find_runs(mask):  # where they start and end, as y · stride + x
        return np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2).T

    mask, stride, largest = np.pad(mask, 1), mask.shape[1] + 3, 0  # label 0: outside, no hole
    for value, part in ((True, 0.05), (False, 0.01)):
        regions = mask == value
        starts, ends = find_runs(regions)
        touching, _ = find_runs(regions[1:] & regions[:-1])
        above, below = (np.searchsorted(starts, touching + i, "right") - 1 for i in (0, stride))
        label = np.arange(len(starts))
        while (label[above] != label[below]).any():  # runs that touch take the lower label
            lower = np.minimum(label[above], label[below])
            for run in above, below:
                np.minimum.at(label, label[run], lower)
            label = label[label]
        sizes = np.bincount(label, ends - starts)
        largest = largest or sizes.max(initial=0)
        for run in np.flatnonzero((sizes[label] < part * largest) & (value | (label > 0))):
            y, x = divmod(starts[run], stride)
            mask[y, x:x + ends[run] - starts[run]] = not value
    return mask[1:-1, 1:-1]

def without_islands(probs, threshold):
    """Probabilities (C, h, w) with the foreground's islands and holes corrected."""
    mask = probs[0] >= threshold if len(probs) == 1 else probs.argmax(axis=0) > 0
    clean, result = remove_islands(mask), probs.copy()  # channel 0: pet, or of several background
    result[0] = np.where(clean == mask, probs[0], clean if len(probs) == 1 else ~clean)
    return result

def alpha_from_coefficients(photo, coefficients):
    """Alpha = a · photo + b as an image of one channel, without islands and holes; a and b
    (4, h, w) are the coefficients of a guided filter for values from 0 to 255."""
    (width, height), (_, h, w) = photo.size, coefficients.shape
    alpha, rows = np.empty((height, width), np.uint8), max(1, 2**20 // width)
    for top in range(0, height, rows):  # a million pixels at a time take little memory
        bottom = min(top + rows, height)
        strip, box = (width, bottom - top), (0, top * h / height, w, bottom * h / height)
        *a, b = (np.asarray(Image.fromarray(plane).resize(strip, Image.Resampling.BILINEAR, box))
                 for plane in coefficients)
        pixels = np.asarray(photo.crop((0, top, width, bottom)))
        alpha[top:bottom] = (b + sum(a[i] * pixels[..., i] for i in range(3))).clip(0, 255)
    wrong = (alpha > 127) ^ remove_islands(alpha > 127)
    alpha[wrong] = 255 * (alpha[wrong] < 128)
    own = photo.info["alpha"]  # what was transparent before stays so
    return ImageChops.multiply(to_image(alpha), own) if own else to_image(alpha)

def cutout(photo, alpha, foreground):
    """The photo with an alpha channel. The less opaque a pixel is, the more its colour is that of
    the foreground alone, (h, w, 3), enlarged: none of the old background shines through."""
    result, colours = photo.copy(), to_image(resize(foreground, photo.size[::-1]))
    result.paste(colours, mask=alpha.point(lambda a: min(255, 510 - 2 * a)))
    result.paste("black", mask=alpha.point(lambda a: 255 * (a == 0)))
    result.putalpha(alpha)
    return result

def read_background(text):
    """What --background names: None, "blur", an image, or a colour as an image of one pixel."""
    if text in (None, "blur") or isinstance(text, Image.Image):
        return text
    try:
        return read_image(text) if os.path.isfile(text) else Image.new("RGB", (1, 1), text)
    except ValueError:
        raise UserError(f"--background {text} is no file, no colour (white, '#ff8800'), not blur")

def finish_cutout(image, background=None, crop=False):
    """A cut-out on `background`, which is cropped to fit; `crop` keeps what shows, and a margin."""
    result = image
    if background:
        result = ImageOps.fit(background, image.size)
        result.paste(image, mask=image)
        result.info = image.info
    if crop and (box := image.getchannel("A").point(lambda a: 255 * (a > 25)).getbbox()):
        margin = max(box[2] - box[0], box[3] - box[1]) // 20
        box = np.add(box, [-margin, -margin, margin, margin]).clip(0, [*image.size, *image.size])
        result = result.crop(box.tolist())
    return result

def image_grid(images, columns=2):
    """Images side by side on white."""
    width, height = max(i.width for i in images) + 8, max(i.height for i in images) + 8
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width + 4, i // columns * height + 4))
    return grid

def add_caption(image, text):
    """The image with a line of text above it."""
    result = ImageOps.expand(image, (0, 20, 0, 0), "white")
    ImageDraw.Draw(result).text((0, 2), text, "black", ImageFont.load_default(13))
    return result

def panel(photo, caption, masks, class_names, height=256):
    """A photo beside overlays of masks, {caption: mask}; of several classes with a legend."""
    width = min(max(1, round(height * photo.width / photo.height)), 4 * height)
    photo = photo.resize((width, height), Image.Resampling.BICUBIC)
    tiles = [add_caption(photo, caption)] + [
        add_caption(overlay(photo, resize(mask, (height, width), "NEAREST"), class_names), name)
        for name, mask in masks.items()]
    row = image_grid(tiles, len(tiles))
    if len(class_names) == 2:
        return row
    legend = image_grid([add_caption(Image.new("RGB", (150, 6), colour), name) for name, colour
                         in zip(class_names[1:], PALETTE[1:])], max(1, row.width // 158))
    result = ImageOps.expand(row, (0, 0, 0, legend.height), "white")
    result.paste(legend, (0, row.height))
    return result

def draw_confusion(path, confusion, class_names):
    """A confusion matrix (C, C): each row, a true class, in percent; darker is more."""
    percent = 100 * confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    size, font = 50 * len(class_names), ImageFont.load_default(20)
    draw = ImageDraw.Draw(image := Image.new("RGB", (330 + size, 100 + size), "white"))
    draw.text((20, 20), "rows: true class, columns: predicted, in percent", "black", font)
    for i, name in enumerate(class_names):
        draw.text((290, 95 + 50 * i), f"{name[:24]} {i}", "black", font, anchor="rm")
        draw.text((325 + 50 * i, 58), str(i), "black", font, anchor="mm")
        for j, value in enumerate(percent[i]):
            x, y, shade = 325 + 50 * j, 95 + 50 * i, round(255 - 2 * value)
            draw.rectangle((x - 25, y - 25, x + 25, y + 25), (shade, shade, 255))
            draw.text((x, y), f"{value:.0f}", "white" if shade < 128 else "black", font, "mm")
    save_image(image, path)

OUTPUTS = {"mask": ".png", "overlay": ".jpg", "cutout": ".png", "panel": ".jpg"}  # of `infer`

def is_file_name(out):
    """Whether --out is to be one file: an image's name, or `-` for stdout."""
    return str(out) == "-" or out.suffix.lower() in SUFFIXES

def output_path(out, name, output):
    """Where `infer` writes one output of an image."""
    return out if is_file_name(out) else out / f"{name}_{output}{OUTPUTS[output]}"

# ---------------------------------------------------------------------------------------- curves
LINE_COLORS = [PALETTE[i] for i in (5, 1, 3, 6, 7, 2)]

def draw_plot(draw, left, runs, quantity, metric):
    """Of each run a thin curve for train, a bold one for val, and a circle at the best epoch."""
    right, top, bottom = left + 1040, 130 + 36 * len(runs), 1010  # the legend has a line per run
    columns = ["lr"] if quantity == "lr" else [f"train_{quantity}", f"val_{quantity}"]
    last = max(map(len, runs.values()))
    # what lies outside of the range of the last three quarters is drawn at its border
    first = 0 if quantity == "lr" else last // 4
    values = [row[column] for rows in runs.values() for row in rows[first:] for column in columns]
    low, high = min(values), max(values) + 1e-6

    title = "learning rate" if quantity == "lr" else quantity
    draw.text((left + 520, 66), title, "black", font_size=30, anchor="mt")
    draw.text((left + 520, bottom + 50), "epoch", "black", font_size=24, anchor="mt")
    for y, value in zip(np.linspace(bottom, top, 6), np.linspace(low, high, 6)):
        draw.line([(left, y), (right, y)], "lightgray", 2)
        draw.text((left - 12, y), f"{value:.3f}", "black", font_size=24, anchor="rm")
    for epoch in range(0, last + 1, math.ceil(last / 10)):
        x = left + 1040 * epoch / last
        draw.text((x, bottom + 14), str(epoch), "black", font_size=24, anchor="mt")
    for i, (name, rows) in enumerate(runs.items()):
        colours = LINE_COLORS[:2] if len(runs) == 1 else [LINE_COLORS[i % len(LINE_COLORS)]] * 2
        x, text = [left + 1040 * row["epoch"] / last for row in rows], name[:38]
        for column, colour, width in zip(columns, colours, (4, 7)):
            y = np.interp([row[column] for row in rows], (low, high), (bottom, top))
            draw.line([*zip(x, y)], colour, width, "curve")
            draw.circle((x[-1], y[-1]), width, colour)  # all there is after one epoch
        if quantity != "lr":  # the last column was val's
            best = max(range(len(rows)), key=lambda epoch: rows[epoch][f"val_{metric}"])
            draw.circle((x[best], y[best]), 9, "white", colour, 5)
            text += f", best epoch {rows[best]['epoch']}: {rows[best][column]:.4f}"
        draw.text((left, 116 + 36 * i), text, colour, font_size=24, anchor="lm")

def draw_curves(path, runs, metric="dice"):
    """Loss, a metric and the learning rate by epoch; `runs` is {name: rows of metrics.csv}."""
    image = Image.new("RGB", (3600, 1140), "white")  # larger than the result, for smooth edges
    draw, title = ImageDraw.Draw(image), ", ".join(name[:38] for name in runs)
    draw.text((1800, 10), title, "black", font_size=36, anchor="mt")
    for left, quantity in ((110, "loss"), (1310, metric), (2510, "lr")):
        draw_plot(draw, left, runs, quantity, metric)
    draw.text((1800, 1096), "thin: train, on augmented images; bold: val, the EMA of the weights "
              "on plain images, so it may be better than train", "black", font_size=24, anchor="mt")
    save_image(image.resize((2400, 760), Image.Resampling.LANCZOS), path)

# ---------------------------------------------------------------------------------- the toy pets
# breeds, cats in capitals: width and height of their marks; colours tell nothing, shapes must
COATS = {"Tabby": (7, 60), "Calico": (45, 45), "Smoke": (300, 300),
         "pointer": (11, 11), "collie": (60, 30), "terrier_mix": (3, 3)}
# ellipses by two corners of their boxes, triangles by three points: trunk, head, tail, legs; ears
BODY = [(-0.5, -0.24, 0.5, 0.24), (0.2, -0.52, 0.66, -0.08), (-0.85, -0.2, -0.4, -0.1),
        *((x, 0, x + 0.12, 0.55) for x in (-0.45, -0.3, 0.2, 0.35))]
EARS = {True: [(0.22, -0.4, 0.24, -0.72, 0.38, -0.5), (0.64, -0.4, 0.62, -0.72, 0.48, -0.5)],  # cat
        False: [(0.14, -0.46, 0.28, -0.04), (0.58, -0.46, 0.72, -0.04)]}

def texture(rng, size, width, height):
    """Blobs of about width × height pixels between two colours (H, W, 3)."""
    coarse = math.ceil(size[0] / height) + 1, math.ceil(size[1] / width) + 1
    noise = resize(rng.random(coarse, np.float32), size, "BICUBIC")[..., None].clip(0, 1)
    one, two = rng.uniform(30, 250, (2, 3))
    return one + (two - one) * noise

def draw_toy(number):
    """A toy pet: its breed, photo (an RGB image) and trimap (1 pet, 2 background, 3 border)."""
    rng, breed = np.random.default_rng((0, number)), [*COATS][number % len(COATS)]
    height, width = size = rng.integers(150, 231, 2).tolist()
    photo = texture(rng, size, *rng.choice([2, 7, 30], 2))
    for pet in [False] * rng.integers(3, 8) + [True]:  # things, and last the pet
        shapes = BODY + EARS[breed[0].isupper()] if pet else [(-0.3, -0.15, 0.3, 0.15)]
        blobs = COATS[breed] if pet else rng.choice([2, 7, 30], 2)
        layer = Image.new("L", (2 * width, 2 * height))  # twice the size, for smooth edges
        centre = 2 * np.multiply(rng.uniform(0.3, 0.7, 2) if pet else rng.random(2), size[::-1])
        scale, draw = 2 * min(size) * rng.uniform(0.45, 0.9), ImageDraw.Draw(layer)
        for shape in shapes:
            points = (centre + scale * np.reshape(shape, (-1, 2))).flatten().tolist()
            (draw.ellipse if len(points) == 4 else draw.polygon)(points, 255)
        layer = layer.rotate(rng.normal(0, 12 if pet else 90), center=centre.tolist())
        layer = ImageOps.mirror(layer) if rng.random() < 0.5 else layer
        alpha = np.asarray(layer.reduce(2))[..., None] / 255
        photo += (texture(rng, size, *blobs) - photo) * alpha
    near = np.asarray(to_image(alpha[..., 0] > 0.5).filter(ImageFilter.BoxBlur(2)))
    trimap = np.where(near > 240, 1, np.where(near < 15, 2, 3)).astype(np.uint8)
    return breed, to_image(photo.clip(0, 255).astype(np.uint8)), to_image(trimap)

def make_toys(root, trainval=400, test=100):
    """Draws the toy pets in exactly the pets' layout; returns their folder."""
    folder, total, lines = Path(root) / TOYS, trainval + test, []
    toys = progress(parallel_map(draw_toy, range(total)), "draw toy pets", total)
    with atomic_path(folder) as new:
        (new / "images").mkdir(parents=True)
        (new / "annotations" / "trimaps").mkdir(parents=True)
        for i, (breed, image, trimap) in enumerate(toys):
            name = f"{breed}_{i // len(COATS) + 1}"
            image.save(new / "images" / f"{name}.jpg", quality=90)
            trimap.save(new / "annotations" / "trimaps" / f"{name}.png")
            lines.append(f"{name} {i % len(COATS) + 1} {1 if breed[0].isupper() else 2} 1\n")
        (new / "annotations" / "trainval.txt").write_text("".join(sorted(lines[:trainval])))
        (new / "annotations" / "test.txt").write_text("".join(lines[trainval:]))
    return folder
