"""petseg.py: the command line and the loops: train, evaluate, use.

Read from top to bottom: the command line, several processes, what is said to the user, the scores,
the learning-rate schedules, checkpoints, and then one function for each subcommand, `train` first.

What it reaches on two CPU cores (AMD EPYC with bfloat16, torch 2.13.0; seed 0, --weight-decay 0;
the pets' runs were scored with the mirror image afterwards, which adds a second an epoch):
    train unet --epochs 11             valid Dice 0.9098 on the pets in 4:17
    train resnet34_unet --epochs 18    valid Dice 0.9084 on the pets in 7:49
    train unet --epochs 232            valid Dice 0.9372 in 2:37:56 (one core, its decay 0.005);
                                       0.9387 with --resume RUN --epochs 380, 4:58 in all, and
                                       0.9409 with all VIEWS instead of the mirror image alone
    train unet --data toy              test Dice 0.9679 in 0:54
    train resnet34_unet --data toy     test Dice 0.9482 in 1:12
"""
import argparse
import os
import sys
from pathlib import Path

# --------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says in one line what is wrong."""

    def error(self, message):
        self.exit(2, f"petseg: {message}; see {self.prog} --help\n")


def number(kind, low, high=1e30):
    """What an option may be: a whole number (`kind` int) or any (float) within bounds."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            words = f"a {'whole ' if kind is int else ''}number from {low}"
            words += f" to {high}" if high < 1e30 else " up"
            raise argparse.ArgumentTypeError(f"expected {words}, not {text!r}")
        return value
    return parse


CHANGES = {"flip": (0, 1), "vflip": (0, 1), "rotate": (0, 180), "zoom": (1, 10), "aspect": (1, 3),
           "shift": (0, 1), "brightness": (0, 1), "contrast": (0, 1), "saturation": (0, 1),
           "mix": (0, 1)}  # of --augment, bounds
AUGMENT = {"none": {}, "flip": {"flip": 0.5},
           "full": {"flip": 0.5, "rotate": 20, "zoom": 1.4, "shift": 0.1,
                    "brightness": 0.3, "contrast": 0.3, "saturation": 1.0}}
AUGMENT["strong"] = AUGMENT["full"] | {"zoom": 1.7, "aspect": 1.16, "mix": 0.5}


def changes(text):
    """--augment as {change: strength}: a set that has a name, or as in rotate=15,flip=0.5."""
    found = {}
    for part in text.split(",") if text not in AUGMENT else ():
        name, _, value = part.partition("=")
        if name not in CHANGES:
            raise argparse.ArgumentTypeError(f"expected {', '.join(AUGMENT)}, or some of "
                                             f"{', '.join(CHANGES)} as in rotate=15,flip=0.5, not "
                                             f"{text!r}")
        found[name] = number(float, *CHANGES[name])(value)
    return AUGMENT.get(text, found)


def size(text):
    """--size as (height, width): S, or HxW."""
    sides = [int(word) if word.isdecimal() else 0 for word in text.lower().split("x")]
    if len(sides) > 2 or not all(32 <= side <= 2**15 for side in sides):
        raise argparse.ArgumentTypeError(f"expected a side from 32 to {2**15} as in 128, or height "
                                         f"and width as in 256x512, not {text!r}")
    return sides[0], sides[-1]


POSITIVE, SEED = number(int, 1, 2**31), number(int, 0, 2**63 - 1)
SHARE, AMOUNT = number(float, 0, 1), number(float, 0)
MODELS = ("unet", "resnet34_unet")
WEIGHTS = Path(__file__).with_name("weights") / "unet.pt"  # where --ckpt is left out
PETS_URL = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
# Every option: its default, what is allowed, and help. First those of a run, which are kept in its
# folder; a default of None depends on machine and data, see `settings`. To add one, add a line and
# read run.NAME where it matters.
OPTIONS = {
    "data": ("auto", str, "auto (the pets, or else the toys), pets, toy, or a folder"),
    "root": ("data", str, "where data is kept"),
    "epochs": (None, POSITIVE, "times through the training pictures: 20, for the toys 16 or 20"),
    "batch": (None, POSITIVE, "pictures at a time, of all processes: 16, or 32 on a GPU"),
    "size": (None, size, "S or HxW in pixels: 128, or 256 on a GPU"),
    "width": (None, POSITIVE, "channels of the first level: 64 on a GPU, else 16 (unet) or 32"),
    "up": ("transpose", ("transpose", "bilinear"), "how the decoder doubles the size"),
    "init": (None, str, "a best.pt whose weights to begin with, instead of random ones"),
    "dropout": (0.0, SHARE, "at the bottom of the U"),
    "loss": ("bce_dice", ("bce_dice", "bce", "dice"), "the loss function"),
    "optimizer": ("muon", ("muon", "adamw", "adam"), "the optimizer"),
    "lr": (None, AMOUNT, "the learning rate's peak: 0.02 for muon, else 0.004"),
    "weight_decay": (0.005, AMOUNT, "share of the rate by which weights shrink (not for adam)"),
    "schedule": ("cosine", ("cosine", "constant", "plateau", "exponential", "inverse_sqrt"),
                 "of the learning rate"),
    "warmup": (0.15, SHARE, "share of the run that warms up, for cosine and inverse_sqrt"),
    "gamma": (0.99, SHARE, "factor an epoch, for exponential"),
    "clip": (1.0, AMOUNT, "largest norm of the gradient, 0 for no limit"),
    "accumulate": (1, POSITIVE, "batches that make up one step"),
    "ema": (0.99, SHARE, "how much the weights' moving average keeps at a step, 0 for none"),
    "augment": (None, changes, "random changes: full (for the toys flip, from 100 epochs on "
                "strong), none, or strengths as in rotate=15,flip=0.5"),
    "augment_prob": (1.0, SHARE, "share of the pictures that is changed"),
    "grow": (0.85, SHARE, "share of the epochs with smaller pictures, which train faster"),
    "repeat": (1, POSITIVE, "times a picture appears in an epoch"),
    "border": ("foreground", ("foreground", "background", "ignore", "random", "class"),
               "what the trimap's border is while training; class: one of its own"),
    "classes": ("pet", ("pet", "species"), "of the pets: pet, or cat and dog"),
    "cityscapes_classes": ("19", ("19", "30"), "the benchmark's, or all"),
    "class_weights": ("auto", ("auto", "none", "inverse", "sqrt"), "in the cross-entropy: none, or "
                      "one over a class's share of the pixels, or the root of that; auto: sqrt "
                      "where there are more than two classes"),
    "compile": (False, bool, "use torch.compile"),
    "recompute": (False, bool, "keep less for the backward pass: less memory, a quarter more time"),
    "precision": ("auto", ("auto", "bf16", "fp32"), "auto: bfloat16 where the hardware has it"),
    "seed": (0, SEED, "of every random draw"),
    "save_every": (0, number(int, 0), "also keep a numbered checkpoint every so many epochs"),
    "checkpoint_minutes": (5.0, AMOUNT, "save inside an epoch too, so often; 0 for never"),
}
OTHERS = {
    "json": (False, bool, "end with the result as one JSON object"),
    "resume": (None, str, "go on with the run in this folder, or with auto the newest unfinished "
               "one of the same options, else a new one; only --epochs, --device, --save-every, "
               "--checkpoint-minutes, --data and --root may change"),
    "out": (None, str, "where the results go"),
    "ckpt": (WEIGHTS, Path, "the best.pt of a run"),
    "threshold": (0.5, SHARE, "probability that makes a pet"),
    "tta": (True, bool, "average with what the picture mirrored and in other sizes gives"),
    "device": ("auto", ("auto", "cpu", "cuda", "mps"), "what computes"),
    "url": (PETS_URL, str, "a mirror to download the pets from"),
    "split": ("test", ("train", "valid", "test"), "the pictures that are scored"),
    "save": (None, str, "some of mask,overlay,cutout,panel"),
    "max_pixels": (100_000_000, POSITIVE, "pictures of more pixels are refused"),
    "skip_existing": (False, bool, "leave out the pictures whose results are there already"),
    "trainval": (400, POSITIVE, "toys to train with"),
    "test": (100, POSITIVE, "toys to test with"),
    "rounds": (3, POSITIVE, "measurements of each way, of which the median"),
    "layers": (False, bool, "instead: each layer's time, and how near its limit"),
    "memory": (None, number(float, 0.1), "instead: the largest batch in so many GB"),
    "grid": (False, bool, "instead: images/s over batch sizes and sides"),
    "growth": (False, bool, "instead: images/s from ten times as much data"),
    "scaling": (False, bool, "instead: images/s of several processes, and what they exchange"),
    "only": (None, str, argparse.SUPPRESS),
}


def command_line():
    """All that can be typed. An option of a run that is not typed is None, unless its command has a
    default of its own: so a resumed run can tell what is asked of it."""
    parser = Parser(prog="petseg.py", description="Segments pets from photos, pixel by pixel.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, *options, **defaults):
        sub = commands.add_parser(name, help=text, description=text)
        for option in ("json", *options):
            usual, kind, what = OPTIONS.get(option) or OTHERS[option]
            default = defaults.get(option, None if option in OPTIONS else usual)
            shown = default or (usual if name == "train" else None)
            switch = argparse.BooleanOptionalAction if usual else "store_true"
            how = {"action": switch} if kind is bool else (
                {"choices": kind} if isinstance(kind, tuple) else {"type": kind})
            what += f" ({shown})" if shown and kind is not bool else ""
            sub.add_argument(f"--{option.replace('_', '-')}", default=default, help=what, **how)
        return sub.add_argument

    source = ("data", "root", "url", "max_pixels")
    network = ("ckpt", "threshold", "tta", "device", "precision", *source)
    add = command("train", "train from scratch, score the test split, draw the curves",
                  "resume", "out", "device", "url", "max_pixels", *OPTIONS, out="runs")
    add("model", nargs="?", choices=MODELS)
    command("eval", "score a split; a table by breed; the worst images in one picture",
            *network, "split", "out", out="evaluation")
    add = command("infer", "masks, overlays, cut-outs of pictures, or of the test split",
                  *network, "save", "skip_existing", "out", out="predictions")
    add("pictures", nargs="*", metavar="IMAGE|FOLDER")
    add = command("compare", "the curves of several runs in one picture, and a table",
                  "out", out="compare.png")
    add("runs", nargs="+", metavar="RUN")
    add = command("data", "fetch, verify, or draw the data",
                  *source, "classes", "cityscapes_classes", "trainval", "test", "seed",
                  root="data", seed=0, classes="pet", cityscapes_classes="19")
    add("action", nargs="?", choices=("get", "check", "toy"), default="check")
    add = command("summary", "a table of layers: shape, parameters, multiply-adds",
                  "size", "width", "up", size=(256, 256), width=64, up="transpose")
    add("model", choices=MODELS)
    command("export", "a network as one file that is used without petseg: .pt2 (torch), .onnx",
            "ckpt", "out", out="model.pt2")
    add = command("bench", "images per second and peak memory: the plain loop and this one",
                  *source, "device", "precision", "size", "width", "batch", "recompute", "rounds",
                  "layers", "memory", "grid", "growth", "scaling", "only", data="toy")
    add("model", choices=MODELS)
    return parser


# The words are read before torch, whose import takes a second: help and typing errors come at once.
ARGS = command_line().parse_args() if __name__ == "__main__" else None

import copy
import csv
import ctypes
import errno
import fcntl
import hashlib
import importlib.util
import io
import json
import logging
import math
import pickle
import platform
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import warnings
import zipfile
from contextlib import contextmanager
from datetime import datetime, timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import interpolate as resize

import data
import layers
from data import Problem

# ------------------------------------------------------------------------------- several processes
# torchrun starts this program once for each GPU, or as often as it is told, on one machine or on
# many, and starts all anew when one is lost. Where a single process runs, nothing here does a thing


def fresh(store, number, of):
    """A part of the launcher's store without what is left there from before a restart, where the
    addresses of processes that are gone would be taken for true. It has a name that process 0 makes
    up and tells each other under that one's own; torchrun's count of restarts would not do, for
    each machine counts its own."""
    name = own = os.urandom(8).hex()
    if number:
        store.set(f"waiting {number}", own)
        name = store.get(f"answer to {own}").decode()  # as soon as it is there
        store.add(name, 1)
        return dist.PrefixStore(name, store)
    while store.add(name, 0) < of - 1:
        for other in range(1, of):
            if store.check([f"waiting {other}"]):
                store.set(f"answer to {store.get(f'waiting {other}').decode()}", name)
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def join():
    """Meets the other processes that torchrun has started, if it was torchrun that started this."""
    if not dist.is_torchelastic_launched():
        return
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    store, number, of = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", rank=number, world_size=of,
                            store=fresh(store, number, of),
                            timeout=timedelta(hours=1))  # as long as data may take


def rank():
    """The number of this process, from 0 on. Number 0 alone speaks, and writes into a run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(tensor, how=dist.ReduceOp.SUM):
    """The sum of a tensor over all processes, which takes its place."""
    if world() > 1:
        dist.all_reduce(tensor, how)
    return tensor


