"""petseg.py: the command line and the loops: train, evaluate, use.

Read from top to bottom: the command line, what is said to the user, the scores, the learning-rate
schedules, checkpoints, and then one function for each subcommand, `train` first.
"""
import argparse
import os
import sys
from pathlib import Path

# --------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says in one line what is wrong."""

    def error(self, message):
        self.exit(2, f"petseg: {message}; see petseg.py {sys.argv[1] if sys.argv[1:] else ''} -h\n")


def size(text):
    """A side in pixels, at least 32: ResNet34-UNet halves it five times."""
    if not text.isdigit() or int(text) < 32:
        raise argparse.ArgumentTypeError(f"a size is a whole number from 32 up, not {text!r}")
    return int(text)


def positive(text):
    """A whole number from 1 up."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, not {text!r}")
    return int(text)


def fraction(text):
    """A number from 0 to 1."""
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, not {text!r}")


def command_line():
    """All that can be typed. An option of `train` that is not given is absent: see `settings`."""
    parser = Parser(prog="petseg.py", description="Segments pets from photos, pixel by pixel.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    models, absent = ("unet", "resnet34_unet"), argparse.SUPPRESS

    def command(name, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
        return sub

    def place(sub, data="auto"):
        sub.add_argument("--data", default=data, help="auto (the pets, or else toy pets), pets, toy,"
                         " or a folder laid out like the pets")
        sub.add_argument("--root", default="data", help="where data is kept (data/)")
        sub.add_argument("--url", default=None, help="a mirror to download the pets from")

    def machine(sub):
        sub.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
        sub.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                         help="auto: bfloat16 where the hardware has it")

    def trained(sub, data=None):
        sub.add_argument("--ckpt", required=True, help="a best.pt of a run")
        place(sub, data)
        machine(sub)
        sub.add_argument("--threshold", type=fraction, default=0.5, help="pet from here on (0.5)")
        sub.add_argument("--tta", action="store_true", help="average with the mirrored picture")

    sub = command("train", "train from scratch, score the test split, draw the curves")
    sub.add_argument("model", nargs="?", choices=models)
    sub.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; then only"
                     " --epochs, --device, --save-every, --data and --root may be given")
    place(sub, absent)
    machine(sub)
    sub.add_argument("--out", default="runs", help="where the run's folder is made (runs/)")
    add = lambda *names, **words: sub.add_argument(*names, default=absent, **words)
    add("--epochs", type=positive, help="20; more for the small toy set")
    add("--batch", type=positive, help="images a step: 16, or 32 on a GPU")
    add("--size", type=size, help="side in pixels: 128, or 256 on a GPU")
    add("--width", type=positive, help="channels of the first level: 64 on a GPU, else 16 or 32")
    add("--up", choices=("transpose", "bilinear"), help="how the decoder doubles (transpose)")
    add("--dropout", type=fraction, help="at the bottom of the U (0)")
    add("--loss", choices=("bce_dice", "bce", "dice"), help="(bce_dice)")
    add("--optimizer", choices=("adamw", "adam"), help="(adamw)")
    add("--lr", type=float, help="the learning rate's peak (0.002)")
    add("--weight-decay", type=float, help="of AdamW (0.01)")
    add("--schedule", choices=("cosine", "constant", "plateau", "exponential", "inverse_sqrt"),
        help="of the learning rate (cosine)")
    add("--warmup", type=float, help="epochs of warm-up, for cosine and inverse_sqrt (1)")
    add("--gamma", type=float, help="factor an epoch, for exponential (0.99)")
    add("--clip", type=float, help="largest norm of the gradient; 0 for any (1)")
    add("--accumulate", type=positive, help="batches added up for one step (1)")
    add("--ema", type=fraction, help="memory of the weights' moving average; 0 for none (0.99)")
    add("--augment", choices=("none", "flip", "full"), help="(full)")
    add("--augment-prob", type=fraction, help="share of the images that is touched (1)")
    add("--repeat", type=positive, help="times an image appears in an epoch (1)")
    add("--border", choices=("foreground", "background", "ignore", "random"),
        help="what the trimap's border is in training (foreground)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--seed", type=int, help="of every random draw (0)")
    add("--save-every", type=int, help="also keep a numbered checkpoint every N epochs (0: no)")

    sub = command("eval", "score a split; a table by breed; the worst images in one picture")
    trained(sub)
    sub.add_argument("--split", choices=("train", "valid", "test"), default="test")
    sub.add_argument("--out", default="evaluation", help="folder of the results (evaluation/)")

    sub = command("infer", "masks, overlays, cut-outs of pictures; without any, of the test split")
    trained(sub)
    sub.add_argument("pictures", nargs="*", metavar="IMAGE|FOLDER")
    sub.add_argument("--save", help="comma-separated: mask, overlay, cutout, panel")
    sub.add_argument("--out", default="predictions", help="folder of the results (predictions/)")

    sub = command("compare", "the curves of several runs in one picture, and a table")
    sub.add_argument("runs", nargs="+", metavar="RUN")
    sub.add_argument("--out", default="compare.png", help="the picture's file (compare.png)")

    sub = command("data", "fetch, verify, or draw the data")
    sub.add_argument("action", nargs="?", choices=("get", "check", "toy"), default="check")
    place(sub)
    sub.add_argument("--trainval", type=positive, default=400, help="toys to train with (400)")
    sub.add_argument("--test", type=positive, default=100, help="toys to test with (100)")
    sub.add_argument("--seed", type=int, default=0, help="of the toys (0)")

    sub = command("summary", "a table of layers: shape, parameters, multiply-adds")
    sub.add_argument("model", choices=models)
    sub.add_argument("--size", type=size, default=256)
    sub.add_argument("--width", type=positive, default=64)
    sub.add_argument("--up", choices=("transpose", "bilinear"), default="transpose")

    sub = command("bench", "images per second and peak memory, the plain loop against this one")
    sub.add_argument("model", choices=models)
    place(sub, "toy")
    machine(sub)
    sub.add_argument("--size", type=size, default=128)
    sub.add_argument("--width", type=positive, default=16)
    sub.add_argument("--batch", type=positive, default=16)
    sub.add_argument("--rounds", type=positive, default=3)
    sub.add_argument("--only", choices=("plain", "petseg"), help=argparse.SUPPRESS)
    return parser


# Words are read before torch is, whose import takes a second: --help and typing errors come at once.
ARGS = command_line().parse_args() if __name__ == "__main__" else None

import copy
import csv
import errno
import io
import json
import math
import pickle
import platform
import shutil
import signal
import subprocess
import time
import zipfile
from datetime import datetime

import numpy as np
import torch

import data
import layers
from data import Problem

# --------------------------------------------------------------------- what is said to the user


def say(text):
    """A line of progress or warning, on stderr."""
    print(text, file=sys.stderr, flush=True)


def answer(args, text, result):
    """The result, on stdout: as text for people, or as one line of JSON."""
    print(json.dumps(result) if args.json else text, flush=True)


def clock(seconds):
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


class Line:
    """A line on stderr that renews itself in a terminal, and is a line each half minute in a log."""

    def __init__(self):
        self.terminal = sys.stderr.isatty()
        self.shown = time.monotonic()

    def due(self):
        """Whether it is time to show something again."""
        return time.monotonic() - self.shown > (0.2 if self.terminal else 30)

    def show(self, text):
        self.shown = time.monotonic()
        print(f"\r{text}\x1b[K" if self.terminal else text, end="" if self.terminal else "\n",
              file=sys.stderr, flush=True)

    def end(self, text):
        say(f"\r{text}\x1b[K" if self.terminal else text)


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
            line.end(f"{text}, {clock(seconds)}")
        elif line.due():
            left = clock((total - done) / speed) if speed else "?"
            line.show(f"{text}, {speed / scale:,.1f} {unit}/s, {left} left")

    return report


# ----------------------------------------------------------------------------------------- scores


def confusion(mask, target):
    """Per image, the pixels that are truly and falsely pet, falsely and truly background: (B, 4).
    Pixels of target 255 are left out."""
    pet, ground = target == 1, target == 0
    pairs = (mask & pet, mask & ground, ~mask & pet, ~mask & ground)
    return torch.stack([pair.flatten(1).sum(dim=1) for pair in pairs], dim=1)


def overlap(counts):
    """Dice and IoU of each row of a confusion: 2 tp / (2 tp + fp + fn) and tp / (tp + fp + fn);
    1 where nothing was to be found and nothing was."""
    tp, wrong = counts[:, 0].double(), (counts[:, 1] + counts[:, 2]).double()
    empty = (tp + wrong == 0).double()
    return (2 * tp + empty) / (2 * tp + wrong + empty), (tp + empty) / (tp + wrong + empty)


def scores(counts):
    """All scores of a split from its images' confusions (N, 4). "dice" is the one that counts: the
    mean over images. The dataset's are those of all its pixels as if they were one image."""
    dice, iou = overlap(counts)
    total = counts.sum(dim=0, keepdim=True)
    dataset_dice, dataset_iou = overlap(total)
    tp, fp, fn, tn = total[0].tolist()
    return {
        "dice": dice.mean().item(), "iou": iou.mean().item(),
        "dataset_dice": dataset_dice.item(), "dataset_iou": dataset_iou.item(),
        "precision": tp / (tp + fp) if tp + fp else 1.0,
        "recall": tp / (tp + fn) if tp + fn else 1.0,
        "accuracy": (tp + tn) / max(1, tp + fp + fn + tn), "images": len(counts),
    }


