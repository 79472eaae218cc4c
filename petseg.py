"""petseg.py: the loops and the command line. Read `train_step` and `train` first; what they call
stands in layers.py, in data.py, or below. On two cores of an AMD EPYC `train unet --data pets
--epochs 7` takes 4:24 to a val Dice of 0.903."""
import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

# --------------------------------------------------------------------------------------- options
PROGRAM = os.environ.get("PETSEG_PROGRAM") or f"python {sys.argv[0]}"  # as the user typed it
MODELS = ("unet", "resnet34_unet")
AUGMENT_BOUNDS = {"rotate": (0, 180), "zoom": (1, 10), "aspect": (1, 3)} | dict.fromkeys(
    ("flip", "vflip", "shift", "brightness", "contrast", "saturation", "cutmix"), (0, 1))
FULL = dict(flip=0.5, rotate=20, zoom=1.4, shift=0.1, brightness=0.3, contrast=0.3, saturation=1.0)
AUGMENT_PRESETS = {"none": {}, "flip": {"flip": 0.5}, "full": FULL,
                   "strong": FULL | {"zoom": 1.7, "aspect": 1.16, "cutmix": 0.5}}

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""
    def error(self, message):
        self.exit(2, f"petseg: {message}; see {self.prog} -h\n")

def number(kind, low, high=float("inf")):
    """The type of an option: an int or float within bounds."""
    def parse(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"expected {low} to {high}, not {text}")
    parse.__name__ = kind.__name__  # argparse names it where `kind` fails
    return parse

def image_size(text):
    """--size as (height, width): S, or HxW."""
    height, _, width = text.partition("x")
    return tuple(map(number(int, 32, 4096), (height, width or height)))

def parse_augment(text):
    """--augment as {name: strength}: a preset, or strengths, or both as in full,rotate=15."""
    parts = text.split(",")
    preset = AUGMENT_PRESETS[parts.pop(0)] if parts[0] in AUGMENT_PRESETS else {}
    strengths = {name: value for name, _, value in (part.partition("=") for part in parts)}
    if strengths.keys() <= AUGMENT_BOUNDS.keys():
        return preset | {n: number(float, *AUGMENT_BOUNDS[n])(x) for n, x in strengths.items()}
    raise argparse.ArgumentTypeError(f"expected {', '.join(AUGMENT_PRESETS)}, some of "
                                     f"{'=X,'.join(AUGMENT_BOUNDS)}=X, or both, not {text!r}")

COUNT, AMOUNT, FRACTION = number(int, 1, 2**31), number(float, 0), number(float, 0, 1)
# Every option: default, type or choices, help. First those of a run, its config; a new one is a
# line here, and config["NAME"] where it matters. `resolve_config` fills in what fits the machine.
OPTIONS = {
    "data": ("auto", str, "auto (the pets, or else toy pets), pets, toy, or a folder"),
    "root": ("data", str, "where downloaded data and the cache are kept"),
    "epochs": (20, COUNT, "passes over the training images"),
    "minutes": (None, number(float, 0.01), "instead of --epochs: as many as fit into this time"),
    "batch_size": (None, COUNT, "of all processes together: 16, or 32 on a GPU"),
    "size": (None, image_size, "image size, S or HxW: 128, or 256 on a GPU"),
    "width": (None, number(int, 8), "first level's channels: 64 on a GPU, else 16 or 32 (ResNet)"),
    "upsample": ("transpose", ("transpose", "bilinear"), "how the decoder upsamples"),
    "init_from": (None, str, "a best.pt to start from, instead of random weights"),
    "dropout": (0.0, FRACTION, "probability of dropout at the bottleneck"),
    "loss": ("bce_dice", ("bce_dice", "bce", "dice"), "the loss"),
    "optimizer": ("muon", ("muon", "adamw", "adam"), "the optimizer"),
    "lr": (None, AMOUNT, "peak learning rate: 0.02 for muon, else 0.004"),
    "weight_decay": (0.005, AMOUNT, "decoupled weight decay (not for adam)"),
    "schedule": ("cosine", ("cosine", "constant", "plateau", "exponential", "inverse_sqrt"),
                 "learning-rate schedule"),
    "warmup": (0.15, FRACTION, "fraction of the run that warms up, where the schedule does"),
    "gamma": (0.99, FRACTION, "factor per epoch, for exponential"),
    "grad_clip": (1.0, AMOUNT, "largest gradient norm, 0 for no limit"),
    "grad_accum": (1, COUNT, "batches per optimizer step"),
    "ema": (0.99, FRACTION, "decay of the moving average (EMA) of the weights, 0 for none"),
    "augment": (None, parse_augment, "none, flip, full, strong (from 100 epochs), full,rotate=15"),
    "augment_prob": (1.0, FRACTION, "probability that an image is augmented"),
    "progressive": (0.85, FRACTION, "fraction of the epochs that train on smaller images"),
    "repeat": (1, COUNT, "times that an image appears in an epoch"),
    "border": ("foreground", ("foreground", "background", "ignore", "random", "class"),
               "what a trimap's border is in training; class: a class of its own"),
    "classes": (None, ("pet", "species", "19", "30"), "pets: pet or species; Cityscapes: 19 or 30"),
    "class_weights": ("auto", ("auto", "none", "inverse", "sqrt"), "auto: sqrt beyond two classes"),
    "grad_checkpoint": (False, bool, "gradient checkpointing: less memory, a quarter more time"),
    "precision": ("auto", ("auto", "bf16", "fp32"), "auto: bfloat16 where the hardware has it"),
    "seed": (0, number(int, 0, 2**63 - 1), "of every random draw"),
    "save_every": (0, number(int, 0), "also keep a numbered checkpoint every so many epochs"),
    "checkpoint_minutes": (5.0, AMOUNT, "save last.pt within an epoch too; 0 for never"),
    "threads": (None, COUNT, "CPU threads: OMP_NUM_THREADS, or the cores; a resume keeps its own"),
    "max_pixels": (None, COUNT, "images with more pixels are refused: 50 million"),
}
OTHER_OPTIONS = {
    "json": (False, bool, "end with the result as one JSON object"),
    "name": (None, str, "the run's folder in --out; if it is there, the run goes on"),
    "resume": (None, str, "go on with the run in this folder"),
    "out": (None, str, "where the results go"),
    "ckpt": (Path(__file__).parent / "weights/unet.pt", Path, "a best.pt, or the run's folder"),
    "threshold": (0.5, FRACTION, "foreground from this probability on (two classes; cut-outs)"),
    "tta": (True, bool, "test-time augmentation, the default: averages flipped, rescaled views"),
    "device": ("auto", ("auto", "cpu", "cuda"), "where to compute"),
    "url": ("https://www.robots.ox.ac.uk/~vgg/data/pets/data/", str, "a mirror of the pets"),
    "split": ("test", ("train", "val", "test"), "the split to score"),
    "save": (None, str, "some of mask,overlay,cutout,panel; by default the first three"),
    "background": (None, str, "of cut-outs: a colour such as white or #ff8800, an image, or blur"),
    "crop": (False, bool, "crop cut-outs to the animal, with a margin"),
    "skip_existing": (False, bool, "leave out images whose results are there already"),
    "baseline": (False, bool, "measure the loop that one usually writes, without the speed-ups"),
}