def agreed(*numbers):
    """The largest of each number over all processes, so that all of them do the same."""
    return total(torch.tensor(numbers), dist.ReduceOp.MAX).tolist()


def of_first(thing):
    """What process 0 has given for `thing`."""
    box = [thing]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def of_each(thing):
    """What each process has given for `thing`, in their order."""
    box = [thing] * world()
    if world() > 1:
        dist.all_gather_object(box, thing)
    return box


@contextmanager
def in_turn():
    """Process 0 goes first, then the first of each other machine, then all others: they find on
    disk what those have fetched and built, whether the machines share it or not."""
    turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for _ in range(turn):
        agreed(0)
    yield
    for _ in range(turn, 2):
        agreed(0)


def shared(network, device):
    """The network as all processes train it together: each of them gets the mean of the gradients
    of all; on GPUs batch norms go by the pictures of all."""
    if world() == 1:
        return network
    if device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    together = torch.nn.parallel.DistributedDataParallel(network)
    together.broadcast_buffers = False  # process 0's; `level` takes the mean of all
    return together


def level(network):
    """Makes the statistics of batch norms, on CPUs of each process's own pictures, those of all."""
    statistics = [each for each in network.buffers() if each.is_floating_point()]
    if world() > 1 and statistics:
        mean = total(torch.cat(statistics)) / world()
        for each, part in zip(statistics, mean.split([len(each) for each in statistics])):
            each.copy_(part)


# --------------------------------------------------------------------- what is said to the user