def score_table(s):
    """Scores in two lines for people."""
    return (f"Dice {s['dice']:.4f}  IoU {s['iou']:.4f}  (mean over {s['images']} images)\n"
            f"all pixels: Dice {s['dataset_dice']:.4f}  IoU {s['dataset_iou']:.4f}  precision "
            f"{s['precision']:.4f}  recall {s['recall']:.4f}  accuracy {s['accuracy']:.4f}")


# ------------------------------------------------------------------------ learning-rate schedules
# Each gives the rate of a step from the run's settings, the step's number since the start, the
# steps in an epoch, and the valid Dice of the epochs so far. None has a memory of its own.


def constant(run, step, per_epoch, dices):
    """The same rate always."""
    return run.lr


def cosine(run, step, per_epoch, dices):
    """Up in a straight line for `warmup` epochs, then down to 0 along half a cosine."""
    warm, total = run.warmup * per_epoch, run.epochs * per_epoch
    if step < warm:
        return run.lr * (step + 1) / (warm + 1)
    return run.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def plateau(run, step, per_epoch, dices):
    """Halved whenever the valid Dice has not risen for three epochs, but never under 1e-6."""
    rate, best, waited = run.lr, -1.0, 0
    for dice in dices:
        best, waited = (dice, 0) if dice > best else (best, waited + 1)
        if waited == 3:
            rate, waited = max(rate * 0.5, min(1e-6, run.lr)), 0
    return rate