def command_line():
    """The parser. An option of a run that is not typed is None: so a resume can tell."""
    parser = Parser(prog=PROGRAM, description="Segments pets from photos, pixel by pixel.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, options="", **defaults):
        sub = commands.add_parser(name, help=text, description=text)
        for option in ["json", *options.split(), *defaults]:
            usual, kind, help = (OPTIONS | OTHER_OPTIONS)[option]
            default = defaults.get(option, None if option in OPTIONS else usual)
            shown = default or (usual if name == "train" else None)
            help += f" ({shown})" if shown is not None and kind is not bool else ""
            how = ({"action": argparse.BooleanOptionalAction} if kind is bool else
                   {"choices": kind} if isinstance(kind, tuple) else {"type": kind})
            sub.add_argument(f"--{option.replace('_', '-')}", default=default, help=help, **how)
        return sub

    machine = "device threads precision url max_pixels"
    model = f"threshold tta {machine} data root"
    command("train", "train from scratch, score the test split, draw the curves",
            f"name resume device url {' '.join(OPTIONS)}", out="runs"
            ).add_argument("model", nargs="?", choices=MODELS)
    command("eval", "score a split; per-breed table; gallery of the worst images",
            f"ckpt {model} split out")
    command("infer", "masks, overlays, cut-outs of images, or of the test split",
            f"ckpt {model} save background crop skip_existing", out="predictions"
            ).add_argument("images", nargs="*", metavar="IMAGE|FOLDER|-")
    command("compare", "curves of several runs, the same images by each, and a table",
            f"{model} split", out="comparison").add_argument("runs", nargs="+", metavar="RUN")
    command("data", "fetch, verify, or draw the data", "data url max_pixels classes", root="data"
            ).add_argument("action", nargs="?", choices=("get", "check", "toy"), default="check")
    command("export", "a file for use with torch alone", "ckpt", out="model.pt2")
    command("summary", "a table of layers: shape, parameters, multiply-adds",
            "device size width upsample").add_argument("model", choices=MODELS)
    command("bench", "images per second, peak memory; of the plain loop: --baseline",
            f"{machine} size width batch_size grad_checkpoint baseline", data="toy", root="data"
            ).add_argument("model", choices=MODELS)
    return parser

# parsed before torch is imported, which takes a second: --help and errors of usage come at once
if __name__ == "__main__":
    ARGS = command_line().parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes in that second

import bisect
import copy
import json
import math
import re
import subprocess
import time
import warnings
import zipfile
from collections import namedtuple
from datetime import datetime, timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import layers
from data import UserError, log, print_result

# torchrun starts this program several times, and numbers the processes; rank 0 logs and writes
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ----------------------------------------------------------------------------------------- train
def train_step(config, model, optimizers, train_set, indices, epoch, step, class_weights=None):
    """One optimizer step on the images `indices`, a micro-batch at a time; it is skipped where its
    gradients are not finite. Returns the sums of (loss, images, Dice and IoU of class 1) and the
    confusion matrix. Each random draw is a function of seed, epoch, step, micro-step and rank."""
    device, classes = next(model.parameters()).device, len(config["class_names"])
    size, seed = layers.train_image_size(config, epoch), config["seed"]
    sums = torch.zeros(4, device=device)
    confusion = torch.zeros(classes, classes, dtype=torch.long, device=device)
    torch.manual_seed(data.seeded_generator("dropout", seed, epoch, step, RANK).initial_seed())
    for micro_step, batch in enumerate(indices.split(config["batch_size"])):
        batch = batch[RANK::WORLD_SIZE]  # every WORLD_SIZE-th image
        images, labels = data.get_batch(train_set, batch, device)
        if not len(batch):  # the last batch is too small for this rank: it contributes zeros
            model(images).sum().backward()
            continue
        rng = data.seeded_generator("augment", seed, epoch, step, micro_step, RANK)
        if config["augment"] or size != config["size"]:
            images, labels = data.augment(images, labels, rng, size, config["augment_prob"],
                                          **config["augment"])
        target = data.labels_to_target(labels, config["border"], rng, classes)
        with torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "bf16"):
            logits = model(data.normalize(images))
        loss = layers.LOSSES[config["loss"]](logits, target, class_weights)
        # the gradient of one large batch, unless pixels are ignored or weighted: a mean over images
        (loss * len(batch) / len(indices)).backward()

        mask = layers.logits_to_mask(logits.detach())
        matrices = layers.confusion_matrix(mask, target, classes)
        dice, iou = (each[:, 1].sum() for each in layers.dice_and_iou(matrices))
        sums += torch.stack((loss.detach() * len(batch), sums.new_tensor(len(batch)), dice, iou))
        confusion += matrices.sum(dim=0)
    if WORLD_SIZE > 1:
        all_reduce_model(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"] or math.inf)
    for optimizer in optimizers:
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
    return [all_reduce(torch.where(norm.isfinite(), each, 0)) for each in (sums, confusion)]

def train(args):
    """Trains a model, or goes on with a run; then scores the test split or, without one, val."""
    device = pick_device(args.device)
    folder, config, last = open_run(args, device)
    if last and config["processes"] == WORLD_SIZE:  # with as many threads it is bit-exact
        torch.set_num_threads(config["threads"])
    dataset = load_dataset(config, args.url)
    train_set = data.open_split(dataset, "train", config["size"], config["root"])
    val_set = data.open_split(dataset, "val", config["size"], config["root"])
    all_reduce(torch.zeros(1))  # a barrier: rank 0 may write when all have read last.pt
    config |= {"random_split": dataset.random_split, "class_names": dataset.class_names}
    class_weights = layers.class_weights(
        config["class_weights"], class_frequencies(dataset, train_set, config)).to(device)
    train_set = data.to_gpu(train_set, device)

    torch.manual_seed(config["seed"])
    model = build_model(config).to(device)
    if config["init_from"] and not last:
        init_from(model, config)
    final = "test" if dataset.splits.get("test") else "val"  # what is scored at the end
    if config["minutes"] and not last:
        test_set = data.open_split(dataset, final, config["size"], config["root"])  # decodes it now
        epochs = epochs_in_minutes(config, model, train_set, val_set, len(test_set.names))
        config |= resolve_config(vars(args) | {"epochs": epochs}, device)
    ema_model, optimizers = copy.deepcopy(model), layers.make_optimizers(model, config)

    run = argparse.Namespace(  # where it stands
        epoch=1, step=0, seconds=0.0, history=[], val_scores=[], train_images=train_set.names,
        sums=torch.zeros(4), confusion=torch.zeros(2 * [len(dataset.class_names)]).long())
    state = folder, run, config, model, ema_model, optimizers
    if RANK == 0 and data.take_lock(folder, wait=False) is None:
        raise UserError(f"another process is training in {folder}; stop it, or wait for its end")
    if last:
        restore(last, *state)
    run.sums, run.confusion = run.sums.to(device), run.confusion.to(device)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    record_machine(folder, config, last, device)
    if run.epoch > config["epochs"]:
        log("it is finished; --epochs prolongs it, another --name begins a new run")
    saved = save_last(*state)  # at once, so that a full disk shows now
    epoch_starts, signals = layers.epoch_progress(config), catch_signals()

    while run.epoch <= config["epochs"]:
        start = time.monotonic() - run.seconds
        rng, n = data.seeded_generator("shuffle", config["seed"], run.epoch), len(train_set.names)
        order = torch.randperm(n * config["repeat"], generator=rng) % n
        steps = order.split(config["batch_size"] * config["grad_accum"])
        model.train()
        for step in data.progress(range(run.step, len(steps)), f"epoch {run.epoch}", len(steps),
                                  run.step, "steps"):
            overdue = time.monotonic() - saved > 60 * (config["checkpoint_minutes"] or math.inf)
            signum, overdue = all_reduce(torch.tensor([max(signals, default=0), overdue]),
                                         dist.ReduceOp.MAX).tolist()  # all ranks do the same
            if signum or overdue:
                run.step = step
                saved = save_last(*state)
            if signum:
                log(f"petseg: stopped in epoch {run.epoch} and saved; to go on: {PROGRAM} train "
                    f"--resume {shlex.quote(str(folder))}")
                raise SystemExit(128 + signum)

            middle = run.epoch - 1 + (step + 0.5) / len(steps)  # of the step, in epochs
            progress = float(np.interp(middle, range(len(epoch_starts)), epoch_starts))
            lr = layers.SCHEDULES[config["schedule"]](config, progress, run.val_scores)
            for group in groups:
                group["lr"] = lr * group["lr_scale"]
            sums, confusion = train_step(config, model, optimizers, train_set, steps[step],
                                         run.epoch, step, class_weights)
            run.sums += sums
            run.confusion += confusion
            layers.update_ema(ema_model, model, config["ema"], (run.epoch - 1) * len(steps) + step)
            run.seconds = time.monotonic() - start

        predictor = Predictor(ema_model, config, tta=False)  # 1.8 s for the pets' val; with TTA 7
        best = record_epoch(folder, run, config, lr, *evaluate(predictor, val_set, class_weights))
        if RANK == 0:
            # last.pt comes last: killed before it, the epoch is done again and writes the same
            if best or not (folder / "best.pt").exists():
                save_model(folder / "best.pt", ema_model, config, run.history)
            if config["save_every"] and run.epoch % config["save_every"] == 0:
                save_model(folder / f"epoch-{run.epoch}.pt", ema_model, config, run.history)
            for name in ("train.json", "val.json", "test.json"):
                (folder / name).unlink(missing_ok=True)  # scores of fewer epochs
            data.write_csv(folder / "metrics.csv", run.history)
            data.draw_curves(folder / "curves.png", {folder.name: run.history},
                             layers.score_names(config["class_names"])[0])
            draw_samples(folder / "samples.png", {"prediction": (predictor, val_set)},
                         torch.linspace(0, len(val_set.names) - 1, 8).int().unique())
        run.epoch, run.step, run.seconds = run.epoch + 1, 0, 0.0
        run.sums, run.confusion = run.sums * 0, run.confusion * 0
        saved = save_last(*state)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if signals:  # one that came after the last step
        signal.raise_signal(signals[0])
    score_split(argparse.Namespace(**vars(args) | {
        "ckpt": folder / "best.pt", "out": folder, "split": final, "threshold": 0.5, "tta": True,
        **{name: config[name] for name in ("data", "root", "precision")}}))

def evaluate(predictor, split, class_weights=None):
    """Predicts every image of a split: (mean loss, confusion matrix of each image)."""
    n, config, device = len(split.names), predictor.config, predictor.device
    classes, loss_sum = len(config["class_names"]), torch.zeros((), device=device)
    confusion = torch.zeros(n, classes, classes, dtype=torch.long, device=device)
    batch_size = max(1, min(32, config["batch_size"] // WORLD_SIZE))  # what training has room for
    for start in range(RANK, n, batch_size * WORLD_SIZE):
        shard = slice(start, start + batch_size * WORLD_SIZE, WORLD_SIZE)
        images, labels = data.get_batch(split, torch.arange(n)[shard], device)
        target, logits = eval_target(config, labels), predictor.logits(images)
        loss_sum += layers.LOSSES[config["loss"]](logits, target, class_weights) * len(images)
        mask = layers.logits_to_mask(logits, predictor.threshold)
        confusion[shard] = layers.confusion_matrix(mask, target, classes)
    return float(all_reduce(loss_sum)) / n, all_reduce(confusion).cpu()

def eval_target(config, labels):
    """Labels to the target of scores: a border counts as the class it borders, or as its own."""
    border = "class" if config["border"] == "class" else "foreground"
    return data.labels_to_target(labels, border, classes=len(config["class_names"]))

# ------------------------------------------------------------------- what train and evaluate call
def epochs_in_minutes(config, model, train_set, val_set, n_test):
    """How many epochs --minutes leaves time for. On a copy of the model a step is timed at each
    image size, and prediction by four views, by which `n_test` images are scored at the end."""
    start, model, batch = time.monotonic(), copy.deepcopy(model), config["batch_size"]
    optimizers, predictor = layers.make_optimizers(model, config), Predictor(model, config)
    timed = config | {"epochs": 3, "progressive": 0.7}  # an epoch at 1/2, 3/4 and the full size
    step_images = batch * config["grad_accum"]
    step_time = {layers.train_image_size(timed, epoch): seconds_per_batch(
        lambda indices: train_step(timed, model, optimizers, train_set, indices, epoch, 0)[0],
        train_set, step_images) for epoch in (1, 2, 3)}
    image_time = seconds_per_batch(lambda i: predictor.logits(data.get_batch(
        val_set, i, predictor.device)[0]), val_set, batch) / batch / WORLD_SIZE
    steps = math.ceil(len(train_set.names) * config["repeat"] / step_images)
    val_time = len(val_set.names) * image_time / len(TTA_VIEWS) + 1  # a second for curves and files

    def duration(epochs):
        sizes = [layers.train_image_size(config | {"epochs": epochs}, e + 1) for e in range(epochs)]
        return sum(steps * step_time[size] + val_time for size in sizes) + n_test * image_time

    left = 60 * config["minutes"] - (time.monotonic() - start)
    epochs = max(1, bisect.bisect(range(1, 10_001), left, key=duration))  # the most that fit
    epochs = int(all_reduce(torch.tensor(epochs), dist.ReduceOp.MIN))
    log(f"--epochs {epochs}: about {duration(epochs) / 60:.1f} of {config['minutes']:g} minutes")
    return epochs

def seconds_per_batch(work, split, batch_size):
    """The mean time of work(indices) for twelve batches at random, after three to warm up."""
    times = []
    for indices in torch.randint(len(split.names), (15, batch_size)):
        work(indices).cpu()  # waits for a GPU
        times.append(time.perf_counter())
    return (times[-1] - times[2]) / 12

def pick_device(name):
    """The device of this name; auto is a CUDA GPU where there is one. A Mac computes on its CPU: by
    https://github.com/pytorch/pytorch/issues/175189 its GPU gets batch norm's gradients wrong."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU here; try --device cpu")
    torch.backends.cudnn.deterministic = True  # same seed, same weights; not with bilinear
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")

def pick_precision(name, device):
    """The precision, bf16 or fp32; auto is bfloat16 where the hardware multiplies it faster."""
    if name not in (None, "auto"):
        return name
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast else "fp32"

def load_dataset(config, url):
    """The dataset of a config."""
    data.set_max_pixels(config["max_pixels"])
    folder = data.find_data(config["data"], config["root"], url)
    return data.scan_dataset(folder, config["classes"], config.get("random_split"),
                             border_class=config["border"] == "class")

def class_frequencies(dataset, split, config):
    """The fraction of each class in a split's pixels, borders counted as in scores; logs them."""
    names = config["class_names"]
    pixels = sum(np.bincount(labels.ravel(), minlength=256) for labels in split.labels)
    target = eval_target(config, torch.arange(256, dtype=torch.uint8))  # label to class
    counts = torch.bincount(target, torch.from_numpy(pixels).double())[:len(names)]
    frequencies = counts / counts.sum().clamp(min=1)
    if absent := [name for name, f in zip(names, frequencies) if not f]:
        warnings.warn(f"no training pixel is {', '.join(absent)}; are the masks read rightly?")
    parts = [f"{len(samples):,} {name}" for name, samples in dataset.splits.items()]
    parts += [f"{name} {f:.1%}" for name, f in zip(names, frequencies.tolist())]
    log(f"{dataset.folder}: {dataset.layout}; {', '.join(parts)} of the training pixels")
    return frequencies

def build_model(config, device="cpu"):
    """The model of a config, channels-last; on "meta" even an absurd width takes no memory."""
    classes = len(config["class_names"])
    with torch.device(device):
        model = layers.MODELS[config["model"]](
            classes=classes if classes > 2 else 1,  # two have one logit
            width=config["width"], upsample=config["upsample"], dropout=config["dropout"])
    model.gradient_checkpointing = config["grad_checkpoint"]
    return model.to(memory_format=torch.channels_last)

# (scale, flipped): the flip gains 0.003 to 0.005 of val Dice (14 runs), the scales up to 0.003 (9)
TTA_VIEWS = ((1, False), (1, True), (0.75, False), (1.25, True))

# probs (C, h, w) at the model's size; mask (H, W): class indices; clean: probs without islands
Segmentation = namedtuple("Segmentation", "photo probs mask clean")

class Predictor:
    """A fused copy of a model. A photo is a path, a PIL image, an array, or a Segmentation."""

    def __init__(self, model, config, threshold=0.5, tta=True):
        self.config, self.threshold, self.tta = config, threshold, tta
        self.device, self.dtype = model.head.weight.device, layers.DTYPES[config["precision"]]
        self.model = layers.fuse_conv_bn(model, self.dtype)

    @torch.inference_mode()
    def logits(self, images):
        """Images (B, 3, H, W) in 0..1 to logits; with `tta` those of the mean probabilities."""
        x = data.normalize(images)
        if not self.tta:
            return self.model(x.to(self.dtype)).float()
        size, mean = x.shape[2:], 0
        for scale, flipped in TTA_VIEWS:
            view = F.interpolate(x.flip(3) if flipped else x, layers.scale_size(size, scale),
                                 mode="bilinear", antialias=scale < 1)
            probs = layers.probabilities(self.model(view.to(self.dtype)).float())
            probs = F.interpolate(probs, size, mode="bilinear")
            mean += (probs.flip(3) if flipped else probs) / len(TTA_VIEWS)
        return mean.logit(eps=1e-6) if mean.shape[1] == 1 else mean.clamp(min=1e-6).log()

    def __call__(self, photo):
        """Probabilities (H, W) at the photo's size; of more than two classes (C, H, W)."""
        result = self.segment(photo)
        probs = [data.resize(p, result.mask.shape) for p in result.probs]
        return probs[0] if len(probs) == 1 else np.stack(probs)

    def segment(self, photo):
        """The Segmentation of a photo; one is returned as it is."""
        return photo if isinstance(photo, Segmentation) else next(self.segment_batch([photo]))

    def segment_batch(self, photos):
        """Yields a Segmentation of each photo, all predicted as one batch."""
        photos, size = [data.to_photo(photo) for photo in photos], self.config["size"]
        images = np.stack([data.resize(photo, size) for photo in photos])
        logits = self.logits(data.to_float_nchw(torch.from_numpy(images).to(self.device)))
        for photo, probs in zip(photos, layers.probabilities(logits).cpu().numpy()):
            mask = data.upsample_and_argmax(probs, photo.size[::-1], self.threshold)
            yield Segmentation(photo, probs, mask, data.without_islands(probs, self.threshold))

    def mask(self, photo):
        """The class of each pixel: white on black, or with a palette."""
        return data.colorize_mask(self.segment(photo).mask, self.config["class_names"])

    def overlay(self, photo):
        """The photo with its classes tinted and outlined."""
        result = self.segment(photo)
        mask = data.upsample_and_argmax(result.clean, result.mask.shape, self.threshold)
        return data.overlay(result.photo, mask, self.config["class_names"])

    def cutout(self, photo, background=None, crop=False):
        """The foreground with a soft edge (docs/cutouts.md): RGBA, or RGB on a background."""
        photo, _, _, clean = self.segment(photo)
        threshold, names = self.threshold, self.config["class_names"]
        scale = min(1, 96 / max(photo.size))
        size = tuple(max(1, round(n * scale)) for n in photo.size[::-1])
        image = torch.from_numpy(data.resize(photo, size)).permute(2, 0, 1) / 255
        foreground = clean[0] if len(clean) == 1 else 1 - clean[0]  # of several, all but class 0
        p = torch.from_numpy(data.resize(foreground, size))[None]
        is_pet = [n for n in names[1:] if n != "border"] in (["pet"], ["cat", "dog"])
        if is_pet and self.config["border"] in ("foreground", "class"):
            # the network has learned to keep a trimap's border: erode, from its rim to its middle
            p, threshold = -F.max_pool2d(-p, 5, 1, 2), 0.65 * threshold
        a, b = layers.guided_filter(image, p, radius=2).split((3, 1))
        # alpha = 4 (a · colour + b − threshold) + ½ in 0..1; the coefficients are for 0..255
        coefficients = torch.cat((4 * a, 255 * (4 * (b - threshold) + 0.5)))
        alpha = data.alpha_from_coefficients(photo, coefficients.numpy())
        # where a pixel is a mixture, the colour of the foreground is that of its opaque neighbours
        opacity = torch.from_numpy(data.resize(alpha, size))[None] / 255
        cut = data.cutout(photo, alpha, weighted_mean(image, opacity**4, 2))
        background = data.read_background(background)
        if background == "blur":
            background = data.to_image(weighted_mean(image, (1 - opacity)**4, 16))
        return data.finish_cutout(cut, background, crop)

def weighted_mean(image, weight, radius):
    """The mean colours of near pixels by weight, (H, W, 3) uint8; black where all weigh 0."""
    sums = layers.box_mean(torch.cat((image * weight, weight)), radius)
    return (255 * sums[:3] / sums[3:].clamp(min=1e-9)).byte().permute(1, 2, 0).numpy()

DIVERGED = "{} in epoch {} of {}; begin anew with a lower --lr, --grad-clip 1, or --precision fp32"

def record_epoch(folder, run, config, lr, val_loss, val_confusion):
    """Adds an epoch to the history and logs it, or ends a diverged run; returns if it is best."""
    loss, n, dice, iou = run.sums.tolist()
    if not (n and math.isfinite(val_loss)):
        raise UserError(DIVERGED.format("the loss is not finite", run.epoch, folder))
    names, (metric, other) = config["class_names"], layers.score_names(config["class_names"])
    train = layers.compute_metrics(run.confusion.cpu()[None], names) | {
        "loss": loss / n, "dice": dice / n, "iou": iou / n}
    val = layers.compute_metrics(val_confusion, names) | {"loss": val_loss}
    height, width = layers.train_image_size(config, run.epoch)
    run.history.append({
        "epoch": run.epoch, "image_height": height, "image_width": width,
        **{f"train_{name}": train[name] for name in ("loss", metric, other)},
        **{f"val_{name}": val[name] for name in ("loss", metric, other)}, "lr": lr,
        "seconds": run.seconds, "images_per_second": n / run.seconds})
    best = val[metric] > max(run.val_scores, default=-1.0)
    run.val_scores.append(val[metric])
    log(f"epoch {run.epoch}/{config['epochs']}  {height}×{width}  train loss {train['loss']:.4f} "
        f"{metric} {train[metric]:.4f}  val loss {val_loss:.4f} {metric} {val[metric]:.4f}"
        f"{' *' if best else ''}  {run.seconds:.0f} s  {n / run.seconds:.0f} images/s")
    return best

def draw_samples(path, models, indices):
    """A grid of photo | ground truth | prediction of each model, {name: (predictor, split)}."""
    rows = [{} for _ in indices]
    for name, (predictor, split) in models.items():
        config, names = predictor.config, predictor.config["class_names"]
        images, labels = data.get_batch(split, indices, predictor.device)
        target = eval_target(config, labels)
        mask = layers.logits_to_mask(predictor.logits(images), predictor.threshold)
        scores = layers.image_scores(layers.confusion_matrix(mask, target, len(names)), names)
        for masks, truth, prediction, score in zip(rows, target.cpu(), mask.cpu(), scores):
            masks |= {"ground truth": truth.numpy(), f"{name}: {score:.3f}": prediction.numpy()}
    data.save_image(data.image_grid([  # the photos as the last model sees them
        data.panel(data.to_image(split.images[i]), split.names[i], masks, names, height=160)
        for i, masks in zip(indices, rows)], 1 if len(models) > 1 else 2), path)

def catch_signals():
    """From now on SIGINT and SIGTERM are only appended to a list, which the loop reads."""
    signals = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: signals.append(number))
    return signals

# --------------------------------------------------------------------------- runs and checkpoints
DEFAULTS = {"model": None} | {name: default for name, (default, *_) in OPTIONS.items()}
RESUME_OVERRIDES = {"epochs", "threads", "save_every", "checkpoint_minutes", "root", "data"}

def open_run(args, device):
    """The folder of a run, its config, and its last.pt, or None where it begins."""
    folder = Path(args.resume or Path(args.out, args.name or "."))
    if not (args.resume or args.name and any(folder.glob("*.pt"))):
        if not args.model:
            raise UserError(f"which model? {PROGRAM} train {', or train '.join(MODELS)}")
        if args.minutes and args.epochs:
            raise UserError("--minutes settles the number of epochs; leave out --epochs")
        where = data.find_data(args.data or "auto", args.root or "data", args.url).resolve()
        if args.data in (None, "auto"):
            args.data = "toy" if where.name == data.TOYS else "pets"
        run = os.environ.get("TORCHELASTIC_RUN_ID") or f"{datetime.now():%Y%m%d-%H%M%S-%f}"
        folder = Path(args.out, args.name or re.sub(r"\W", "-", f"{where.name}-{args.model}-{run}"))
        if not any(folder.glob("*.pt")):
            return folder, resolve_config(vars(args), device), None

    last = load_last(folder)
    old, auto = last["config"], {"data": "auto", "precision": "auto"}  # settled at start
    changed = {name: value for name, value in vars(args).items()
               if name in DEFAULTS and value not in (None, old[name], auto.get(name))}
    for name in sorted(changed.keys() - RESUME_OVERRIDES):
        raise UserError(f"{folder} was begun with --{name.replace('_', '-')} {old[name]}, not "
                        f"{changed[name]}; leave it out, or begin a new run with another --name")
    return folder, old | changed, last

def resolve_config(options, device):
    """Every option of a run: what was typed, else what fits the machine and other options."""
    typed = {name: options[name] for name in DEFAULTS if options.get(name) is not None}
    config = DEFAULTS | {"command": shlex.join(["petseg.py", *sys.argv[1:]])}
    if "init_from" in typed:
        start = load_checkpoint(typed["init_from"])["config"]
        model = {name: start[name] for name in ("model", "width", "upsample")}
        if any(typed.get(name, value) != value for name, value in model.items()):
            raise UserError(f"the weights in {typed['init_from']} are of another model, {model}")
        config |= model | {"size": start["size"]}
    config |= typed
    config["precision"] = pick_precision(config["precision"], device)
    gpu, resnet = device.type == "cuda", config["model"] == "resnet34_unet"
    # val Dice of `full` and `strong` (a run each): 0.910, 0.897 in 11 epochs; 0.934, 0.937 in 250
    preset = "strong" if config["epochs"] >= 100 else "full"
    fitting = {"size": (256, 256) if gpu else (128, 128), "batch_size": 32 if gpu else 16,
               "width": 64 if gpu else 32 if resnet else 16, "augment": AUGMENT_PRESETS[preset],
               "lr": 0.02 if config["optimizer"] == "muon" else 0.004}
    return config | {name: value for name, value in fitting.items() if config[name] is None}

def record_machine(folder, config, last, device):
    """Says what runs where, notes it in the config, and warns where it is not exact."""
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, text=True,
                         capture_output=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    config |= {"device": name, "threads": torch.get_num_threads(), "processes": WORLD_SIZE,
               "system": sys.platform, "python": sys.version,
               "torch": str(torch.__version__), "commit": git.stdout.strip() or None}
    log(f"{'resuming' if last else 'training'} {folder} on {name}, processes × threads: "
        f"{WORLD_SIZE} × {config['threads']}")
    if last and any(last["config"][k] != config[k] for k in ("device", "threads", "processes")):
        log("warning: other device, processes or threads than before: not bit-exact any more")

def save_checkpoint(path, content, keep_as=None):
    """Writes a checkpoint so that at any moment the old or the new one is there, complete."""
    with data.atomic_path(path) as new, open(new, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
        if keep_as and path.exists():
            os.replace(path, keep_as)
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the file's name is an entry of its folder
        os.close(folder)

def load_checkpoint(path, kind="best.pt"):
    """Reads a best.pt or last.pt. It may come from anywhere: nothing in it is executed; its CRCs
    must be right, its config that of a model, its weights finite and those of that model."""
    path = Path(path) / kind if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"there is no {path}" + "; an epoch makes it" * (path.name == "best.pt"))
    path.open("rb").close()  # else a lack of permission would pass for damage
    try:
        with zipfile.ZipFile(path) as file:
            if any(p.compress_type or p.external_attr for p in file.infolist()) or file.testzip():
                raise ValueError("a zip bomb, or a flipped bit")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not {"config", "weights" if kind == "best.pt" else "ema"} <= content.keys():
            raise UserError(f"{path} is not the {kind} of a run, or of an older version of petseg; "
                            "a last.pt: --resume its folder; an old best.pt must be trained again")
        config = content["config"] = DEFAULTS | content["config"]
        names, (height, width) = config["class_names"], config["size"]
        if not (32 <= height <= 4096 and 32 <= width <= 4096 and 2 <= len(names) <= 101
                and all(isinstance(name, str) for name in names)):
            raise ValueError("not a config that petseg writes")
        for weights in [content[key] for key in ("weights", "model", "ema") if key in content]:
            # a copy, as torch notes in a state dict that it is to be assigned
            build_model(config, "meta").load_state_dict(dict(weights), assign=True)
            if not all(value.isfinite().all() for value in weights.values()):
                raise UserError(f"the weights in {path} are not all finite; take another file")
        return content
    except data.DECODE_ERRORS as error:  # torch's own words advise to execute what is in the file
        raise UserError(f"{path} is damaged, or holds no model of petseg") from error

def save_last(folder, run, config, model, ema_model, optimizers):
    """Writes last.pt and keeps the one before as previous.pt; returns the time."""
    # an inf or nan that was ever in the model stays in its EMA
    if not all(value.isfinite().all() for value in ema_model.state_dict().values()):
        raise UserError(DIVERGED.format("the weights are not finite", run.epoch, folder))
    if RANK == 0:
        data.write_text(folder / "config.json", json.dumps(config, indent=2))
        state = {"config": config, "model": model.state_dict(), "ema": ema_model.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers], **vars(run)}
        save_checkpoint(folder / "last.pt", state, folder / "previous.pt")
    return time.monotonic()

def load_last(folder):
    """The last.pt of a run or, where that cannot be used, its previous.pt."""
    for path in (folder / "last.pt", folder / "previous.pt"):
        try:
            return load_checkpoint(path, "last.pt")
        except UserError as error:
            log(f"warning: {error}")
    raise UserError(f"{folder} has no last.pt that can be used; begin anew with another --name; if "
                    f"there is a best.pt, from its weights: --init-from {folder}/best.pt")

def restore(last, folder, run, config, model, ema_model, optimizers):
    """Puts what a last.pt holds into a run."""
    here = run.train_images, config["class_names"]
    if (last["train_images"], last["config"]["class_names"]) != here:
        raise UserError(f"the images or classes are not those of {folder}; take another --name")
    for part, state in zip((model, ema_model, *optimizers),
                           (last["model"], last["ema"], *last["optimizers"])):
        part.load_state_dict(state)
    vars(run).update({name: last[name] for name in vars(run)})

def init_from(model, config):
    """Starts from the weights of a best.pt; the head only where it has as many classes."""
    start = load_checkpoint(config["init_from"])
    weights, names = start["weights"], start["config"]["class_names"]
    if len(names) != len(config["class_names"]):
        log(f"{config['init_from']} has the classes {', '.join(names)}: the head starts at random")
        weights |= {f"head.{name}": value for name, value in model.head.state_dict().items()}
    model.load_state_dict(weights)

def save_model(path, model, config, history):
    """Writes a best.pt: the weights, in half precision, and how they came about."""
    weights = {name: (value.half() if value.dim() > 1 else value).cpu()
               for name, value in model.state_dict().items()}  # a variance may exceed half's 65504
    save_checkpoint(path, {"config": config, "weights": weights, "metrics": history[-1]})

def load(path, device="auto", precision="auto", threshold=0.5, tta=True):
    """The model of a best.pt, ready to predict: a Predictor."""
    device, content = pick_device(device), load_checkpoint(path)
    config, model = content["config"], build_model(content["config"], "meta")
    model.load_state_dict(content["weights"], assign=True)
    config["precision"] = pick_precision(precision, device)
    model = model.float().to(device, memory_format=torch.channels_last)
    return Predictor(model, config, threshold, tta)

# --------------------------------------------------------------------------- eval, infer, compare
def eval_dataset(args, config):
    """The dataset of `config`, in which --data, --root and --max-pixels replace what they name."""
    config |= {k: vars(args)[k] for k in ("data", "root", "max_pixels") if vars(args)[k]}
    dataset, names = load_dataset(config, args.url), config["class_names"]
    if dataset.class_names != names and not len(dataset.class_names) == len(names) == 2:
        raise UserError(f"{dataset.folder} has the classes {', '.join(dataset.class_names)}, the "
                        f"model {', '.join(names)}; name other data with --data, or another --ckpt")
    return dataset

def load_with_split(args, path):
    """The Predictor of a best.pt, and the split that it is to be scored on."""
    predictor = load(path, args.device, args.precision, args.threshold, args.tta)
    config, dataset = predictor.config, eval_dataset(args, predictor.config)
    return predictor, data.open_split(dataset, args.split, config["size"], config["root"])

def score_split(args):
    """Scores a split with a trained model: overall, and per class or breed; draws the worst."""
    all_reduce(torch.zeros(1))  # a barrier: at the end of train rank 0 has written best.pt
    predictor, split = load_with_split(args, args.ckpt)
    names, (_, confusion) = predictor.config["class_names"], evaluate(predictor, split)
    total = {"split": args.split, **layers.compute_metrics(confusion, names)}
    kind, rows = "classes", total.pop("classes", [])
    breed_of = np.array([data.escape_nonprintable(n).rpartition("_")[0] for n in split.names])
    if names == ["background", "pet"] and all(breed_of):  # images are named as those of the pets
        kind = "breeds"
        rows = [{"breed": breed, **layers.compute_metrics(confusion[breed_of == breed], names)}
                for breed in np.unique(breed_of).tolist()]
    result = total | {"checkpoint": str(args.ckpt), "data": predictor.config["data"],
                      "threshold": args.threshold, "tta": args.tta, kind: rows}
    # the usual scores of a run go into its folder; others are never written over
    run = args.ckpt.parent if args.ckpt.name == "best.pt" else args.ckpt
    usual = run.is_dir() and not args.data and args.tta and args.threshold == 0.5
    stamp = f"{run.resolve().name.removesuffix('.pt')}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    prefix = Path(args.out or (run if usual else Path("evaluation", stamp)), args.split)
    if RANK == 0:
        draw_samples(f"{prefix}-worst.png", {"prediction": (predictor, split)},
                     layers.image_scores(confusion, names).argsort(stable=True)[:12])
        data.write_text(f"{prefix}.json", json.dumps(result, indent=2))
        if rows:
            data.write_csv(f"{prefix}-{kind}.csv", rows)
        data.draw_confusion(f"{prefix}-confusion.png", confusion.sum(dim=0).numpy(), names)
    tables = "\n\n".join(data.format_table(table) for table in (rows, [total]) if table)
    print_result(args, f"{tables}\n\n{prefix}-worst.png", result | {"out": str(prefix.parent)})

def segment_images(predictor, samples, outputs, out, background, crop):
    """Segments a batch of images and writes them; {name: row of predictions.csv, or its error}."""
    names, rows, read = predictor.config["class_names"], {}, []
    for sample in samples:
        try:
            read.append((sample, *data.read_sample(sample)))
        except data.ImageError as error:
            rows[sample.name] = error
    results = predictor.segment_batch([photo for _, photo, _ in read])
    for (sample, _, labels), result in zip(read, results):
        name, path = sample.name, data.escape_nonprintable(str(sample.image))
        mask, tiles, metrics = result.mask, {"prediction": result.mask}, {}
        if labels is not None:
            target = eval_target(predictor.config, torch.from_numpy(labels)[None])
            confusion = layers.confusion_matrix(torch.from_numpy(mask)[None], target, len(names))
            tiles = {"ground truth": target[0].numpy()} | tiles
            metrics = layers.compute_metrics(confusion, names)
        render = {"mask": predictor.mask, "overlay": predictor.overlay,
                  "cutout": lambda result: predictor.cutout(result, background, crop),
                  "panel": lambda result: data.panel(result.photo, "photo", tiles, names)}
        for output in outputs:
            data.save_image(render[output](result), data.output_path(out, name, output))
        counts, box = data.to_image(mask).histogram(), data.to_image(mask).getbbox()
        if not box:
            log(f"no {' or '.join(names[1:])} found in {path}")
        probs = result.probs if len(names) > 2 else np.stack((1 - result.probs, result.probs))
        rows[name] = {"file": path, "output": name,
                      **{f"fraction of {c}": n / mask.size for c, n in zip(names, counts)},
                      **dict(zip(("left", "top", "right", "bottom"), box or ("",) * 4)),
                      "confidence": float(probs.max(axis=0).mean()),
                      **{m: metrics[m] for m in layers.score_names(names) if metrics}}
    return rows

def infer_outputs(args, out):
    """What --save names, or what is usual; into one file goes one output of one image."""
    file, images = data.is_file_name(out), [*map(Path, args.images)]
    usual = "cutout" if file else "mask,overlay,cutout" if args.images else "panel"
    outputs = (args.save or usual).split(",")
    if unknown := set(outputs) - data.OUTPUTS.keys():
        raise UserError(f"--save knows {', '.join(data.OUTPUTS)}, not {', '.join(unknown)}")
    single = len(images) == len(outputs) == 1 and not images[0].is_dir()
    if file and (not single or out.is_file() and out.resolve() == images[0].resolve()
                 or str(out) == "-" and args.json
                 or out.suffix.lower() not in ("", ".png", ".webp", ".jpg", ".jpeg")):
        raise UserError(f"{out} takes one output of one image, not itself, as png, webp, jpg, and "
                        f"stdout nothing else; as in {PROGRAM} infer cat.jpg --out cat.png")
    return outputs

def infer_samples(args, out, config):
    """What `infer` segments, {name of its outputs: sample}: images, or else the test split."""
    if args.images:  # of trimaps it is known what their values mean for a pet
        has_pets = "pet" in config["class_names"]
        samples = [data.Sample("", path, has_pets and data.find_ground_truth(path),
                               data.TRIMAP_TO_LABEL) for path in data.find_images(args.images)
                   if not (out.resolve() in path.resolve().parents  # an output of an earlier infer
                           and data.OUTPUTS.get(path.stem.rpartition("_")[2]) == path.suffix)]
    else:
        samples = data.get_samples(eval_dataset(args, config), "test")
    names = data.unique_names([sample.image.stem for sample in samples])
    return {name: sample._replace(name=name) for name, sample in zip(names, samples)}

def infer(args):
    """Segments images and writes what --save names: into a folder, with a table, or one file."""
    out = Path("-" if args.images == ["-"] and args.out == "predictions" else args.out)
    outputs, background = infer_outputs(args, out), data.read_background(args.background)
    predictor = load(args.ckpt, args.device, args.precision, args.threshold, args.tta)
    samples, table = infer_samples(args, out, predictor.config), out / "predictions.csv"
    old = data.read_predictions(table) if args.skip_existing and table.is_file() else {}
    rows = {name: old[name] for name, sample in samples.items() if name in old
            and old[name]["file"] == data.escape_nonprintable(str(sample.image))
            and all(data.output_path(out, name, output).is_file() for output in outputs)}
    todo = [sample for name, sample in samples.items() if name not in rows]
    old = {name: row for name, row in old.items() if name in rows or name not in samples}
    if table.is_file():  # the files of `todo` change from now on, and a kill may come
        data.write_csv(table, old.values())

    # each thread takes batches of four: UNet needs 20 ms a photo instead of 30 (bfloat16, Xeon)
    threads, failed = torch.get_num_threads(), []
    torch.set_num_threads(1)
    batch = max(1, min(4, len(todo) // threads))
    results = data.parallel_map(
        lambda part: segment_images(predictor, part, outputs, out, background, args.crop),
        [todo[i:i + batch] for i in range(0, len(todo), batch)], threads, errors=())
    if not data.is_file_name(out):
        data.take_lock(out, wait=False)  # clears away what a kill has left there
    try:
        for new in data.progress(results, "infer", len(todo), size=len):
            failed += [str(row) for row in new.values() if isinstance(row, UserError)]
            rows |= {name: row for name, row in new.items() if isinstance(row, dict)}
            if 0 < len(rows) % 100 <= batch and not data.is_file_name(out):  # a kill may come
                data.write_csv(table, (old | rows).values())
    finally:
        if rows and not data.is_file_name(out):
            data.write_csv(table, (old | rows).values())

    result = {"out": str(out), "images": len(samples) - len(failed),
              "skipped": len(samples) - len(todo), "failed": len(failed)}
    for name in layers.score_names(predictor.config["class_names"]):
        if scores := [float(row[name]) for row in rows.values() if row.get(name, "") != ""]:
            result |= {"scored": len(scores), name: sum(scores) / len(scores)}
    single = len(samples) == len(rows) == 1
    written = data.output_path(out, next(iter(rows)), outputs[-1]) if single else out
    if str(out) != "-":
        print_result(args, f"{data.format_table([result])}\n{written}", result | {"failed": failed})
    if failed:
        raise UserError(f"images could not be read: {len(failed)} of {len(samples)}:", *failed[:5])

def compare(args):
    """Scores runs on the same split; draws their curves, the same images by each, and a table."""
    out, folders = Path(args.out), [Path(folder).resolve() for folder in args.runs]
    histories, models, scores, rows, compared = {}, {}, [], [], set()
    for folder, run in zip(folders, data.unique_names([folder.name for folder in folders])):
        last, models[run] = load_checkpoint(folder, "last.pt"), load_with_split(args, folder)
        config, histories[run] = last["config"], last["history"]
        names, (_, confusion) = config["class_names"], evaluate(*models[run])
        metric, metrics = layers.score_names(names)[0], layers.compute_metrics(confusion, names)
        scores.append(layers.image_scores(confusion, names))
        compared.add((*(names if len(names) > 2 else ()), *models[run][1].names))
        rows.append({
            "run": run, "model": config["model"], "width": config["width"],
            **layer_table(config)[1], "size": "×".join(map(str, config["size"])),
            "epochs": len(histories[run]), "data": Path(config["data"]).name,
            f"best_val_{metric}": max(row[f"val_{metric}"] for row in histories[run]),
            **{f"{args.split}_{name}": metrics[name] for name in layers.score_names(names)},
            "minutes": sum(row["seconds"] for row in histories[run]) / 60,
            "machine": f"{config['device']}, {config['processes']} × {config['threads']} threads"})
    if len(compared) > 1:  # of two classes the names may differ
        raise UserError("these runs do not compare: images or classes differ; maybe --data FOLDER")
    spread, mean = torch.var_mean(torch.stack(scores), dim=0, correction=0)
    spaced = torch.tensor([0, 3, 6, 1, 4, 7, 2, 5]) * (len(mean) - 1) // 7
    ids = torch.cat((mean.argsort()[:2], spread.argsort()[-2:], spaced)).tolist()  # worst, unlike
    draw_samples(out / "predictions.png", models, torch.tensor([*dict.fromkeys(ids)][:8]))
    data.draw_curves(out / "curves.png", histories, metric)
    data.write_text(out / "table.md", table := data.format_table(rows))
    print_result(args, f"{table}\n{out}/", {"runs": rows, "out": args.out})

# ------------------------------------------------------------------- data, summary, export, bench
def manage_data(args):
    """Downloads the pets or draws the toys, if asked; reads all and says what is wrong."""
    choice = {"get": "pets", "toy": "toy"}.get(args.action, args.data or "auto")
    fetched = any(Path(args.root, data.PETS).glob("*/*"))
    if args.action == "check" and choice in ("auto", "pets") and not fetched:
        raise UserError(f"the pets were never fetched into {args.root}; {PROGRAM} data get does it")
    dataset = load_dataset(DEFAULTS | vars(args) | {"data": choice}, args.url)
    errors, notes, fractions = data.verify(dataset)
    rows = [{"split": "images"} | {s: len(samples) for s, samples in dataset.splits.items()},
            {"split": "errors"} | {s: len(errors[s]) for s in errors},
            *({"split": f"fraction of {name}"} | {s: float(fractions[s][i]) for s in errors}
              for i, name in enumerate(dataset.class_names))]
    failed = sum(errors.values(), [])
    about = {"folder": str(dataset.folder), "layout": dataset.layout}
    print_result(args, "\n".join([": ".join(about.values()), data.format_table(rows), *notes]),
                 about | {"table": rows, "errors": [*map(str, failed)], "notes": notes})
    if failed:
        raise UserError(f"images of {dataset.folder} that cannot be used: {len(failed)}:",
                        *[error.args[0] for error in failed[:5]], *failed[0].args[1:])

@torch.no_grad()
def layer_table(config):
    """A row for each innermost layer: its output, parameters, multiply-adds; and their sums."""
    rows, model = [], build_model(config, "meta")  # shapes without numbers
    def hook(name, layer, inputs, output):
        kind = type(layer).__name__
        # a convolution works for each output pixel, a transposed one for each input pixel
        pixels = (inputs[0] if kind == "TransposedConv" else output)[0, 0].numel()
        rows.append({"layer": name, "kind": kind, "output": "×".join(map(str, output.shape[1:])),
                     "parameters": sum(p.numel() for p in layer.parameters()),
                     "multiply_adds": pixels * layer.weight.numel() if "Conv" in kind else 0})

    for name, layer in model.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda *args, name=name: hook(name, *args))
    model(torch.zeros(1, 3, *config["size"], device="meta"))
    return rows, {name: sum(row[name] for row in rows) for name in ("parameters", "multiply_adds")}

def summary(args):
    """Prints the layers of a model, as `train` with these options would make it here."""
    config = resolve_config(vars(args), pick_device(args.device))
    rows, total = layer_table(config | {"class_names": ["background", "pet"]})
    about = {name: config[name] for name in ("model", "width", "size")}
    row = {"layer": args.model, "kind": f"width {config['width']}", "output": rows[-1]["output"]}
    print_result(args, data.format_table([*rows, row | total]), about | total | {"layers": rows})

@torch.no_grad()
def export(args):
    """Writes a model with its normalization as one file for use with torch, without petseg."""
    out = Path(args.out)
    if out.suffix != ".pt2":
        raise UserError(f"{out} must end in .pt2; name it with --out")
    warnings.simplefilter("ignore")  # torch's about itself
    predictor = load(args.ckpt, "cpu", precision="fp32")
    # dynamic: the batch, and sizes in multiples of 32 from 64 up (torch specializes on 1 at 32)
    dim, model = torch.export.Dim, layers.ExportModel(predictor.model, data.MEAN, data.STD)
    sizes = {0: dim("batch", min=1), 2: 32 * dim("rows", min=2), 3: 32 * dim("columns", min=2)}
    program = torch.export.export(model, (torch.zeros(2, 3, 64, 96),), dynamic_shapes=(sizes,))
    notes = {name: predictor.config[name] for name in ("model", "class_names", "size")}
    with data.atomic_path(out) as new, open(new, "wb") as file:
        torch.export.save(program, file, extra_files={"petseg.json": json.dumps(notes)})
    print_result(args, f"{out}: images (B, 3, H, W) in 0..1 to probabilities, H and W multiples of "
                 f"32 from 64 up, best {notes['size']}", {"out": str(out), **notes})

def bench(args):
    """Measures images per second in training and inference, and peak memory in GB."""
    device = pick_device(args.device)
    config = resolve_config(vars(args), device)
    dataset = load_dataset(config, args.url)
    config["class_names"] = dataset.class_names
    split = data.open_split(dataset, "train", config["size"], config["root"])
    split, model = data.to_gpu(split, device), build_model(config).to(device)

    def read_batch(split, indices, device):  # each image from its file, every time
        pairs = [data.read_pair(dataset.splits["train"][i], config["size"]) for i in indices]
        images, labels = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*pairs))
        return data.to_float_nchw(images).contiguous(), labels

    if args.baseline:  # what one usually writes: fp32, with torch's own layers and memory layout
        config["precision"] = "fp32"
        model.to(memory_format=torch.contiguous_format)
        data.get_batch, layers.fuse_conv_bn = read_batch, lambda m, _: copy.deepcopy(m).eval()
        layers.TransposedConv.forward = torch.nn.ConvTranspose2d.forward
    predictor = Predictor(model, config, tta=False)
    optimizers, epoch = layers.make_optimizers(model, config), config["epochs"]  # at full size
    works = {"train": lambda i: train_step(config, model, optimizers, split, i, epoch, 0)[0],
             "infer": lambda i: predictor.logits(data.get_batch(split, i, device)[0])}
    n = config["batch_size"]
    result = {name: n / seconds_per_batch(work, split, n) for name, work in works.items()}
    if device.type == "cuda":
        result["memory"] = torch.cuda.max_memory_allocated() / 1e9
    elif (status := Path("/proc/self/status")).is_file():
        result["memory"] = int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 / 1e9
    print_result(args, f"{data.format_table([result])}\nimages per second; GB", result)