def say(text, who=0):
    """A line of progress or warning, on stderr, in place of an unfinished one."""
    if rank() == who:
        print(("\r\x1b[K" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)


def answer(args, text, result, path=None):
    """The result, on stdout: as text for people, or as one line of JSON; and in the file `path`."""
    if rank() == 0:
        if path:
            data.write_json(path, result)
        print(json.dumps(result) if args.json else text, flush=True)


def table(rows):
    """Dicts of the same names as columns of text, the first to the left, numbers to the right."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.4f}"
        return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)

    lines = [[name.replace("_", " ") for name in rows[0]]]
    lines += [[cell(value) for value in row.values()] for row in rows]
    wide = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(wide[0])] + [c.rjust(w) for c, w in
                               zip(line[1:], wide[1:])]) for line in lines)


def clock(seconds):
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Line:
    """A line on stderr that renews itself in a terminal; in a log, a line each half minute."""

    def __init__(self):
        self.terminal = sys.stderr.isatty()
        self.shown = time.monotonic()

    def due(self):
        """Whether it is time to show something again."""
        return rank() == 0 and time.monotonic() - self.shown > (0.2 if self.terminal else 30)

    def show(self, text):
        if self.due():
            self.shown = time.monotonic()
            print(f"\r{text}\x1b[K" if self.terminal else text, file=sys.stderr, flush=True,
                  end="" if self.terminal else "\n")


def progress(what, unit="images", scale=1):
    """A function (done, total) that shows how far something is, how fast, and the time left."""
    line, began, first = Line(), time.monotonic(), None

    def report(done, total):
        nonlocal first
        first = done if first is None else first
        seconds = max(time.monotonic() - began, 1e-6)
        speed = (done - first) / seconds
        text = f"{what}: {done / scale:,.0f} of {total / scale:,.0f} {unit}"
        if done >= total:
            say(f"{text}, {clock(seconds)}")
        else:
            left = clock((total - done) / speed) if speed else "?"
            line.show(f"{text}, {speed / scale:,.1f} {unit}/s, {left} left")

    return report


# ----------------------------------------------------------------------------------------- scores


def decide(probabilities, threshold=0.5):
    """The class of each pixel, (B, C, H, W) to (B, H, W): the likeliest, or of two, told by one
    channel, class 1 from `threshold` on."""
    if probabilities.shape[1] == 1:
        return (probabilities[:, 0] >= threshold).byte()
    return probabilities.argmax(dim=1).byte()


def confusion(mask, target, classes=2):
    """Per image, how many pixels of each true class (rows) were taken for each (columns):
    (B, classes, classes). Pixels of target 255 are left out."""
    truth = torch.where(target == 255, classes, target.long())  # a row more, cut off below
    image = torch.arange(len(target), device=target.device).view(-1, 1, 1)
    places = (image * (classes + 1) + truth) * classes + mask
    counts = places.new_zeros(len(target) * (classes + 1) * classes)
    counts.scatter_add_(0, places.flatten(), places.new_ones(1).expand(places.numel()))
    return counts.view(-1, classes + 1, classes)[:, :-1]


def dice_and_iou(counts):
    """Dice and IoU of each class, (B, C) each, from confusions (B, C, C): 2 tp / (2 tp + fp + fn)
    and tp / (tp + fp + fn); 1 where nothing was to be found and nothing was."""
    tp = counts.diagonal(dim1=1, dim2=2)
    wrong = counts.sum(dim=1) + counts.sum(dim=2) - 2 * tp
    empty = tp + wrong == 0
    return (2 * tp + empty) / (2 * tp + wrong + empty), (tp + empty) / (tp + wrong + empty)


def scores(counts, classes):
    """All scores of a split from its images' confusions (N, C, C). With two classes "dice" is the
    mean over images of that of class 1, and the dataset's are those of all pixels as if they were
    one image. With more, "dice" and "iou" are the means over the classes that occur, each from the
    confusion of all pixels; the foreground's leave out class 0."""
    counts = counts.double()
    total = counts.sum(dim=0, keepdim=True)
    dice, iou = dice_and_iou(total)
    rest = {"accuracy": (total.diagonal(dim1=1, dim2=2).sum() / total.sum().clamp(min=1)).item(),
            "images": len(counts)}
    if len(classes) == 2:
        image_dice, image_iou = dice_and_iou(counts)
        tp, taken, true = total[0, 1, 1], total[0, :, 1].sum(), total[0, 1].sum()
        return {"dice": image_dice[:, 1].mean().item(), "iou": image_iou[:, 1].mean().item(),
                "dataset_dice": dice[0, 1].item(), "dataset_iou": iou[0, 1].item(),
                "precision": (tp / taken).item() if taken else 1.0,
                "recall": (tp / true).item() if true else 1.0, **rest}
    share = total[0].sum(dim=1) / total.sum().clamp(min=1)
    there = (total[0].sum(dim=0) + total[0].sum(dim=1) > 0).tolist()
    rows = [{"class": name, "dice": dice[0, i].item(), "iou": iou[0, i].item(),
             "share": share[i].item()} for i, name in enumerate(classes) if there[i]]
    front = rows[there[0]:] or rows
    means = {f"{part}{name}": sum(row[name] for row in of) / max(len(of), 1)
             for part, of in (("", rows), ("foreground_", front)) for name in ("dice", "iou")}
    return {**means, **rest, "classes": rows}


def score_table(split, found):
    """The scores of a split as text: of all, and where there are many, of each class."""
    means = table([{"split": split} | {k: v for k, v in found.items() if k != "classes"}])
    return f"{table(found['classes'])}\n\n{means}" if "classes" in found else means


SHOWN = {"dice": "Dice", "iou": "IoU"}


def measure(classes):
    """The score that counts: the best epoch is that of the highest."""
    return "dice" if len(classes) == 2 else "iou"


# ------------------------------------------------------------- the course of a run: sides and rates


def scaled(size, part):
    """A part of a size, in multiples of 16, which the networks halve without rest, from 32 on."""
    return size if part == 1 else tuple(max(32, 16 * round(side * part / 16)) for side in size)


def size_of_epoch(run, epoch):
    """The size of the training pictures: half of it in the first two thirds of the share `grow` of
    the epochs, three quarters in the last third, then all of it, in the last epoch at the latest.
    Valid pictures always have their full size. For as many pixels as three epochs have, UNet has a
    valid Dice of 0.891 on the pets with it, 0.873 without (two seeds)."""
    done = epoch / run.epochs
    part = 1 if done > run.grow or epoch == run.epochs else 0.75 if done > run.grow * 2 / 3 else 0.5
    return scaled(run.size, part)


def share_done(run, epoch, part):
    """The share of a run, measured in pixels, that is done after a `part` of an epoch."""
    pixels = [math.prod(size_of_epoch(run, each)) for each in range(1, run.epochs + 1)]
    return (sum(pixels[:epoch - 1]) + part * pixels[epoch - 1]) / sum(pixels)


# Each schedule gives the learning rate from the run's settings, the share of the run that is done,
# and the valid score of the epochs so far. None has a memory of its own.


def constant(run, done, valid):
    """The same rate always."""
    return run.lr


def cosine(run, done, valid):
    """Up in a straight line for the share `warmup` of the run, then to 0 along half a cosine."""
    if done <= run.warmup:
        return run.lr * done / run.warmup
    return run.lr * 0.5 * (1 + math.cos(math.pi * (done - run.warmup) / (1 - run.warmup)))


def plateau(run, done, valid):
    """Halved whenever the valid score has not risen for three epochs, but never under 1e-6."""
    rate, best, waited = run.lr, -1.0, 0
    for score in valid:
        best, waited = (score, 0) if score > best else (best, waited + 1)
        if waited == 3:
            rate, waited = max(rate * 0.5, min(1e-6, run.lr)), 0
    return rate


def exponential(run, done, valid):
    """Multiplied by `gamma` after each epoch."""
    return run.lr * run.gamma ** len(valid)


def inverse_sqrt(run, done, valid):
    """Up with the square of the share `warmup`, then down with one over the root of the share."""
    warm = max(run.warmup, 0.001)
    return run.lr * min((done / warm) ** 2, math.sqrt(warm / done))


SCHEDULES = {"constant": constant, "cosine": cosine, "plateau": plateau,
             "exponential": exponential, "inverse_sqrt": inverse_sqrt}

# ------------------------------------------------------------------------------------------- Muon


def orthogonal(matrices, dtype=torch.bfloat16):
    """About the nearest matrix to each of (N, rows, columns) whose singular values are all one.

    Newton's and Schulz's X ← (a + b S + c S²) X with S = X Xᵀ drives each singular value towards
    one and leaves the singular vectors alone; these a, b, c do so fast, to between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # S is then the smaller product
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

    def factor(square):
        return torch.baddbmm(square, square, square, beta=b, alpha=c) + a * identity

    for _ in range(2):
        # two rounds at once, on the small S alone: 60% of the time of four rounds one by one; all
        # four at once would let rounding in S grow too far
        square = x @ x.mT
        first = factor(square)
        x = factor(first @ square @ first) @ first @ x
    x = x.float()
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum that is made orthogonal before it is taken as a step (K. Jordan and others, 2024,
    https://kellerjordan.github.io/posts/muon/). A convolution's weights are a matrix, (outputs,
    taps · inputs). Gradients change a few of its directions much and most hardly at all; made
    orthogonal, a step changes all of them alike, so what is rarely seen is learned as fast.
    On the pets UNet has a valid Dice of 0.873 after three epochs, with AdamW 0.847 (two seeds).
    """

    def __init__(self, weights, decay=0.0, dtype=torch.bfloat16, momentum=0.95):
        super().__init__(weights, {"lr": 0.0, "turn": 0})  # what state_dict is to carry
        self.decay, self.dtype, self.momentum = decay, dtype, momentum

    @torch.no_grad()
    def step(self):
        # every other weight has its turn, for a step of twice the size: half the work (an epoch of
        # ResNet34-UNet takes 13% less time, of UNet 4%), for about the same valid Dice (0.878 both;
        # UNet 0.894 instead of 0.896; a seed each)
        [group] = self.param_groups
        group["turn"] = 1 - group["turn"]
        alike = {}  # the weights of each shape, orthogonalised together
        for number, weight in enumerate(group["params"]):
            if weight not in self.state:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            memory = self.state[weight]["momentum"]
            memory.mul_(self.momentum).add_(weight.grad)
            if number % 2 == group["turn"]:
                nesterov = weight.grad.add(memory, alpha=self.momentum)
                matrix = nesterov.permute(0, 2, 3, 1).flatten(1)  # as it lies in memory
                alike.setdefault(matrix.shape, []).append((weight, matrix))
        for (rows, columns), pairs in alike.items():
            weights, matrices = zip(*pairs)
            rate = 2 * group["lr"] * math.sqrt(max(1, rows / columns))
            for weight, change in zip(weights, orthogonal(torch.stack(matrices), self.dtype)):
                seen = weight.mul_(1 - 2 * group["lr"] * self.decay).permute(0, 2, 3, 1)
                seen.sub_(change.view_as(seen), alpha=rate)


# -------------------------------------------------------------------------- machine, data, network


def pick_device(name):
    """The device asked for, or the best there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(kind for kind, here in there.items() if here)
    if not there[name]:
        raise Problem(f"this machine has no {name} device that torch can use; try --device cpu")
    return torch.device(name)


def settle_memory(device):
    """Sets how this process asks Linux for memory; elsewhere there is nothing to set."""
    if device.type != "cpu" or sys.platform != "linux":
        return
    # who asks for more than there is would be killed without a word; within this limit the request
    # fails, and `main` can say what to lower
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * memory), hard))
    # what is freed stays ours, or else the kernel clears new pages for each tensor: a step of UNet
    # takes 250 ms instead of 300, of ResNet34-UNet 212 instead of 235 (16 images, two cores)
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # as glibc's malloc.h numbers them
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_mmap_threshold, 2**24)  # larger ones go back: less memory
    # what one thread has freed another takes: three pictures of 100 megapixels, 1.8 GB, not 2.4
    mallopt(m_arena_max, 1)


PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_precision(name, device):
    """"bf16" or "fp32"; by itself bfloat16 where the hardware multiplies it faster."""
    if name in PRECISIONS:
        return name
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability()[0] >= 8
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                         or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast else "fp32"


def find_data(choice, root, url):
    """The folder that --data means, fetched or drawn if it has to be; returns (its name, it)."""
    if choice not in ("auto", "pets", "toy"):
        return "".join(c if c.isalnum() else "-" for c in Path(choice).resolve().name), Path(choice)
    pets, toys = Path(root) / data.PETS, Path(root) / data.TOYS
    if choice != "toy":
        try:  # what is there already is not fetched again
            return "pets", data.get_pets(root, url, progress)
        except data.DownloadFailed as failure:
            if choice == "pets":
                raise
            say(f"!!! The pets are not in {pets} and could not be fetched: {failure}.\n"
                "!!! What follows uses TOY PETS, drawn by this program: its scores say nothing\n"
                "!!! about real photos. For the real pets: petseg.py data get, or --data FOLDER.")
    if not toys.is_dir():
        data.make_toys(root, progress("draw toy pets"))
    return "toy", toys


def look(folder, root, known):
    """Understands a folder of labelled pictures, as a run of the settings `known` does."""
    source = data.look(folder, Path(root) / "cache", progress("masks"), known["classes"],
                       known["cityscapes_classes"], known["drawn"])
    for note in source.notes:
        say(f"note: {note}")
    return source


def open_split(source, split, size, root):
    """A split from the cache, with a warning about pictures that are left out."""
    what = f"cache {split} at {size[0]}×{size[1]}"
    found = data.open_split(source, split, size, Path(root) / "cache", progress(what))
    if found.skipped:
        say(f"warning: {len(found.skipped)} pictures of {split} are missing or unreadable and are "
            "left out; the first: " + "; ".join(found.skipped[:5]))
    return found


def build(about):
    """The network that a checkpoint describes, in channels-last memory. Two classes have one logit,
    more have one each."""
    number = len(about["classes"])
    if not 2 <= number <= 101:  # the border may be one more
        raise ValueError(f"it tells {number} classes apart")
    network = layers.MODELS[about["model"]](classes=number if number > 2 else 1,
                                            width=about["width"], up=about["up"],
                                            dropout=about["dropout"])
    return network.to(memory_format=torch.channels_last)


class Segmenter:
    """A copy of a network made for prediction, with all that it takes to use it; what happens to
    the network later does not touch it. `about` is what best.pt says beside the weights."""

    def __init__(self, network, about, precision, threshold=0.5, tta=True):
        self.device = network.head.weight.device
        # 3% faster than batch norms of their own and autocast, a single photo 10%
        self.network = layers.folded(network, PRECISIONS[precision])
        self.about, self.threshold, self.tta = about, threshold, tta


# how else a picture is seen for prediction: in which part of its size, and whether mirrored. The
# mirror image gains 0.003 to 0.005 of valid Dice (14 runs), the two other sizes 0.0005 to 0.003
# more (9 runs; most where training was long), for twice the work
VIEWS = ((1, True), (0.75, False), (1.25, True))


@torch.inference_mode()
def predict(segmenter, images):
    """Images (B, 3, H, W) in 0..1 to logits (B, C, H, W) in fp32; with `tta` those of the mean of
    the probabilities that the picture and its VIEWS give."""
    network, about = segmenter.network, segmenter.about
    x = data.normalise(images, about["mean"], about["std"])

    def seen(view):
        return network(view.to(network.head.weight.dtype)).float()

    logits, size = seen(x), x.shape[2:]
    if segmenter.tta:
        total = layers.probabilities(logits)
        for part, mirrored in VIEWS:
            view = resize(x, scaled(tuple(size), part), mode="bilinear", antialias=True)
            found = seen(view.flip(3)).flip(3) if mirrored else seen(view)
            total += resize(layers.probabilities(found), size, mode="bilinear")
        mean = total / (1 + len(VIEWS))
        logits = mean.logit(eps=1e-6) if mean.shape[1] == 1 else mean.clamp(min=1e-6).log()
    return logits


def class_names(source, border):
    """The classes that a network tells apart."""
    return source.classes + ["border"] if border == "class" else source.classes


def true_classes(about, labels):
    """Labels to what a network is scored against: the border counts as what it is the border of."""
    border = "class" if about["border"] == "class" else "foreground"
    return data.targets(labels, border, classes=len(about["classes"]))


def score_split(segmenter, split, batch=32, loss=layers.bce_dice_loss, weights=None):
    """Predicts a whole split; returns its mean loss and the confusion of each image (N, C, C)."""
    number, classes = len(split.names), len(segmenter.about["classes"])
    lost = torch.zeros((), device=segmenter.device)
    counts = torch.zeros(number, classes, classes, dtype=torch.long, device=segmenter.device)
    for start in range(rank(), number, batch * world()):
        mine = slice(start, start + batch * world(), world())  # each process takes its share
        images, labels = data.load(split, torch.arange(number)[mine], segmenter.device)
        target, logits = true_classes(segmenter.about, labels), predict(segmenter, images)
        lost += loss(logits, target, weights) * len(images)
        mask = decide(layers.probabilities(logits), segmenter.threshold)
        counts[mine] = confusion(mask, target, classes)
    return float(total(lost)) / number, total(counts).cpu()


def score_images(counts):
    """The score of each image by itself: the Dice of class 1 where there are two classes, else the
    mean IoU of the classes that occur in the image (0 where every pixel is void)."""
    dice, iou = dice_and_iou(counts)
    if dice.shape[1] == 2:
        return dice[:, 1]
    there = counts.sum(dim=1) + counts.sum(dim=2) > 0
    return (iou * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)


def draw_samples(path, segmenter, split, chosen):
    """A gallery of photo | truth | prediction of the `chosen` pictures of a split."""
    images, labels = data.load(split, chosen, segmenter.device)
    classes = segmenter.about["classes"]
    masks = decide(layers.probabilities(predict(segmenter, images)), segmenter.threshold)
    target = true_classes(segmenter.about, labels)
    found = score_images(confusion(masks, target, len(classes))).tolist()
    truths = torch.where(target == data.VOID, 0, target).cpu().numpy()
    panels = [data.panel(data.picture(split.images[i]), truths[k], masks[k].cpu().numpy(),
                         f"{split.names[i]}  {SHOWN[measure(classes)]} {found[k]:.3f}", classes,
                         side=160)
              for k, i in enumerate(chosen)]
    data.save_picture(data.gallery(panels), path)


# ------------------------------------------------------------------------------------ checkpoints


SEAL = (32).to_bytes(2, "little")  # the comment's length: it is the SHA-256 of all before it


def write_checkpoint(content, path):
    """Writes a checkpoint so that at any moment the old or the new one stands there, whole. It goes
    by way of memory because torch.save would hide a full disk behind an error of its own."""
    memory = io.BytesIO()
    torch.save(content, memory)
    archive = memory.getvalue()[:-2]  # less the length of the comment that a zip file may end with
    data.write(path, archive + SEAL + hashlib.sha256(archive).digest(), sync=True)


def save_network(path, network, about, made):
    """What it takes to use a network, in half precision, and how it was made and did. The batch
    norms stay as they are: they are few, and in a long run variances go beyond half's 65504."""
    weights = {name: value.half() if value.dim() > 1 else value
               for name, value in network.state_dict().items()}
    write_checkpoint({**about, "weights": weights, "trained": made}, path)


# what makes up a checkpoint of each kind: names and, by an example, types
CHECKPOINTS = {
    "network": {"model": "unet", "width": 16, "up": "transpose", "dropout": 0.0, "size": (128, 128),
                "classes": [""], "border": "foreground", "mean": data.MEAN, "std": data.STD,
                "weights": {}, "trained": {"data": "pets", "root": "data", "command": "",
                                           "classes": "pet", "cityscapes_classes": "19",
                                           "drawn": {"": [""]}}},
    "training": {"settings": {}, "pictures": [], "network": {}, "average": {}, "optimizers": [],
                 "epoch": 1, "step": 0, "history": [], "sums": {}, "counts": torch.empty(0),
                 "seconds": 0.0},
}
CALLED = {"network": "best.pt", "training": "last.pt"}
# what zipfile and torch raise at files that were damaged or made to do harm
HOSTILE = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, LookupError,
           TypeError, AttributeError, AssertionError, ArithmeticError, EOFError, MemoryError,
           struct.error)