def exponential(run, step, per_epoch, dices):
    """Multiplied by `gamma` after each epoch."""
    return run.lr * run.gamma ** (step // per_epoch)


def inverse_sqrt(run, step, per_epoch, dices):
    """Up with the square of the step for `warmup` epochs, then down with one over its root."""
    warm = max(1, run.warmup * per_epoch)
    return run.lr * min(((step + 1) / warm) ** 2, math.sqrt(warm / (step + 1)))


SCHEDULES = {"constant": constant, "cosine": cosine, "plateau": plateau,
             "exponential": exponential, "inverse_sqrt": inverse_sqrt}

# -------------------------------------------------------------------------- machine, data, network


def pick_device(name):
    """The device asked for, or the best there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, here in there.items() if here)
    if not there[name]:
        raise Problem(f"this machine has no {name} device that torch can use; try --device cpu")
    return torch.device(name)


def pick_precision(name, device):
    """"bf16" or "fp32"; by itself bfloat16 where the hardware multiplies it faster."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability()[0] >= 8
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                         or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast else "fp32"


def find_data(choice, root, url):
    """The folder that --data means, fetched or drawn if it has to be; returns (its name, it)."""
    pets, toys = Path(root) / data.PETS, Path(root) / data.TOYS
    name = {"auto": "pets"}.get(choice, choice)
    if name == "pets" and not all((pets / part).is_dir() for part in ("images", "annotations")):
        source = url or data.PETS_URL
        try:
            if choice == "auto" and not data.reachable(source):
                raise data.DownloadFailed(f"{source} cannot be reached")
            data.get_pets(root, source, progress("download", "MB", 1e6))
        except data.DownloadFailed as failure:
            if choice == "pets":
                raise
            say(f"!!! The pets are not on this disk and could not be downloaded: {failure}.\n"
                "!!! What follows uses TOY PETS, drawn by this program, not real photos.\n"
                "!!! For the real ones: petseg.py data get, or --data FOLDER.")
            name = "toy"
    if name == "toy" and not toys.is_dir():
        data.make_toys(root, progress("draw toy pets"))
    if name in ("pets", "toy"):
        return name, pets if name == "pets" else toys
    return "".join(c if c.isalnum() else "-" for c in Path(choice).resolve().name), Path(choice)


def open_split(folder, split, side, root):
    """A split from the cache, with a warning about pictures that are left out."""
    what = f"cache {split} at {side}×{side}"
    found = data.open_split(folder, split, (side, side), Path(root) / "cache", progress(what))
    if found.skipped:
        say(f"petseg: {len(found.skipped)} pictures of {split} are missing or unreadable and left "
            "out; the first: " + "; ".join(found.skipped[:5]))
    return found


def build(about):
    """The network that settings or a checkpoint describe, in channels-last memory."""
    network = layers.MODELS[about["model"]](width=about["width"], up=about["up"],
                                            dropout=about["dropout"])
    return network.to(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(network, images, about, precision, tta=False):
    """Images (B, 3, H, W) in 0..1 to logits (B, 1, H, W) in fp32; with `tta`, the logits are those
    of the mean of the picture's probability and its mirror image's."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        x = data.normalise(images, about["mean"], about["std"])
        logits = network(x).float()
        if tta:
            mirrored = network(x.flip(3)).float().flip(3)
            logits = ((logits.sigmoid() + mirrored.sigmoid()) / 2).logit(eps=1e-6)
    return logits


def score_split(network, split, about, device, precision, batch=32, loss="bce_dice", tta=False,
                threshold=0.5):
    """Predicts a whole split; returns its mean loss and the confusion of each image (N, 4)."""
    network.eval()
    total, counts = 0.0, []
    for index in torch.arange(len(split.names)).split(batch):
        images, labels = data.load(split, index.numpy(), device)
        target = data.targets(labels)
        logits = predict(network, images, about, precision, tta)
        total += layers.LOSSES[loss](logits, target) * len(index)
        counts.append(confusion(logits[:, 0].sigmoid() >= threshold, target))
    return float(total) / len(split.names), torch.cat(counts).cpu()


# ------------------------------------------------------------------------------------ checkpoints


def save(content, path):
    """Writes a checkpoint so that at any moment the old or the new one stands there, whole."""
    memory = io.BytesIO()
    torch.save(content, memory)
    with data.whole_file(path, sync=True) as file:
        file.write(memory.getbuffer())


def load(path, kind, device="cpu"):
    """Reads a checkpoint of the `kind` "network" (best.pt) or "training" (last.pt)."""
    path = Path(path)
    if not path.is_file():
        raise Problem(f"there is no checkpoint {path}" + (" (a folder; name the .pt file in it)"
                                                          if path.is_dir() else ""))
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        raise Problem(f"{path} is no checkpoint that can be read: {reason}") from error
    found = content.get("petseg") if isinstance(content, dict) else None
    if found != kind:
        raise Problem(f"{path} is not a petseg {kind} checkpoint but " + (
            f"a {found} one; take {'best.pt' if kind == 'network' else 'last.pt'} of its run"
            if found else "something else"))
    return content


def load_network(path, device):
    """The network of a best.pt, ready to predict, and what the file says about it."""
    about = load(path, "network", device)
    network = build(about).to(device)
    network.load_state_dict(about.pop("weights"))
    return network.eval(), about


# ------------------------------------------------------------------------------------------ train

MAY_CHANGE = ("epochs", "save_every", "data", "root")  # by `--resume`, beside the device


def settings(model, device, toy):
    """The default of every option of a run, as it fits the machine and the data."""
    gpu = device.type != "cpu"
    return {
        "model": model, "size": 256 if gpu else 128, "batch": 32 if gpu else 16,
        "width": 64 if gpu else {"unet": 16, "resnet34_unet": 32}[model],
        # 400 toys make an epoch of 23 steps, a ninth of the pets'
        "epochs": 30 if toy else 20,
        "up": "transpose", "dropout": 0.0, "loss": "bce_dice", "optimizer": "adamw", "lr": 2e-3,
        "weight_decay": 0.01, "schedule": "cosine", "warmup": 1.0, "gamma": 0.99, "clip": 1.0,
        "accumulate": 1, "ema": 0.99, "augment": "full", "augment_prob": 1.0, "repeat": 1,
        "border": "foreground", "compile": False, "seed": 0, "save_every": 0,
    }


def start_or_resume(args, device):
    """Returns the run's folder, its settings, and its last checkpoint (None at the start)."""
    given = {name: value for name, value in vars(args).items() if name not in
             ("command", "json", "resume", "device", "precision", "out", "url", "model")}
    if args.resume:
        folder = Path(args.resume)
        state = load(folder / "last.pt", "training", device)
        run = state["settings"]
        for name, value in {**given, "model": args.model or run["model"]}.items():
            if name not in MAY_CHANGE and value != run[name]:
                raise Problem(f"the run was begun with --{name.replace('_', '-')} {run[name]}, not "
                              f"{value}; a resumed run keeps it, a new one is made without --resume")
        run.update(given)
        return folder, argparse.Namespace(**run), state
    if not args.model:
        raise Problem("say which model to train: petseg.py train unet, or resnet34_unet")
    root, choice = given.get("root", "data"), given.get("data", "auto")
    name, source = find_data(choice, root, args.url)
    run = {**settings(args.model, device, name == "toy"), **given, "root": root,
           "data": name if name in ("pets", "toy") and choice in ("auto", "pets", "toy") else choice,
           "precision": pick_precision(args.precision, device)}
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(args.out) / f"{name}-{args.model}-{stamp}-{os.urandom(2).hex()}"
    return folder, argparse.Namespace(**run), None


def train_step(network, average, optimizer, split, group, run, epoch, step, device):
    """One step of the optimizer on the pictures `group`, a batch at a time; returns the sums of
    their losses, Dices and IoUs. Every random draw depends on (seed, epoch, step) alone."""
    torch.manual_seed(data.generator("dropout", run.seed, epoch, step).initial_seed())
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for part, index in enumerate(group.split(run.batch)):
        random = data.generator("augment", run.seed, epoch, step, part)
        images, labels = data.load(split, index.numpy(), device)
        if run.augment != "none":
            images, labels = data.augment(images, labels, random, run.augment_prob,
                                          **data.AUGMENT[run.augment])
        target = data.targets(labels, run.border, random)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            logits = network(data.normalise(images))
        loss = layers.LOSSES[run.loss](logits, target)
        (loss * len(index) / len(group)).backward()
        dice, iou = overlap(confusion(logits[:, 0] > 0, target))
        sums += torch.stack((loss.detach() * len(index), dice.sum(), iou.sum()))
    if run.clip:
        torch.nn.utils.clip_grad_norm_(network.parameters(), run.clip)
    optimizer.step()
    optimizer.zero_grad()
    if average is not network:  # the moving average forgets faster while there is little to remember
        done = optimizer.state_dict()["state"][0]["step"].item()
        keep = min(run.ema, (1 + done) / (10 + done))
        for mean, value in zip(average.state_dict().values(), network.state_dict().values()):
            mean.lerp_(value, 1 - keep) if mean.is_floating_point() else mean.copy_(value)
    return sums


class Stop:
    """Ctrl-C only asks; the loop answers when the step is done. A second Ctrl-C does not wait."""

    def __enter__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def train(args):
    """Trains a network from scratch, or goes on with a run; scores it; leaves all in its folder."""
    device = pick_device(args.device)
    folder, run, state = start_or_resume(args, device)
    source = find_data(run.data, run.root, args.url)[1]
    train_set = open_split(source, "train", run.size, run.root)
    valid_set = open_split(source, "valid", run.size, run.root)

    about = {"petseg": "network", "model": run.model, "width": run.width, "up": run.up,
             "dropout": run.dropout, "size": run.size, "classes": ["background", "pet"],
             "mean": data.MEAN, "std": data.STD}
    torch.manual_seed(run.seed)
    network = build(about).to(device)
    average = copy.deepcopy(network) if run.ema else network
    forward = torch.compile(network) if run.compile else network
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[run.optimizer]
    decay = {"weight_decay": run.weight_decay} if run.optimizer == "adamw" else {}
    optimizer = kind(network.parameters(), run.lr, **decay)

    epoch, step, history, before = 1, 0, [], 0.0
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # of the epoch's losses, Dices, IoUs
    if state:
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, step, history, before = (state[k] for k in ("epoch", "step", "history", "seconds"))
        sums = state["sums"].to(device)

    def save_state():
        save({"petseg": "training", "settings": vars(run), "network": network.state_dict(),
              "average": average.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
              "step": step, "sums": sums, "history": history,
              "seconds": before + time.monotonic() - began}, folder / "last.pt")

    write_config(folder, run, device)
    say(f"{'resuming' if state else 'training'} {folder} on {device}: "
        + ", ".join(f"{name} {value}" for name, value in vars(run).items()))
    images = len(train_set.names) * run.repeat
    per_epoch = math.ceil(images / (run.batch * run.accumulate))
    line, began_all, epochs_done = Line(), time.monotonic(), epoch - 1 + step / per_epoch
    with Stop() as stop:
        while epoch <= run.epochs:
            began = time.monotonic()
            forward.train()
            order = data.shuffled(len(train_set.names), run.repeat, run.seed, epoch)
            groups = order.split(run.batch * run.accumulate)
            while step < per_epoch:
                if stop.asked:
                    save_state()
                    say(f"\npetseg: stopped and saved; go on with: petseg.py train --resume {folder}")
                    raise SystemExit(130)
                rate = SCHEDULES[run.schedule](run, (epoch - 1) * per_epoch + step, per_epoch,
                                               [row["valid_dice"] for row in history])
                for parameters in optimizer.param_groups:
                    parameters["lr"] = rate
                sums += train_step(forward, average, optimizer, train_set, groups[step], run, epoch,
                                   step, device)
                step += 1
                if line.due() or step == per_epoch:  # reading the loss makes a GPU wait: seldom
                    seen = min(step * run.batch * run.accumulate, images)
                    loss, seconds = sums[0].item() / seen, before + time.monotonic() - began
                    if not math.isfinite(loss):
                        raise Problem(f"the loss became {loss} in epoch {epoch}, step {step}; the last"
                                      f" good checkpoint stays in {folder}; try a lower --lr, --clip "
                                      "1, or --precision fp32")
                    at = epoch - 1 + step / per_epoch
                    left = (time.monotonic() - began_all) / (at - epochs_done) * (run.epochs - at)
                    line.show(f"epoch {epoch}/{run.epochs}  step {step}/{per_epoch}  loss {loss:.4f}"
                              f"  {seen / seconds:.0f} images/s  {clock(left)} left")

            loss, counts = score_split(average, valid_set, about, device, run.precision,
                                       run.batch, run.loss)
            valid, (train_loss, train_dice, train_iou) = scores(counts), (sums / images).tolist()
            best = all(valid["dice"] > row["valid_dice"] for row in history)
            history.append({
                "epoch": epoch, "train_loss": train_loss, "train_dice": train_dice,
                "train_iou": train_iou, "valid_loss": loss, "valid_dice": valid["dice"],
                "valid_iou": valid["iou"], "lr": rate,
                "seconds": before + time.monotonic() - began, "images_per_second": seen / seconds})
            line.end(f"epoch {epoch}/{run.epochs}  train loss {train_loss:.4f} Dice {train_dice:.4f}"
                     f"  valid loss {loss:.4f} Dice {valid['dice']:.4f}{' *' if best else '  '}"
                     f"  {history[-1]['seconds']:.1f} s  {seen / seconds:.0f} images/s")

            # best.pt first: killed in between, the epoch is done again and writes the same
            if best:
                save({**about, "weights": {name: value.half() if value.is_floating_point() else value
                                           for name, value in average.state_dict().items()},
                      "trained": {**vars(run), "epoch": epoch, "valid": valid,
                                  "torch": str(torch.__version__)}}, folder / "best.pt")
            epoch, step, before = epoch + 1, 0, 0.0
            sums.zero_()
            began = time.monotonic()
            save_state()
            if run.save_every and (epoch - 1) % run.save_every == 0:
                shutil.copy(folder / "last.pt", folder / f"epoch-{epoch - 1}.pt")
            write_history(folder, history)
            draw_samples(folder / "samples.png", average, valid_set, about, run.precision, device,
                         np.linspace(0, len(valid_set.names) - 1, 8).astype(int))
    finish(args, folder, run, history, source, device)


def write_config(folder, run, device):
    """config.json: every option as resolved, and what it ran on."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                         capture_output=True)
    config = {**vars(run), "device": str(device), "commit": git.stdout.strip() or None,
              "machine": platform.platform(), "threads": torch.get_num_threads(),
              "python": platform.python_version(), "torch": str(torch.__version__)}
    with data.whole_file(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode())


def write_table(file, rows, columns):
    """Rows (dicts) as CSV into a file opened for bytes; a value that a row lacks stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def write_history(folder, history):
    """metrics.csv and curves.png, anew and whole after each epoch: no row is missing or twice."""
    with data.whole_file(folder / "metrics.csv") as file:
        write_table(file, history, list(history[0]))
    data.draw_curves(folder / "curves.png", {folder.name: history})


def draw_samples(path, network, split, about, precision, device, chosen, threshold=0.5):
    """A gallery of photo | truth | prediction of the `chosen` pictures of a split."""
    images, labels = data.load(split, chosen, device)
    network.eval()
    mask = predict(network, images, about, precision)[:, 0].sigmoid() >= threshold
    target = data.targets(labels)
    dice = overlap(confusion(mask, target))[0].tolist()
    panels = [data.panel(data.picture(split.images[i]), target[k].cpu().numpy() == 1,
                         mask[k].cpu().numpy(), f"{split.names[i]}  Dice {dice[k]:.3f}", 160)
              for k, i in enumerate(chosen)]
    data.save_picture(data.gallery(panels), path)


def finish(args, folder, run, history, source, device):
    """Scores the test split (valid, where there is none) with best.pt, as a user will load it."""
    network, about = load_network(folder / "best.pt", device)
    name = data.splits(source)[-1]
    split = open_split(source, name, run.size, run.root)
    _, counts = score_split(network, split, about, device, run.precision, run.batch)
    worst = overlap(counts)[0].argsort()[:12].numpy()
    draw_samples(folder / "worst.png", network, split, about, run.precision, device, worst)
    result = {"run": str(folder), "split": name, "epoch": about["trained"]["epoch"],
              "valid_dice": about["trained"]["valid"]["dice"],
              "seconds": sum(row["seconds"] for row in history), **scores(counts)}
    with data.whole_file(folder / f"{name}.json") as file:
        file.write(json.dumps(result, indent=2).encode())
    answer(args, f"best epoch {result['epoch']}: valid Dice {result['valid_dice']:.4f}\n"
           f"{name} split, by best.pt: {score_table(result)}\n{folder}", result)


# ------------------------------------------------------------------- eval, infer, compare, data


def choose_data(args, about):
    """The data that --data names, or else that the network was trained on."""
    return find_data(args.data or about["trained"]["data"], args.root, args.url)[1]


def evaluate(args):
    """Scores a split with a trained network: as a whole, breed by breed, and the worst images."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    network, about = load_network(args.ckpt, device)
    split = open_split(choose_data(args, about), args.split, about["size"], args.root)
    _, counts = score_split(network, split, about, device, precision, tta=args.tta,
                            threshold=args.threshold)
    breeds = {}
    for name, row in zip(split.names, counts):
        breeds.setdefault(name.rpartition("_")[0], []).append(row)
    breeds = {breed: scores(torch.stack(rows)) for breed, rows in sorted(breeds.items())}
    result = {"split": args.split, "checkpoint": args.ckpt, **scores(counts), "breeds": breeds}
    out = Path(args.out)
    with data.whole_file(out / f"{args.split}.json") as file:
        file.write(json.dumps(result, indent=2).encode())
    worst = overlap(counts)[0].argsort()[:12].numpy()
    draw_samples(out / f"worst-{args.split}.png", network, split, about, precision, device, worst,
                 args.threshold)
    table = [f"{breed:30} {s['images']:6} {s['dice']:8.4f} {s['iou']:8.4f}"
             for breed, s in sorted(breeds.items(), key=lambda item: item[1]["dice"])]
    answer(args, "\n".join([f"{'breed':30} {'images':>6} {'Dice':>8} {'IoU':>8}", *table, "",
                            f"{args.split} split: {score_table(result)}",
                            f"the worst images: {out / f'worst-{args.split}.png'}"]), result)


def unique_names(paths):
    """A name for the outputs of each picture: its own, with a number where it comes again."""
    taken, names = set(), []
    for path in paths:
        name, number = path.stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def infer(args):
    """Finds the pets in pictures of any size and writes what --save names, and a table of all."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    network, about = load_network(args.ckpt, device)
    if args.pictures:
        paths = data.find_pictures(args.pictures)
        truths = [data.find_truth(path) for path in paths]
    else:
        samples = data.list_samples(choose_data(args, about), "test")
        paths, truths = [sample.image for sample in samples], [sample.mask for sample in samples]
    kinds = (args.save or ("mask,overlay,cutout" if args.pictures else "panel")).split(",")
    if unknown := set(kinds) - {"mask", "overlay", "cutout", "panel"}:
        raise Problem(f"--save knows mask, overlay, cutout and panel, not {', '.join(unknown)}")

    out, rows, failed = Path(args.out), [], []
    report = progress("infer")
    for done, (path, truth, name) in enumerate(zip(paths, truths, unique_names(paths)), start=1):
        try:
            row, pictures = infer_one(path, truth, kinds, network, about, precision, device, args)
        except Problem as problem:
            failed.append(str(problem))
            continue
        for kind, image in pictures.items():
            data.save_picture(image, out / f"{name}_{kind}.png")
        rows.append({"file": str(path), "output": name, **row})
        report(done, len(paths))

    with data.whole_file(out / "predictions.csv") as file:
        write_table(file, rows, ("file", "output", "pet_share", "left", "top", "right", "bottom",
                                 "confidence", "dice", "iou", "own_size_dice", "own_size_iou"))
    known = [row for row in rows if "dice" in row]
    result = {"images": len(rows), "failed": failed, "out": str(out)}
    text = f"{len(rows)} pictures: {out}/"
    for measure in ("dice", "own_size_dice") if known else ():
        result[measure] = sum(row[measure] for row in known) / len(known)
    if known:
        text += (f"\n{len(known)} of known truth: mean Dice {result['dice']:.4f} at {about['size']}×"
                 f"{about['size']}, {result['own_size_dice']:.4f} at their own sizes")
    answer(args, text, result)
    if failed:
        raise Problem(f"{len(failed)} of {len(paths)} pictures could not be used: "
                      + "; ".join(failed[:5]))


def infer_one(path, truth, kinds, network, about, precision, device, args):
    """One picture: its row in the table and its {kind: output picture}."""
    photo = data.read_image(path)
    small = data.pixels(photo, (about["size"], about["size"])).to(device)
    logits = predict(network, small, about, precision, args.tta)
    probability = logits[0, 0].sigmoid().cpu().numpy()
    large = data.enlarge(probability, photo.size)
    mask = large >= args.threshold
    left, top, right, bottom = data.bounding_box(mask)
    row = {"pet_share": mask.mean(), "left": left, "top": top, "right": right, "bottom": bottom,
           "confidence": np.maximum(large, 1 - large).mean()}
    answers = None
    if truth is not None:
        answers = data.read_trimap(truth)
        if answers.shape != mask.shape:
            raise Problem(f"{path} and its trimap {truth} differ in size")
        reduced = data.shrink(answers, probability.shape)
        for prefix, guess, right_one in (("", probability >= args.threshold, reduced),
                                         ("own_size_", mask, answers)):
            counts = confusion(torch.from_numpy(guess)[None], torch.from_numpy(right_one > 0)[None])
            dice, iou = overlap(counts)
            row[f"{prefix}dice"], row[f"{prefix}iou"] = dice.item(), iou.item()
    draw = {
        "mask": lambda: data.mask_picture(mask),
        "overlay": lambda: data.overlay(photo, mask),
        "cutout": lambda: data.cutout(photo, mask),
        "panel": lambda: data.panel(photo, answers > 0 if truth else mask, mask, path.stem),
    }
    return row, {kind: draw[kind]() for kind in kinds}


def compare(args):
    """Draws the curves of several runs into one picture and prints a table of their results."""
    histories, rows = {}, []
    for folder in map(Path, args.runs):
        if not (folder / "metrics.csv").is_file():
            raise Problem(f"{folder} is no run with a finished epoch: there is no metrics.csv in it")
        with open(folder / "metrics.csv", newline="") as file:
            history = [{name: float(value) for name, value in row.items()}
                       for row in csv.DictReader(file)]
        config = json.loads((folder / "config.json").read_text())
        test = folder / "test.json"
        best = max(history, key=lambda row: row["valid_dice"])
        histories[folder.name] = history
        rows.append({
            "run": folder.name, "model": config["model"], "width": config["width"],
            "size": config["size"], "parameters": sum(
                p.numel() for p in build(config).parameters()),
            "epochs": len(history), "best_epoch": int(best["epoch"]),
            "valid_dice": best["valid_dice"], "valid_iou": best["valid_iou"],
            "test_dice": json.loads(test.read_text())["dice"] if test.is_file() else None,
            "seconds": sum(row["seconds"] for row in history)})
    data.draw_curves(args.out, histories)
    wide = max(len(row["run"]) for row in rows)
    lines = [f"{'run':{wide}}  parameters  size  epochs  best  valid Dice  test Dice     time"]
    for r in rows:
        test = f"{r['test_dice']:9.4f}" if r["test_dice"] is not None else f"{'-':>9}"
        lines.append(f"{r['run']:{wide}}  {r['parameters']:10,}  {r['size']:4}  {r['epochs']:6}  "
                     f"{r['best_epoch']:4}  {r['valid_dice']:10.4f}  {test}  {clock(r['seconds']):>7}")
    answer(args, "\n".join([*lines, args.out]), {"runs": rows, "picture": args.out})


def manage_data(args):
    """Fetches the pets, draws the toys, or reads all of a data set and says what is wrong in it."""
    if args.action == "toy":
        folder = data.make_toys(args.root, progress("draw toy pets"), args.seed, args.trainval,
                                args.test)
        return answer(args, str(folder), {"folder": str(folder)})
    if args.action == "get":
        folder = data.get_pets(args.root, args.url or data.PETS_URL, progress("download", "MB", 1e6))
    else:
        folder = find_data(args.data, args.root, args.url)[1]
    found = data.check(folder, progress("check"))
    faults = [fault for _, bad in found.values() for fault in bad]
    text = [f"{folder}:"] + [f"{split:6} {number:6} pictures, {len(bad)} at fault"
                             for split, (number, bad) in found.items()]
    answer(args, "\n".join(text), {"folder": str(folder), "faults": faults, "pictures": {
        split: number for split, (number, _) in found.items()}})
    if faults:
        raise Problem(f"{len(faults)} pictures of {folder} are at fault: " + "; ".join(faults[:5]))


# -------------------------------------------------------------------------------- summary, bench


def summary(args):
    """Prints each layer's output, parameters and multiply-adds, from one pass without numbers."""
    rows = []

    def note(name, layer, inputs, output):
        weights = sum(p.numel() for p in layer.parameters())
        macs = 0
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            # a convolution works for each of its outputs, a transposed one for each of its inputs
            places = (output if isinstance(layer, torch.nn.Conv2d) else inputs)[0, 0].numel()
            macs = places * layer.weight.numel()
        rows.append((name, type(layer).__name__, list(output.shape[1:]), weights, macs))

    with torch.device("meta"):  # shapes alone: nothing is computed
        network = layers.MODELS[args.model](width=args.width, up=args.up)
        for name, layer in network.named_modules():
            if not list(layer.children()):
                layer.register_forward_hook(
                    lambda layer, inputs, output, name=name: note(name, layer, inputs[0], output))
        network(torch.zeros(1, 3, args.size, args.size))
    weights, macs = (sum(row[i] for row in rows) for i in (3, 4))
    lines = [f"{'layer':28} {'kind':16} {'output':>18} {'parameters':>12} {'multiply-adds':>15}"]
    lines += [f"{name:28} {kind:16} {'×'.join(map(str, shape)):>18} {p:12,} {m:15,}"
              for name, kind, shape, p, m in rows]
    lines.append(f"{'all':28} {args.model:16} {'':18} {weights:12,} {macs:15,}")
    answer(args, "\n".join(lines), {
        "model": args.model, "size": args.size, "width": args.width, "parameters": weights,
        "multiply_adds": macs, "layers": [dict(zip(("name", "kind", "output", "parameters",
                                                    "multiply_adds"), row)) for row in rows]})


def bench(args):
    """Times the plain way of doing it against this program's, in fresh processes by turns."""
    if args.only:
        return answer(args, "", measure(args))
    find_data(args.data, args.root, args.url)
    results = {"plain": [], "petseg": []}
    line = Line()
    for turn in range(args.rounds):
        for way in results:
            line.show(f"round {turn + 1} of {args.rounds}: {way}")
            child = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", way, "--json"],
                                   capture_output=True, text=True)
            if child.returncode:
                raise Problem(child.stderr.strip().splitlines()[-1].removeprefix("petseg: "))
            results[way].append(json.loads(child.stdout.splitlines()[-1]))
    middle = {way: {key: float(np.median([r[key] for r in rounds])) for key in rounds[0]}
              for way, rounds in results.items()}
    lines = [f"{args.model}, width {args.width}, {args.size}×{args.size}, batch {args.batch}, "
             f"median of {args.rounds} rounds", f"{'':24} {'plain':>10} {'petseg':>10} {'ratio':>7}"]
    for key, label in (("train", "train, images/s"), ("infer", "infer, images/s"),
                       ("memory", "peak memory, MB")):
        a, b = middle["plain"][key], middle["petseg"][key]
        lines.append(f"{label:24} {a:10.1f} {b:10.1f} {b / a:7.2f}")
    line.end("done")
    answer(args, "\n".join(lines), {"model": args.model, **middle, "rounds": results})


def measure(args):
    """Images per second of training and inference, and peak memory, of one of the two ways."""
    device = pick_device(args.device)
    plain = args.only == "plain"
    run = argparse.Namespace(**{**settings(args.model, device, toy=True), "batch": args.batch,
        "precision": "fp32" if plain else pick_precision(args.precision, device)})
    about = {"model": args.model, "width": args.width, "up": "transpose", "dropout": 0.0,
             "mean": data.MEAN, "std": data.STD}
    source = find_data(args.data, args.root, args.url)[1]
    samples = data.list_samples(source, "train")
    network = build(about).to(device)
    if plain:
        network = network.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(network.parameters(), run.lr)
    split = None if plain else data.open_split(source, "train", (args.size,) * 2,
                                               Path(args.root) / "cache", progress("cache"))

    def plain_step(index):
        batch = []
        for i in index.tolist():  # as a data set class does it: read, resize, augment, one by one
            image, labels = data.read_pair(samples[i], (args.size, args.size))
            one = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255,
                   torch.from_numpy(labels)[None])
            batch.append(data.augment(*one, data.generator(i), **data.AUGMENT["full"]))
        images, labels = (torch.cat(parts).to(device) for parts in zip(*batch))
        loss = layers.bce_dice_loss(network(data.normalise(images)), data.targets(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def plain_predict(index):
        images = [torch.from_numpy(data.read_pair(samples[i], (args.size, args.size))[0])
                  for i in index.tolist()]
        images = torch.stack(images).permute(0, 3, 1, 2).contiguous().to(device).float() / 255
        with torch.no_grad():
            return (network(data.normalise(images)).sigmoid() >= 0.5).cpu()

    def our_step(index):
        return train_step(network, network, optimizer, split, index, run, 1, 1, device)

    def our_predict(index):
        images, _ = data.load(split, index.numpy(), device)
        return predict(network, images, about, run.precision)

    def speed(work, steps=12):
        indices = [torch.arange(k * args.batch, (k + 1) * args.batch) % len(samples)
                   for k in range(steps)]
        for index in indices[:3]:
            work(index)
        began = time.monotonic()
        for index in indices:
            work(index)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return steps * args.batch / (time.monotonic() - began)

    network.train()
    trained = speed(plain_step if plain else our_step)
    network.eval()
    inferred = speed(plain_predict if plain else our_predict)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e6
    else:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = peak / 1e6 if sys.platform == "darwin" else peak / 1e3
    return {"train": trained, "infer": inferred, "memory": memory}


COMMANDS = {"train": train, "eval": evaluate, "infer": infer, "compare": compare,
            "data": manage_data, "summary": summary, "bench": bench}


def main():
    """Runs the subcommand; turns what a user can cause into one line and an exit code."""
    try:
        COMMANDS[ARGS.command](ARGS)
    except Problem as problem:
        message = str(problem)
    except KeyboardInterrupt:
        say("\npetseg: interrupted")
        raise SystemExit(130)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}" + (
            "; make room and start again" if full else "")
    except (MemoryError, RuntimeError) as error:
        # torch's own out-of-memory error on a GPU is a RuntimeError as well
        if not any(word in str(error) for word in ("out of memory", "can't allocate memory")):
            raise
        message = "not enough memory; lower --batch, --size or --width"
    else:
        return
    say(f"petseg: {message}")
    raise SystemExit(2)


if __name__ == "__main__":
    main()