# ------------------------------------------------------------------- several processes, and output
def init_distributed():
    """Joins torchrun's other processes; an operation waits for as long as a download may take."""
    restarts, store = "TORCHELASTIC_MAX_RESTARTS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    if os.environ.get(restarts, "0") != "0" and os.environ.get(store) != "1":
        raise UserError(f"--max-restarts needs {store}=1 before torchrun: else it hangs")
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(hours=1))

def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """The sum, or what `op` says, of a tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, op)
    return tensor

def all_reduce_model(model):
    """Data-parallel training: sums gradients and averages BatchNorm statistics over ranks."""
    tensors = [p.grad for p in model.parameters()]
    tensors += [b.div_(WORLD_SIZE) for b in model.buffers() if b.is_floating_point()]
    total = all_reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))

# ------------------------------------------------------------------------------------------- main
COMMANDS = {"train": train, "eval": score_split, "infer": infer, "compare": compare,
            "data": manage_data, "export": export, "summary": summary, "bench": bench}

def explain(error):
    """What went wrong, for people; None where it is a defect of the program."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save hides the error of a full disk
    if isinstance(error, UserError):
        return str(error)
    if re.search("MemoryError|ALLOC_FAILED|(out of|allocate|enough) memory", repr(error)):
        return "not enough memory; lower --batch-size, --size or --width; for infer --threads"
    if isinstance(error, OSError):
        return f"{error}; make room, change permissions, or take another place: --out or --root"
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return "another process has ended" + f", or NCCL: {error}" * ("gloo" not in str(error))

def main(args):
    """Runs a subcommand; turns what a user can cause into a message and an exit code."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # it may be closed
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clears away what is half-written
    warnings.showwarning = lambda message, *_: log(f"warning: {message}")
    try:
        data.set_max_pixels(vars(args).get("max_pixels"))
        torch.set_num_threads(vars(args).get("threads") or torch.get_num_threads())
        if WORLD_SIZE > 1 and args.command not in ("train", "eval"):
            raise UserError(f"{args.command} runs in one process; leave out torchrun")
        if dist.is_torchelastic_launched():
            init_distributed()
        COMMANDS[args.command](args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        log("petseg: interrupted" + "; to go on, add --skip-existing" * (args.command == "infer"))
        raise SystemExit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error.__cause__, SystemExit):  # SIGTERM in the midst of an import
            raise error.__cause__
        if not (message := explain(error)):
            raise
        log(f"petseg: {message}", every_rank=True)
        raise SystemExit(2)

if __name__ == "__main__":
    main(ARGS)