def alike(value, example):
    """Whether a value has the type of the example, and all that the example has; of a list each,
    and of a dict whose one name is empty."""
    if not isinstance(value, type(example)):
        return False
    if isinstance(example, dict) and "" in example:
        return all(alike(each, example[""]) for each in value.values())
    if isinstance(example, dict):
        return all(name in value and alike(value[name], each) for name, each in example.items())
    if isinstance(example, list):
        return all(alike(each, kind) for kind in example for each in value)
    return not isinstance(example, tuple) or (
        len(value) == len(example) and all(map(alike, value, example)))


def read_checkpoint(path, kind, device):
    """Reads a checkpoint of the `kind` "network" (best.pt) or "training" (last.pt), or refuses it.
    Nothing in it is executed, and no more is read than the file is long."""
    content, name = None, CALLED[kind]
    path = Path(path) / name if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise Problem(f"there is no checkpoint {path}; name the {name} of a run")
    try:
        stored = np.memmap(path, mode="r")
        archive, seal, digest = stored[:-34], stored[-34:-32].tobytes(), stored[-32:].tobytes()
        if seal == SEAL and hashlib.sha256(archive).digest() == digest:  # else a bit has flipped
            with zipfile.ZipFile(path) as file:
                parts = file.infolist()
            # torch.save packs nothing: what would unpack to more than there is was made to do harm
            if sum(part.file_size for part in parts) <= len(stored) and not any(
                    part.compress_type or part.compress_size != part.file_size for part in parts):
                content = torch.load(path, map_location=device, weights_only=True)
    except HOSTILE:
        pass  # torch's own words are left out: they tell how to read a file that may hold code
    if alike(content, {"petseg": ""}) and content["petseg"] in CALLED and content["petseg"] != kind:
        raise Problem(f"{path} is the {CALLED[content['petseg']]} of a run; this needs its {name}")
    if not alike(content, {"petseg": kind, **CHECKPOINTS[kind]}) or content["petseg"] != kind:
        raise Problem(f"{path} is damaged, or is not what this needs, the {name} of a petseg run")
    return content


def fill(network, weights, path):
    """Puts the weights of the checkpoint at `path` into a network, if they are its own and finite.
    A network on the device "meta", which has shapes and no numbers, takes them as they are."""
    needed = {name: each.shape for name, each in network.state_dict().items()}
    if needed != {name: getattr(each, "shape", None) for name, each in weights.items()}:
        raise Problem(f"the weights in {path} are of another network than this: another model, "
                      "number of classes, width or way up")
    if not all(each.isfinite().all() for each in weights.values()):
        raise Problem(f"the weights in {path} are not all finite; take another checkpoint")
    weights = {name: each.float() if each.is_floating_point() else each
               for name, each in weights.items()}
    network.load_state_dict(weights, assign=network.head.weight.is_meta)


def load_segmenter(path, device, precision, threshold=0.5, tta=True):
    """The network of a best.pt, ready to predict."""
    device = pick_device(device)
    settle_memory(device)
    about = read_checkpoint(path, "network", device)
    try:
        if min(about["size"]) < 32:
            raise ValueError(f"its pictures are {about['size']} high and wide")
        with torch.device("meta"):  # an absurd width then takes no memory
            network = build(about)
    except (LookupError, ValueError, RuntimeError) as error:
        raise Problem(f"{path} describes a network that does not exist: {error}") from error
    fill(network, about.pop("weights"), path)
    network.to(device, memory_format=torch.channels_last)
    if threshold != 0.5 and len(about["classes"]) > 2:
        raise Problem(f"--threshold is for two classes; the network of {path} has more, of which "
                      "each pixel gets the likeliest")
    return Segmenter(network, about, pick_precision(precision, device), threshold, tta)


# ------------------------------------------------------------------------------------------ train

MAY_CHANGE = ("epochs", "save_every", "checkpoint_minutes", "data", "root")  # by `--resume`


def typed(args):
    """The network and the options of a run that were typed."""
    return {name: value for name, value in vars(args).items()
            if name in ("model", *OPTIONS) and value is not None}


def settings(args, device, toy):
    """Every option of a run: what was typed, else the default that fits machine and data."""
    run = {"model": args.model, **{name: default for name, (default, *_) in OPTIONS.items()},
           "drawn": {}, "command": shlex.join(["petseg.py", *sys.argv[1:]])}
    if device.type == "cpu":
        run |= {"size": (128, 128), "batch": 16, "width": 16 if args.model == "unet" else 32}
    else:
        run |= {"size": (256, 256), "batch": 32, "width": 64}
    chosen = typed(args)
    if "init" in chosen:
        begun = read_checkpoint(chosen["init"], "network", device)
        run |= {name: begun[name] for name in ("width", "up", "size")}
        run["command"] += f", begun with the weights of {begun['trained']['command']}"
    run |= {"epochs": 16 if toy and args.model == "unet" else 20, **chosen}
    # the more steps a run takes, the more its pictures should vary. Some hundred, on the toys: test
    # Dice of UNet 0.962 with flips alone, 0.941 with everything (by AdamW, a run each). On the pets
    # UNet has a valid Dice of 0.9098 with `full` and 0.8970 with `strong` after 11 epochs, 0.9337
    # with `full` after 265 and 0.9372 with `strong` after 232 (a run each, `full` without decay)
    if run["augment"] is None:
        run["augment"] = AUGMENT["flip" if toy else "strong" if run["epochs"] >= 100 else "full"]
    if run["lr"] is None:
        run["lr"] = 0.02 if run["optimizer"] == "muon" else 0.004
    run["precision"] = pick_precision(run["precision"], device)
    return argparse.Namespace(**run)


def read_state(folder):
    """The state in which a run was left: its last.pt or, where that cannot be read, the checkpoint
    before it."""
    before = folder / "previous.pt"
    try:
        return read_checkpoint(folder / "last.pt", "training", "cpu")
    except Problem as problem:
        say(f"warning: {problem}; trying the one before it, {before}")
    try:
        return read_checkpoint(before, "training", "cpu")
    except Problem as problem:
        raise Problem(f"{problem}; if there is a best.pt, train MODEL --init {folder / 'best.pt'} "
                      "begins a new run with its weights") from problem


def lock(folder):
    """Keeps every other process from training in a folder for as long as this one lives: the
    kernel lets go of the lock when it ends, however it ends."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(f"another process is training in {folder}; stop it, or wait for its end")


def resume(args, folder):
    """What `start_or_resume` returns for a run that was begun before."""
    if not folder.is_dir():
        raise Problem(f"there is no run {folder} to resume; name a folder in {args.out}")
    lock(folder)
    for leftover in folder.glob(".part-*"):  # what a kill kept from being renamed
        shutil.rmtree(leftover)
    state = read_state(folder)
    usual = {name: default for name, (default, *_) in OPTIONS.items()}  # for options newer than it
    run = argparse.Namespace(**usual | state["settings"])
    for name, value in typed(args).items():
        if value == "auto" and name in ("data", "precision"):  # settled when the run began
            continue
        if name in MAY_CHANGE:
            if name == "epochs" and value != run.epochs:
                run.command += f", resumed with --epochs {value}"
            setattr(run, name, value)
        elif value != getattr(run, name):
            raise Problem(f"the run was begun with {name.replace('_', '-')} {getattr(run, name)}, "
                          f"not {value}; a resumed run keeps it; without --resume a new one starts")
    return folder, run, state


def find_unfinished(run, out):
    """The newest folder in `out` of a run with the same options that has not come to its end."""
    same = {name: value for name, value in vars(run).items()
            if name not in ("root", "save_every", "checkpoint_minutes", "command", "drawn")}
    same = json.loads(json.dumps(same))  # as config.json has it, without tuples
    configs = sorted(Path(out).glob("*/config.json"), key=os.path.getmtime, reverse=True)
    for folder in (config.parent for config in configs):
        last, results = folder / "last.pt", [folder / "valid.json", folder / "test.json"]
        # results older than last.pt are from before the run was resumed with more epochs
        if last.exists() and not any(path.exists() and path.stat().st_mtime >= last.stat().st_mtime
                                     for path in results):
            config = json.loads((folder / "config.json").read_text())
            if {name: config.get(name) for name in same} == same:
                return folder


def start_or_resume(args, device):
    """Returns the run's folder, its settings, and its last checkpoint (None at the start)."""
    if args.resume not in (None, "auto"):
        folder = Path(args.resume)
        return resume(args, folder.parent if folder.name == "last.pt" else folder)
    if not args.model:
        raise Problem("say which network to train: petseg.py train unet, or train resnet34_unet")
    if args.compile and args.recompute:
        raise Problem("--compile and --recompute do not go together; leave one of them out")
    name, _ = find_data(args.data or "auto", args.root or "data", args.url)
    run = settings(args, device, toy=name == "toy")
    run.data = name if run.data == "auto" else run.data
    if args.resume:
        if folder := find_unfinished(run, args.out):
            return resume(args, folder)
        say(f"--resume auto: no unfinished run of these options is in {args.out}; a new one starts")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(args.out) / f"{name}-{run.model}-{stamp}-{os.urandom(2).hex()}", run, None


def describe(run, device):
    """How a run is made: every option as resolved, and what it runs on."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                                capture_output=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        commit = ""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        names = re.findall(r"model name\s*: (.*)", cpu) or [platform.processor()]
        machine = f"{names[0]}, {torch.get_num_threads()} threads"
    return {**vars(run), "device": str(device), "machine": machine, "commit": commit or None,
            "system": platform.platform(), "python": platform.python_version(),
            "torch": str(torch.__version__)}


def make_optimizers(run, network):
    """The optimizers, which share the weights among them; the rates are set before each step."""
    # fused: one pass over all weights, 7 ms instead of 11 in a step of ResNet34-UNet on two cores
    if run.optimizer != "muon":  # AdamW without decay is Adam
        decay = run.weight_decay if run.optimizer == "adamw" else 0.0
        return [torch.optim.AdamW(network.parameters(), weight_decay=decay, fused=True)]
    # Muon is for matrices between layers: not for the head, biases, scales of batch norms
    inner = [*network.encoder.parameters(), *network.decoder.parameters()]
    matrices = [weight for weight in inner if weight.dim() == 4]
    others = [weight for weight in inner if weight.dim() != 4] + [*network.head.parameters()]
    # where no bfloat16 is built in, as on Ice Lake, it takes Muon 3.2 times as long as fp32
    return [Muon(matrices, run.weight_decay, PRECISIONS[run.precision]),
            torch.optim.AdamW([{"params": others, "share": 0.3}], fused=True, betas=(0.9, 0.99),
                              weight_decay=0.0)]


SUMS = ("loss", "images", "skipped")  # of an epoch so far
MOST_SKIPPED = 10  # steps of an epoch, before the run is given up


def train_step(run, network, optimizers, split, group, epoch, step, classes=2, weights=None):
    """One step of the optimizers on the pictures `group`, a batch at a time, of which each process
    takes its share; returns SUMS of it and the confusion of each picture, of all processes. Every
    random draw depends on (seed, epoch, step, rank) alone. A step whose gradients are not finite is
    left out."""
    device, size = next(network.parameters()).device, size_of_epoch(run, epoch)
    lost = torch.zeros((), device=device)
    counts = torch.zeros(len(group), classes, classes, dtype=torch.long, device=device)
    torch.manual_seed(data.generator("dropout", run.seed, epoch, step, rank()).initial_seed())
    for part, start in enumerate(range(0, len(group), run.batch)):
        mine = slice(start + rank(), start + run.batch, world())  # a share of each batch
        random = data.generator("augment", run.seed, epoch, step, part, rank())
        images, labels = data.load(split, group[mine], device)
        if not len(images):  # of the last pictures none was left for this process: it adds zeros
            network(images).sum().backward()
            continue
        if run.augment or size != run.size:
            images, labels = data.augment(images, labels, random, size, run.augment_prob,
                                          **run.augment)
        target = data.targets(labels, run.border, random, classes)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            logits = network(data.normalise(images))
        loss = layers.LOSSES[run.loss](logits, target, weights)
        # the gradients become the mean over all processes
        (loss * (len(images) * world()) / len(group)).backward()
        lost += loss.detach() * len(images)
        counts[mine] = confusion(decide(layers.probabilities(logits.detach())), target, classes)
    level(network)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), run.clip or math.inf)
    usable = norm.isfinite().item()
    for optimizer in optimizers:
        if usable:
            optimizer.step()
        optimizer.zero_grad()
    if not usable:
        return lost.new_tensor((0, 0, 1)), torch.zeros_like(counts)
    return torch.stack((total(lost), *lost.new_tensor((len(group), 0)))), total(counts)


def class_shares(source, split, about):
    """The share of each class in the pixels of a split that count; says what was understood."""
    counts = torch.zeros(256, dtype=torch.long)
    for part in np.array_split(split.labels, len(split.labels) // 256 + 1):
        target = true_classes(about, torch.from_numpy(np.array(part)))
        counts += torch.bincount(target.flatten(), minlength=256)
    names, void = about["classes"], counts[data.VOID] / counts.sum()
    shares = counts[:len(names)].double() / counts[:len(names)].sum()
    numbers = ", ".join(f"{len(each):,} {name}" for name, each in source.splits.items())
    say(f"{source.folder}: {source.layout}; {numbers}; "
        + ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares.tolist()))
        + (f"; void {void:.1%} of the pixels" if void else ""))
    for name, share in zip(names, shares.tolist()):
        if not share:
            say(f"warning: the class {name} never occurs in the training pictures: it cannot be "
                "learned")
    return shares


def class_weights(run, shares):
    """How much a pixel of each class counts in the cross-entropy; one on average over classes."""
    # CamVid's valid mean IoU after the same 28 passes: 0.660 with sqrt, 0.578 without (a run each)
    auto = 0.5 if len(shares) > 2 else 0
    power = {"none": 0, "sqrt": 0.5, "inverse": 1, "auto": auto}[run.class_weights]
    weights = torch.where(shares > 0, 1 / shares.clamp(min=1e-9) ** power, 0)
    return (weights / weights[shares > 0].mean()).float()


@torch.no_grad()
def follow(average, network, keep, steps):
    """The moving average of the weights, and of the batch norms' statistics: after each step it
    keeps the share `keep` of itself, less while there is little to remember."""
    keep = min(keep, (1 + steps) / (10 + steps))
    for mean, value in zip(average.state_dict().values(), network.state_dict().values()):
        if mean.is_floating_point():  # not the counter of a batch norm, which nothing reads
            mean.lerp_(value, 1 - keep)


def score_and_draw(segmenter, split, gallery):
    """The confusion of each image of a split, and a picture of the twelve worst."""
    _, counts = score_split(segmenter, split)
    worst = score_images(counts).argsort(stable=True)[:12]
    if rank() == 0:
        draw_samples(gallery, segmenter, split, worst.numpy())
    return counts


def finish(args, folder, run, history, source):
    """Scores the test split (valid, where there is none) with best.pt as a user will load it."""
    with in_turn():
        segmenter = load_segmenter(folder / "best.pt", args.device, run.precision)
        about, name = segmenter.about, [*source.splits][-1]
        split = open_split(source, name, run.size, run.root)
    found = scores(score_and_draw(segmenter, split, folder / "worst.png"), about["classes"])
    trained, score = about["trained"], f"valid_{measure(about['classes'])}"
    result = {"run": str(folder), "split": name, "epoch": trained["epoch"], score: trained[score],
              "seconds": sum(row["seconds"] for row in history), **found}
    answer(args, f"{folder}: best epoch {result['epoch']}, {score.replace('_', ' ')} "
           f"{trained[score]:.4f}\n{score_table(name, found)}", result, folder / f"{name}.json")


def listen():
    """A list of the signals that come from now on, which only ask, and what they did before. A
    second Ctrl-C does not wait for an answer."""
    stop = []

    def ask(number, _):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return stop, {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}


def train(args):
    """Trains a network from scratch, or goes on with a run; scores it; leaves all in its folder."""
    torch.backends.cudnn.deterministic = True  # the same seed gives the same weights
    device = pick_device(args.device)
    settle_memory(device)
    if agreed(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))[0] and not args.resume:
        args.resume = "auto"  # torchrun has lost a process, and started all of them again
    folder, run, state = of_first(start_or_resume(args, device) if rank() == 0 else None)
    with in_turn():
        source = look(find_data(run.data, run.root, args.url)[1], run.root, vars(run))
        run.drawn = source.drawn
        train_set = open_split(source, "train", run.size, run.root)
        valid_set = open_split(source, "valid", run.size, run.root)

    about = {"petseg": "network", "model": run.model, "width": run.width, "up": run.up,
             "dropout": run.dropout, "size": run.size, "border": run.border,
             "classes": class_names(source, run.border), "mean": data.MEAN, "std": data.STD}
    classes, score = len(about["classes"]), measure(about["classes"])
    weights = class_weights(run, class_shares(source, train_set, about)).to(device)
    train_set = data.onto(train_set, device)
    torch.manual_seed(run.seed)
    network = build(about).to(device)
    if run.init and not state:
        fill(network, read_checkpoint(run.init, "network", device)["weights"], run.init)
    network.recompute = run.recompute
    average = copy.deepcopy(network) if run.ema else network
    together = shared(network, device)
    compiled = torch.compile(together) if run.compile else together
    optimizers = make_optimizers(run, network)

    share = max(1, run.batch // world())  # of a batch, for each process
    images, per_step = len(train_set.names) * run.repeat, run.batch * run.accumulate
    per_epoch = math.ceil(images / per_step)
    epoch, step, history, seconds = 1, 0, [], 0.0
    sums = torch.zeros(len(SUMS), device=device)
    counts = torch.zeros(images, classes, classes, dtype=torch.long, device=device)
    if state:
        if state["pictures"] != train_set.names:
            raise Problem(f"the training pictures in {source.folder} are not those that {folder} "
                          "was begun with; make them so again, or start anew without --resume")
        fill(network, state["network"], folder)
        fill(average, state["average"], folder)
        for optimizer, memory in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(memory)
        epoch, step, history, seconds = (state[k] for k in ("epoch", "step", "history", "seconds"))
        sums += torch.tensor([state["sums"][name] for name in SUMS], device=device)
        counts[:len(state["counts"])] = state["counts"]
    elif rank() == 0:
        folder.mkdir(parents=True)
        lock(folder)
    config = {**describe(run, device), "labels": about["classes"], "processes": world()}

    def save_state():
        if not all(weight.isfinite().all() for weight in network.parameters()):
            give_up("the weights are no longer finite")
        if rank() == 0:
            data.write_json(folder / "config.json", config)
            last, new = folder / "last.pt", folder / "next.pt"
            write_checkpoint({
                "petseg": "training", "settings": vars(run), "pictures": train_set.names,
                "network": network.state_dict(), "average": average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers], "epoch": epoch,
                "step": step, "history": history, "sums": dict(zip(SUMS, sums.tolist())),
                "counts": counts[:step * per_step].clone(), "seconds": seconds}, new)
            if last.exists():
                os.replace(last, folder / "previous.pt")
            os.replace(new, last)
        return time.monotonic()

    def give_up(why):
        raise Problem(f"{why} in epoch {epoch}; the last good checkpoint is kept in {folder}; try "
                      "a lower --lr, --clip 1, or --precision fp32")

    saved = save_state()  # a run can be resumed from its start on, and a full disk shows at once
    say(f"{'resuming' if state else 'training'} {folder} on {device}\n"
        + f"{world()} processes: together batch {run.batch} × {run.accumulate}, rate {run.lr}\n"
        * (world() > 1)
        + ", ".join(f"{name} {value}" for name, value in vars(run).items() if name != "drawn"))
    line = Line()

    stop, usual = listen()
    while epoch <= run.epochs:
        began = time.monotonic() - seconds
        network.train()
        size = size_of_epoch(run, epoch)
        groups = data.shuffled(len(train_set.names), run.repeat, run.seed, epoch).split(per_step)
        for step in range(step, per_epoch):
            seconds = time.monotonic() - began
            overdue = time.monotonic() - saved > 60 * (run.checkpoint_minutes or math.inf)
            asked, overdue = agreed(max(stop, default=0), overdue)
            if asked or overdue:
                saved = save_state()
            if asked:
                say(f"petseg: stopped in epoch {epoch} and saved; to go on: "
                    f"petseg.py train --resume {folder}")
                raise SystemExit(128 + asked)
            done = share_done(run, epoch, (step + 0.5) / per_epoch)  # half of this step is done
            rate = SCHEDULES[run.schedule](run, done, [row[f"valid_{score}"] for row in history])
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("share", 1)
            group, at = groups[step], step * per_step
            found, counts[at:at + len(group)] = train_step(
                run, compiled, optimizers, train_set, group, epoch, step, classes, weights)
            sums += found
            if run.ema:
                follow(average, network, run.ema, (epoch - 1) * per_epoch + step)
            if line.due() or step + 1 == per_epoch:  # to read the sums makes a GPU wait: seldom
                now, (loss, seen, skipped) = time.monotonic(), sums.tolist()
                if skipped > MOST_SKIPPED or not seen:
                    give_up(f"{skipped:.0f} steps had gradients that were not finite")
                loss /= seen
                speed = min((step + 1) * per_step, images) / (now - began)
                left = (now - began) / (done - share_done(run, epoch, 0)) * (1 - done)
                line.show(f"epoch {epoch}/{run.epochs}  {size[0]}×{size[1]}  "
                          f"step {step + 1}/{per_epoch}"
                          f"  loss {loss:.4f}  {speed:.0f} images/s  {clock(left)} left")

        segmenter = Segmenter(average, about, run.precision)
        valid_loss, found = score_split(segmenter, valid_set, share, layers.LOSSES[run.loss],
                                        weights)
        if not math.isfinite(valid_loss):
            give_up(f"the valid loss became {valid_loss}")
        valid = scores(found, about["classes"])
        # what was left out has no counts
        trained = scores(counts[counts.sum(dim=(1, 2)) > 0].cpu(), about["classes"])
        best = all(valid[score] > row[f"valid_{score}"] for row in history)
        history.append({
            "epoch": epoch, "height": size[0], "width": size[1], "train_loss": loss,
            "train_dice": trained["dice"], "train_iou": trained["iou"], "valid_loss": valid_loss,
            "valid_dice": valid["dice"], "valid_iou": valid["iou"], "lr": rate,
            "skipped": int(skipped), "seconds": time.monotonic() - began,
            "images_per_second": speed})
        say(f"epoch {epoch}/{run.epochs}  train loss {loss:.4f} {SHOWN[score]} "
            f"{trained[score]:.4f}  valid loss {valid_loss:.4f} {SHOWN[score]} "
            f"{valid[score]:.4f}{' *' if best else '  '}  "
            f"{clock(time.monotonic() - began)}, {speed:.0f} images/s"
            + (f", {skipped:.0f} steps left out: gradients not finite" if skipped else ""))
        made = {**history[-1], **config, "seconds": sum(row["seconds"] for row in history)}
        if rank() == 0:
            # last.pt comes last: killed before it, the epoch is done again and writes the same
            if best or not (folder / "best.pt").exists():
                save_network(folder / "best.pt", average, about, made)
            if run.save_every and epoch % run.save_every == 0:
                save_network(folder / f"epoch-{epoch}.pt", average, about, made)
            data.write_table(folder / "metrics.csv", history)
            data.draw_curves(folder / "curves.png", {folder.name: history}, score)
            shown = np.unique(np.linspace(0, len(valid_set.names) - 1, 8).astype(int))
            draw_samples(folder / "samples.png", segmenter, valid_set, shown)
        epoch, step, seconds = epoch + 1, 0, 0.0
        sums.zero_()
        counts.zero_()
        saved = save_state()
    for number, handler in usual.items():
        signal.signal(number, handler)
    for number in stop:  # it came after the last step; the run is saved
        signal.raise_signal(number)
    finish(args, folder, run, history, source)


# ------------------------------------------------------------------- eval, infer, compare, data


def choose_data(args, segmenter):
    """The data that --data and --root name, or else that the network was trained on; its root."""
    trained = segmenter.about["trained"]
    root = args.root or trained["root"]
    folder = find_data(args.data or trained["data"], root, args.url)[1]
    known = trained if args.data in (None, trained["data"]) else trained | {"drawn": {}}
    if not (folder / "annotations").is_dir():
        known = known | {"classes": "pet"}  # the option means nothing but in the pets' layout
    source, classes = look(folder, root, known), segmenter.about["classes"]
    names = class_names(source, segmenter.about["border"])
    if names != classes and not len(names) == len(classes) == 2:  # of two the second is sought
        raise Problem(f"{folder} has the classes {', '.join(source.classes)}, the network "
                      f"{', '.join(classes)}; name other data with --data, or another --ckpt")
    return source, root


def evaluate(args):
    """Scores a split with a trained network: as a whole, by class or by breed, and the worst
    images."""
    with in_turn():
        segmenter = load_segmenter(args.ckpt, args.device, args.precision, args.threshold, args.tta)
        source, root = choose_data(args, segmenter)
        split = open_split(source, args.split, segmenter.about["size"], root)
    classes = segmenter.about["classes"]
    worst = Path(args.out) / f"worst-{args.split}.png"
    counts = score_and_draw(segmenter, split, worst)
    whole = scores(counts, classes)
    result = {"split": args.split, "checkpoint": str(args.ckpt), **whole,
              "trained": segmenter.about["trained"]}
    text = score_table(args.split, whole)
    if classes == ["background", "pet"]:
        breed_of = np.array([name.rpartition("_")[0] for name in split.names])
        breeds = {breed: scores(counts[breed_of == breed], classes)
                  for breed in np.unique(breed_of).tolist()}
        result["breeds"] = breeds
        rows = [{"breed": breed, **found} for breed, found in breeds.items()]
        rows.sort(key=lambda row: row["dice"])
        text = table([*rows, {"breed": f"all of {args.split}", **whole}])
    answer(args, f"{text}\nthe worst images: {worst}", result,
           Path(args.out) / f"{args.split}.json")


AGREEMENT = ("dice", "iou", "own_size_dice", "own_size_iou")  # with a truth, where it is known
ROW = ("file", "output", "share", "left", "top", "right", "bottom", "confidence", *AGREEMENT)


def columns(classes):
    """The columns of the table that `infer` writes: of many classes the share of each as well."""
    return ROW if len(classes) == 2 else (*ROW, *(f"share of {name}" for name in classes))


def infer_one(segmenter, kinds, out, sample, name):
    """Segments one picture and writes its results; returns its row of the table."""
    about = segmenter.about
    labels = data.read_mask(sample.mask, sample.codes) if sample.mask else None
    photo = data.read_image(sample.image, None, labels.shape if sample.mask else None)
    classes, size = about["classes"], photo.size[::-1]
    pixels = torch.from_numpy(data.resized(photo, about["size"])[None]).to(segmenter.device)
    small = layers.probabilities(predict(segmenter, data.floats(pixels))).cpu()

    def agreement(mask, labels):
        target = true_classes(about, torch.from_numpy(labels)[None])
        return confusion(torch.from_numpy(mask)[None], target, len(classes))

    mask, sure, counts = np.empty(size, np.uint8), 0.0, 0
    for rows, large in data.enlarged(small[0].numpy(), size):
        mask[rows] = decide(torch.from_numpy(large)[None], segmenter.threshold)[0].numpy()
        sure += (np.maximum(large, 1 - large) if len(large) == 1 else large.max(axis=0)).sum(
            dtype=float)
        if sample.mask:
            counts = counts + agreement(mask[rows], labels[rows])
    found = [None] * len(AGREEMENT)
    if sample.mask:
        first = agreement(decide(small, segmenter.threshold)[0].numpy(),
                          data.resized(labels, about["size"], "NEAREST"))
        both = scores(first, classes), scores(counts, classes)
        found = [each[what] for each in both for what in ("dice", "iou")]
    shares = [float((mask == label).mean()) for label in range(len(classes))]
    box = data.picture(mask > 0).getbbox() or (None,) * 4
    row = dict(zip(columns(classes), (data.printable(str(sample.image)), name, 1 - shares[0], *box,
                                      sure / mask.size, *found, *shares)))
    truth = None if labels is None else np.where(labels == data.VOID, 0, true_classes(
        about, torch.from_numpy(labels)).numpy())
    for kind in kinds:
        data.save_picture(data.RESULTS[kind](photo, mask, truth, classes),
                          out / f"{name}_{kind}.png")
    return row


def kept_rows(path, names):
    """The rows of an earlier table of `infer`, if there is one, by the names of the outputs."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{name: row[name] for name in names} for row in csv.DictReader(file)]
        for row in rows:
            row |= {name: float(row[name]) if row[name] else None for name in AGREEMENT}
    except FileNotFoundError:
        return {}
    except (KeyError, ValueError, csv.Error) as error:
        raise Problem(f"{path} is not as infer writes it; move it away, or leave out "
                      "--skip-existing") from error
    return {row["output"]: row for row in rows}


def infer_all(segmenter, kinds, out, jobs, rows):
    """Does the jobs, (sample, name) each, adds to `rows` and writes them; returns what failed."""
    # each core takes a picture from file to file: 342 photos of 500×375 in 9 s on two cores, start
    # included; one after the other, with both cores on each network pass, 57 took 8 s
    torch.set_num_threads(1)
    mine, found, failed = jobs[rank()::world()], {}, {}

    def segment(job):
        with data.opened(job[0].image) as image:
            turn = data.turn(image)
        with turn:
            return infer_one(segmenter, kinds, out, *job)

    def write():
        if rank() == 0:
            data.write_table(out / "predictions.csv", [*rows.values(), *found.values()])

    try:
        for (_, name), row in zip(mine, data.ahead(segment, mine, progress("infer"))):
            if isinstance(row, Problem):
                failed[name] = str(row)
                continue
            found[name] = row
            if len(found) % 200 == 0:  # that a kill costs the table no more
                write()
        for rows_of_one, faults_of_one in of_each((found, failed)):
            found, failed = found | rows_of_one, failed | faults_of_one
        found = {name: found[name] for _, name in jobs if name in found}
    except KeyboardInterrupt:
        say("petseg: stopped; all that was written is complete; to go on, give the same command "
            "with --skip-existing")
        raise SystemExit(130)
    finally:
        write()
    rows |= found
    return [failed[name] for _, name in jobs if name in failed]


def infer(args):
    """Finds the pets in pictures of any size and writes what --save names, and a table of all."""
    with in_turn():  # before any of them writes, all know what there is to do
        segmenter = load_segmenter(args.ckpt, args.device, args.precision, args.threshold, args.tta)
        out = Path(args.out)
        classes = segmenter.about["classes"]
        if args.pictures:
            known = "pet" in classes  # only a trimap says by itself what its numbers are
            samples = [data.Sample(path.stem, path, data.find_truth(path) if known else None,
                                   data.PET_CODES) for path in data.find_pictures(args.pictures)
                       if not data.is_result(path, out)]
        else:
            samples = data.samples(choose_data(args, segmenter)[0], "test")
        kinds = (args.save or ("mask,overlay,cutout" if args.pictures else "panel")).split(",")
        if unknown := set(kinds) - set(data.RESULTS):
            raise Problem(f"--save knows {', '.join(data.RESULTS)}, not {', '.join(unknown)}")

        rows = kept_rows(out / "predictions.csv", columns(classes)) if args.skip_existing else {}
        jobs = list(zip(samples, data.unique_names([sample.image for sample in samples])))
        left = [(sample, name) for sample, name in jobs
                if rows.get(name, {}).get("file") != data.printable(str(sample.image))
                or not all((out / f"{name}_{kind}.png").is_file() for kind in kinds)]
        for _, name in left:
            rows.pop(name, None)
    failed = infer_all(segmenter, kinds, out, left, rows)

    number, skipped = len(jobs) - len(failed), len(jobs) - len(left)
    result = {"out": str(out), "images": number, "skipped": skipped, "failed": failed}
    text = f"{number} pictures: {out}" + (f" ({skipped} were there)" if skipped else "")
    asked = [rows[name] for _, name in jobs if name in rows]
    if known := [row for row in asked if row["dice"] is not None]:
        result |= {each: sum(row[each] for row in known) / len(known) for each in AGREEMENT}
        text += (f"\n{len(known)} of known truth: mean Dice {result['dice']:.4f} at the network's "
                 f"size, {result['own_size_dice']:.4f} at their own")
    answer(args, text, result)
    if failed and rank() == 0:
        raise Problem(f"{len(failed)} of {len(jobs)} pictures could not be used: "
                      + "; ".join(failed[:5]))


def compare(args):
    """Draws the curves of several runs into one picture and prints a table of their results."""
    histories, rows, measures = {}, [], set()
    folders = [Path(folder).resolve() for folder in args.runs]
    for folder, name in zip(folders, data.unique_names(folders)):
        if not (folder / "metrics.csv").is_file():
            raise Problem(f"{folder} is no run with a finished epoch: it has no metrics.csv")
        with open(folder / "metrics.csv", newline="") as file:
            history = [{**{column: float(value) for column, value in row.items()},
                        "epoch": int(row["epoch"])} for row in csv.DictReader(file)]
        if not history:
            raise Problem(f"{folder} is no run with a finished epoch: its metrics.csv has no rows")
        config = json.loads((folder / "config.json").read_text())
        score, test = measure(config["labels"]), folder / "test.json"
        best = max(history, key=lambda row: row[f"valid_{score}"])
        histories[name] = history
        measures.add(score)
        rows.append({
            "run": name, "model": config["model"], "width": config["width"],
            "parameters": sum(p.numel() for p in
                              build({**config, "classes": config["labels"]}).parameters()),
            "size": "×".join(map(str, config["size"])), "epochs": len(history),
            "best_epoch": best["epoch"],
            "valid_dice": best["valid_dice"], "valid_iou": best["valid_iou"],
            f"test_{score}": json.loads(test.read_text())[score] if test.is_file() else None,
            "seconds": sum(row["seconds"] for row in history)})
    if len(measures) > 1:
        raise Problem("runs of two classes are not compared with runs of more: they have other "
                      "scores")
    data.draw_curves(args.out, histories, score)
    answer(args, f"{table(rows)}\n{args.out}", {"runs": rows, "picture": args.out})


def manage_data(args):
    """Fetches the pets, draws the toys, or reads all of a data set and says what is wrong in it."""
    root = args.root
    if args.action == "toy":
        folder = data.make_toys(root, progress("draw toy pets"), args.seed, args.trainval,
                                args.test)
    elif args.action == "get":
        folder = data.get_pets(root, args.url, progress)
    elif args.data:
        folder = find_data(args.data, root, args.url)[1]
    else:
        folders = [Path(root) / name for name in (data.PETS, data.TOYS)]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if not folder:
            raise Problem(f"there is nothing in {root} to check; petseg.py data get fetches the "
                          "pets, data toy draws toy pets, --data names a folder")
    source = look(folder, root, vars(args) | {"drawn": {}})
    found = data.check(source, progress)
    faults = [fault for _, bad, _ in found.values() for fault in bad]
    rows = [{"split": split, "pictures": number, "at_fault": len(bad)}
            for split, (number, bad, _) in found.items()]
    shares = [{"class": name, **{split: float(counts[label] / max(counts[:data.VOID].sum(), 1))
                                 for split, (_, _, counts) in found.items()}}
              for label, name in enumerate(source.classes)]
    answer(args, f"{folder}: {source.layout}\n{table(rows)}\n\n{table(shares)}",
           {"folder": str(folder), "layout": source.layout, "classes": source.classes,
            "splits": rows, "shares": shares, "faults": faults, "notes": source.notes})
    if faults:
        raise Problem(f"{len(faults)} pictures of {folder} are at fault: " + "; ".join(faults[:5]))


# -------------------------------------------------------------------------------- summary, bench


def trace(model, width, size, up="transpose"):
    """A row for each innermost layer of a network: its name, input and output (1, C, H, W),
    parameters and multiply-adds, from one pass without numbers."""
    rows = []

    def note(layer, inputs, output):
        macs = 0
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            # a convolution works for each of its outputs, a transposed one for each of its inputs
            places = (output if isinstance(layer, torch.nn.Conv2d) else inputs[0])[0, 0].numel()
            macs = places * layer.weight.numel()
        rows.append({"layer": names[layer], "kind": type(layer).__name__, "input": inputs[0].shape,
                     "output": output.shape, "multiply_adds": macs,
                     "parameters": sum(p.numel() for p in layer.parameters())})

    with torch.device("meta"), torch.no_grad():  # shapes alone: nothing is computed
        network = layers.MODELS[model](width=width, up=up)
        names = {layer: name for name, layer in network.named_modules()}
        for layer in names:
            if not list(layer.children()):
                layer.register_forward_hook(note)
        network(torch.zeros(1, 3, *size))
    return rows


def summary(args):
    """Prints each layer's output, parameters and multiply-adds."""
    rows = [{"layer": row["layer"], "kind": row["kind"],
             "output": "×".join(map(str, row["output"][1:])), "parameters": row["parameters"],
             "multiply_adds": row["multiply_adds"]}
            for row in trace(args.model, args.width, args.size, args.up)]
    total = {name: sum(row[name] for row in rows) for name in ("parameters", "multiply_adds")}
    answer(args, table([*rows, {"layer": "all", "kind": args.model, "output": "", **total}]),
           {"model": args.model, "size": args.size, "width": args.width, **total, "layers": rows})


@torch.no_grad()
def export(args):
    """Writes the network of a best.pt, with its normalisation, as one file that is used without
    petseg: a program of torch.export, or ONNX."""
    out = Path(args.out)
    if out.suffix not in (".pt2", ".onnx"):
        raise Problem(f"{out} is to end in .pt2 (for torch) or .onnx; name it so with --out")
    if out.suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise Problem(f"{out} takes two more packages: pip install onnx onnxscript")
    warnings.simplefilter("ignore")  # torch's words about itself; nothing comes after this command
    logging.disable(logging.WARNING)
    segmenter = load_segmenter(args.ckpt, "cpu", "fp32")
    about, classes = segmenter.about, segmenter.network.head.out_channels
    network = layers.Portable(segmenter.network, about["mean"], about["std"])
    # free to change: a batch of any number, and sides that both networks can halve to the end. From
    # 64 on: torch sees a side of 1, as ResNet34UNet has it at the bottom of 32, as a case by itself
    batch, rows, columns = (torch.export.Dim(name, min=least) for name, least in
                            (("batch", 1), ("rows", 2), ("columns", 2)))
    program = torch.export.export(network, (torch.zeros(2, 3, 64, 96),),
                                  dynamic_shapes=({0: batch, 2: 32 * rows, 3: 32 * columns},))
    notes = json.dumps({name: about[name] for name in ("classes", "size", "mean", "std",
                                                       "trained")})
    if out.suffix == ".pt2":
        memory = io.BytesIO()
        torch.export.save(program, memory, extra_files={"petseg.json": notes})
        content = memory.getvalue()
    else:
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"],
                                 output_names=["probabilities"])
        onnx.model.metadata_props["petseg.json"] = notes
        content = onnx.model_proto.SerializeToString()
    data.write(out, content)
    size = "×".join(map(str, about["size"]))
    answer(args, f"{out}: {about['model']}, input (B, 3, H, W) in 0..1, H and W multiples of 32 "
           f"from 64 up, trained at {size}; output (B, {classes}, H, W), probabilities",
           {"out": str(out), "model": about["model"], "classes": about["classes"],
            "size": about["size"]})


def plain_way(run, samples, device):
    """How it is usually done: fp32, contiguous, each picture read from its file every time and
    augmented by itself. Returns a training step and a prediction, both of a list of indices."""
    layers.TransposedConv.forward = torch.nn.ConvTranspose2d.forward
    network = layers.MODELS[run.model](width=run.width, up=run.up).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=run.lr)

    def tensor(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous().float() / 255

    def step(index):
        pairs = []
        for i in index:
            image, labels = data.read_pair(samples[i], run.size)
            pairs.append(data.augment(tensor(image), torch.tensor(labels)[None],
                                      data.generator(i), **AUGMENT["full"]))
        images, labels = (torch.cat(parts).to(device) for parts in zip(*pairs))
        loss = layers.bce_dice_loss(network(data.normalise(images)), data.targets(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def guess(index):
        images = torch.cat([tensor(data.read_image(samples[i].image, run.size))
                            for i in index]).to(device)
        return (network.eval()(data.normalise(images)).sigmoid() >= 0.5).cpu()

    return step, guess


def this_way(run, split, device):
    """A training step as `train` does it, with its network and optimizer."""
    network = build({**vars(run), "classes": ["background", "pet"]}).to(device)
    network.recompute = run.recompute
    average, optimizers = copy.deepcopy(network), make_optimizers(run, network)
    together = shared(network, device)

    def step(index):
        train_step(run, together, optimizers, split, torch.tensor(index), run.epochs, index[0])
        follow(average, network, run.ema, index[0])

    return step, network, optimizers


def noise_split(number, size, root=None):
    """As many pictures of noise, where speed alone is asked for, mapped from nameless files as
    `data.open_split` maps a split."""
    random = np.random.default_rng(0)
    images, labels = (np.memmap(tempfile.TemporaryFile(dir=root), np.uint8, "w+", 0, shape)
                      for shape in ((number, *size, 3), (number, *size)))
    for array, most in ((images, 256), (labels, 2)):
        for part in np.array_split(array, number // 64 + 1):
            part[:] = random.integers(0, most, part.shape, np.uint8)
    return data.Split([""] * number, images, labels, [])


def wait(device):
    """Until the device is done with all that it was given; a CPU always is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pace(work, run, device, number, steps=12, warm=3):
    """Images per second of `work`, which takes the indices of a batch out of `number` pictures."""
    order = data.shuffled(number, 1 + (warm + steps) * run.batch // number, run.seed, 1).tolist()
    for step in range(-warm, steps):
        if step == 0:
            wait(device)
            began = time.perf_counter()
        at = (step + warm) * run.batch
        work(order[at:at + run.batch])
    wait(device)
    return steps * run.batch / (time.perf_counter() - began)


def peak_memory(device):
    """The most memory that this process has held, in GB; on a GPU its tensors alone."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def own_memory():
    """What this process holds now, in GB, less the files it has mapped, whose pages the kernel
    takes back when it needs them; None where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s*(\d+)", status.read_text() if status.exists() else "")
    return int(found[1]) * 1024 / 1e9 if found else None


def where_time_goes(run, step, network, optimizers, device, number):
    """Milliseconds of each part of a training step, by clocks put around the functions it calls."""
    spent = dict.fromkeys((*NETWORK_PARTS, "reading", "augmentation"), 0.0)

    def clocked(part, function):
        def timed(*args, **kwargs):
            wait(device)
            began = time.perf_counter()
            result = function(*args, **kwargs)
            wait(device)
            spent[part] += time.perf_counter() - began
            return result
        return timed

    data.load, data.augment = clocked("reading", data.load), clocked("augmentation", data.augment)
    network.forward = clocked("forward", network.forward)
    layers.LOSSES[run.loss] = clocked("forward", layers.LOSSES[run.loss])
    torch.Tensor.backward = clocked("backward", torch.Tensor.backward)
    torch.nn.utils.clip_grad_norm_ = clocked("optimizer", torch.nn.utils.clip_grad_norm_)
    for optimizer in optimizers:
        optimizer.step = clocked("optimizer", optimizer.step)
    steps = 12
    whole = run.batch / pace(step, run, device, number, steps, warm=0)
    parts = {part: seconds / steps for part, seconds in spent.items()}
    parts["metrics and the rest"] = whole - sum(parts.values())
    return {part: 1000 * seconds for part, seconds in parts.items()}


NETWORK_PARTS = ("forward", "backward", "optimizer")  # the others are overhead


def matrix_rate(device, precision):
    """Multiply-adds per second of a product of two large matrices."""
    side, times = 2048 if device.type == "cpu" else 8192, []
    a = torch.randn(side, side, device=device).to(PRECISIONS[precision])
    for _ in range(13):
        wait(device)
        began = time.perf_counter()
        a @ a
        wait(device)
        times.append(time.perf_counter() - began)
    return side**3 / np.median(times[3:])


def one_measurement(args, run, device):
    """What `bench` asks of a fresh process: --only plain or petseg, from the data, or a number of
    pictures of noise."""
    if args.only.isdigit():
        settle_memory(device)
        number = int(args.only)
        Path(run.root).mkdir(parents=True, exist_ok=True)
        step, *_ = this_way(run, noise_split(number, run.size, run.root), device)
        steps = min(max(2, 2**22 // (run.batch * math.prod(run.size))), 50)
        return {"train": pace(step, run, device, number, steps), "memory": peak_memory(device),
                "own_memory": own_memory()}
    source = look(find_data(run.data, run.root, args.url)[1], run.root, vars(run))
    if len(source.classes) != 2:
        raise Problem(f"bench measures with two classes; {source.folder} has "
                      f"{len(source.classes)}; name other data with --data")
    if args.only == "plain":
        samples = data.samples(source, "train")
        step, guess = plain_way(run, samples, device)
        return {"train": pace(step, run, device, len(samples)),
                "infer": pace(guess, run, device, len(samples)), "memory": peak_memory(device)}
    settle_memory(device)
    split = data.onto(open_split(source, "train", run.size, run.root), device)
    number = len(split.names)
    step, network, optimizers = this_way(run, split, device)
    segmenter = Segmenter(network, {"mean": data.MEAN, "std": data.STD}, run.precision, tta=False)

    def guess(index):
        images, _ = data.load(split, torch.tensor(index), device)
        return (predict(segmenter, images).sigmoid() >= 0.5).cpu()

    return {"train": pace(step, run, device, number), "infer": pace(guess, run, device, number),
            "memory": peak_memory(device), "matrix_rate": matrix_rate(device, run.precision),
            **where_time_goes(run, step, network, optimizers, device, number)}


def in_fresh_process(processes=0, **options):
    """A measurement in a process of its own, whose peak memory is then that of the measurement, or
    by torchrun in several of one thread each."""
    words, threads = [__file__, *sys.argv[1:], "--json"], {}
    words += [f"--{name}={value}" for name, value in options.items()]
    if processes:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                 *words]
        threads = {"OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, *words], capture_output=True, text=True,
                           env=os.environ | threads)
    if child.returncode:
        said = child.stderr.strip().splitlines() or ["it was killed, most likely for its memory"]
        said = [line for line in said if line.startswith("petseg: ")] or said
        raise Problem(said[-1].removeprefix("petseg: "))
    return json.loads(child.stdout.splitlines()[-1])


def in_turns(rounds, cases):
    """What fresh processes find, a list for each case: by turns, so that no case has the machine's
    better hour. A case is what `in_fresh_process` is given."""
    found, line = [[] for _ in cases], Line()
    for turn in range(rounds):
        for case, results in zip(cases, found):
            line.show(f"round {turn + 1} of {rounds}: "
                      + ", ".join(f"{name} {value}" for name, value in case.items()))
            results.append(in_fresh_process(**case))
    return found


def median(results, key="train"):
    """The median of what several measurements found."""
    return float(np.median([result[key] for result in results]))


def bench_ways(args, run, device):
    """The plain way against this one, against the machine's arithmetic, and the parts of a step."""
    find_data(run.data, run.root, args.url)  # fetched or drawn before the clocks run
    ways = ("plain", "petseg")
    rounds = dict(zip(ways, in_turns(args.rounds, [{"only": way} for way in ways])))
    found = {way: {key: median(rounds[way], key) for key in rounds[way][0]} for way in ways}
    plain, petseg = found["plain"], found["petseg"]
    compared = [{args.model: label, **{way: found[way][key] for way in ways},
                 "ratio": petseg[key] / plain[key]}
                for key, label in (("train", "train, images/s"), ("infer", "infer, images/s"),
                                   ("memory", "peak memory, GB"))]
    macs = sum(row["multiply_adds"] for row in trace(args.model, run.width, run.size))
    rate = petseg["matrix_rate"]
    # the backward pass is two more convolutions for each: for its input and for its weights
    share = {"train": 3 * macs * petseg["train"] / rate, "infer": macs * petseg["infer"] / rate}
    parts = {part: petseg[part] for part in petseg if part not in {*plain, "matrix_rate"}}
    whole = sum(parts.values())
    overhead = 1 - sum(parts[part] for part in NETWORK_PARTS) / whole
    rows = [{"part_of_a_step": part, "ms": ms, "share": ms / whole} for part, ms in parts.items()]
    text = (f"{table(compared)}\n\nmatrix products: {rate / 1e9:,.0f} G multiply-adds a "
            f"second; of that training reaches {share['train']:.0%}, inference "
            f"{share['infer']:.0%}\n\n{table(rows)}\n"
            f"all but forward, backward and optimizer: {overhead:.1%}")
    return text, {**found, "multiply_adds": macs, "share": share, "overhead": overhead,
                  "rounds": rounds}


def bench_layers(args, run, device):
    """Each layer by itself, forward and backward: its time, its share of the arithmetic limit."""
    network = build({**vars(run), "classes": ["background", "pet"]}).to(device)
    rows, seen = [], {}
    rate = matrix_rate(device, run.precision)
    for row in trace(args.model, run.width, run.size):
        layer, shape = network.get_submodule(row["layer"]), (run.batch, *row["input"][1:])
        x = torch.randn(shape, device=device, dtype=PRECISIONS[run.precision])
        x = x.to(memory_format=torch.channels_last)
        x.requires_grad = bool(rows)  # no gradient goes beyond the first layer

        def forward(_):
            with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                return layer(x)

        def both(_):
            y = forward(_)
            inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
            torch.autograd.grad(y, inputs, torch.ones_like(y))

        kind = (row["kind"], shape, row["output"], row["parameters"])
        if kind not in seen:  # the same layer at another place takes the same time
            seen[kind] = [run.batch / pace(work, run, device, run.batch, steps=8)
                          for work in (forward, both)]
        ahead, whole = seen[kind]
        macs = run.batch * row["multiply_adds"]
        rows.append({"layer": row["layer"], "kind": row["kind"], "input": "×".join(map(str, shape)),
                     "forward_ms": 1000 * ahead, "backward_ms": 1000 * (whole - ahead),
                     "forward_limit": macs / ahead / rate,
                     "backward_limit": 2 * macs / max(whole - ahead, 1e-9) / rate})
    total = sum(row["forward_ms"] + row["backward_ms"] for row in rows)
    for row in rows:
        row["share_of_time"] = (row["forward_ms"] + row["backward_ms"]) / total
    rows.sort(key=lambda row: -row["share_of_time"])
    return table(rows), {"layers": rows, "matrix_rate": rate}


def bench_memory(args, run, device):
    """The largest batch that trains within a budget of memory."""
    peaks, line = {}, Line()

    def fits(batch):
        line.show(f"batch {batch}")
        try:
            peaks[batch] = in_fresh_process(only=batch, batch=batch)["memory"]
        except Problem:
            if batch == 1:
                raise
            peaks[batch] = math.inf  # not enough memory
        return peaks[batch] <= args.memory

    if not fits(1):
        raise Problem(f"a single picture takes {peaks[1]:.2f} GB; lower --size or --width, or try "
                      "--recompute")
    # the largest batch known to fit, the smallest known not to, and between them a guess: each
    # further picture takes about what those before it took
    low, high, guess = 1, math.inf, 4
    while high - low > 1:
        low, high = (guess, high) if fits(guess) else (low, guess)
        each = max((peaks[low] - peaks[1]) / max(low - 1, 1), 1e-3)
        guess = min(max(low + int((args.memory - peaks[low]) / each), low + 1), high - 1)
    rows = [{"batch": batch, "peak memory, GB": peaks[batch]} for batch in sorted(peaks)]
    return (f"{table(rows)}\nwithin {args.memory:g} GB: batch {low}",
            {"budget": args.memory, "largest_batch": low, "peaks": rows})


def bench_grid(args, run, device):
    """Images per second of training over sides and batch sizes."""
    sides, batches = (64, 128, 256, 512), (1, 2, 4, 8, 16, 32, 64)
    found = iter(in_turns(1, [{"only": batch, "size": side, "batch": batch}
                              for side in sides for batch in batches]))
    rows = [{"side": side, **{f"batch_{batch}": median(next(found)) for batch in batches}}
            for side in sides]
    return table(rows), {"grid": rows}


def bench_growth(args, run, device):
    """Training from as many pictures as the pets have to train with, and from ten times as many."""
    numbers = (3312, 33120)
    found = in_turns(args.rounds, [{"only": number} for number in numbers])
    rows = [{"pictures": number, "MB": 4 * math.prod(run.size) * number / 1e6,
             "own_memory_GB": results[0]["own_memory"], "train, images/s": median(results)}
            for number, results in zip(numbers, found)]
    return table(rows), {"growth": rows, "rounds": found}


def bench_scaling(args, run, device):
    """Training by one process, and by one for each GPU, or by two on the CPU: of one thread each,
    the batch together the same."""
    numbers = (1, torch.cuda.device_count() if device.type == "cuda" else 2)
    found = in_turns(args.rounds, [{"only": run.batch, "processes": number} for number in numbers])
    rows = [{"processes": number, "train, images/s": median(results),
             "ratio": median(results) / median(found[0])}
            for number, results in zip(numbers, found)]
    size = 4 * sum(row["parameters"] for row in trace(args.model, run.width, run.size, run.up))
    return (f"{table(rows)}\ngradients: {size / 1e6:.1f} MB a step",
            {"scaling": rows, "bytes_a_step": size, "rounds": found})


def bench(args):
    """Times the plain way against this one, or does what else --layers … --scaling ask for."""
    device = pick_device(args.device)
    run = settings(args, device, toy=False)
    if args.only:
        return answer(args, "", one_measurement(args, run, device))
    about = {"model": run.model, "width": run.width, "size": run.size, "batch": run.batch,
             "precision": run.precision, "device": str(device), "torch": str(torch.__version__),
             "threads": torch.get_num_threads()}
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    kinds = {"layers": bench_layers, "memory": bench_memory, "grid": bench_grid,
             "growth": bench_growth, "scaling": bench_scaling}
    kind = next((kinds[name] for name in kinds if getattr(args, name)), bench_ways)
    text, result = kind(args, run, device)
    answer(args, text, {**about, **result})


COMMANDS = {"train": train, "eval": evaluate, "infer": infer, "compare": compare,
            "data": manage_data, "summary": summary, "export": export, "bench": bench}


def main():
    """Runs the subcommand; turns what a user can cause into one line and an exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half-written is cleared away
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file's name may be of no alphabet
    try:
        if "max_pixels" in ARGS:
            data.allow(ARGS.max_pixels)
        join()
        COMMANDS[ARGS.command](ARGS)
    except Problem as problem:
        message = str(problem)
    except KeyboardInterrupt:
        say("petseg: interrupted")
        raise SystemExit(130)
    except OSError as error:
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += "; make room and start again; train goes on with --resume RUN"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message += "; change its permissions, or name another place with --out or --root"
    except (MemoryError, RuntimeError) as error:
        # torch says it by a RuntimeError, on a GPU and on the CPU in these words
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if isinstance(error, MemoryError) or any(word in str(error) for word in words):
            message = "not enough memory; lower --batch, --size or --width"
        elif isinstance(error.__cause__, SystemExit):  # SIGTERM, in the midst of an import
            raise error.__cause__
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            message = "another process has ended, and so this one does"
        else:
            raise
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    which = f"process {rank()} of {world()}: " if rank() else ""
    say(f"petseg: {which}{data.printable(message)}", who=rank())
    raise SystemExit(2)


if __name__ == "__main__":
    main()
