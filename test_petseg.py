"""What petseg promises, in the order of its modules. Expected numbers come from the formula, as
plain as possible, or were worked out by hand. No test needs a network, a GPU, or a fast machine."""
import copy
import csv
import ctypes
import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from argparse import Namespace
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # else each copy below imports it anew, at 1.3 seconds
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn

import data
import layers
import petseg

PROGRAM = Path(__file__).with_name("petseg.py")
torch.set_num_threads(1)  # models this small gain nothing from a second one
os.environ |= {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(PROGRAM.parent),
               "CUDA_VISIBLE_DEVICES": "",  # a process that uses a GPU cannot make copies of itself
               **dict(re.findall(r"(MALLOC\w+)=(\d+)", PROGRAM.with_name("run.sh").read_text()))}
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL", "ignore::UserWarning:data")
MODELS, TWO = [*layers.MODELS.values()], ["background", "pet"]
TINY = ("--data", "toy", "--size", 32, "--width", 8)
CONFIG = petseg.resolve_config(  # of a tiny model
    {"model": "unet", "width": 8, "size": (32, 32), "epochs": 1, "batch_size": 4, "augment": {},
     "precision": "fp32"}, torch.device("cpu")) | {"class_names": TWO}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_petseg"])  # its copies have imported torch: two seconds sooner
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes

def nothing(*_):
    """Does nothing."""

def be_program(words, before, peak, *streams):
    """What such a copy does: it becomes the program; at the end it writes its peak memory."""
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where `&` started the tests
    before()
    sys.argv = [str(PROGRAM), *words]
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    finally:
        peak.write_text(str(RSS_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

@contextmanager
def start(*words, before=nothing):
    """A command as a user types it, beside the test, and what it says; it calls `before` first."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("peak", "stdout", "stderr")]
        for path in paths:
            path.touch()
        child = FORKS.Process(target=be_program, daemon=True,
                              args=([*map(str, words)], before, *paths))
        child.start()
        child.said = paths[2].read_text  # so far
        yield child
        child.join()
        child.peak, child.stdout, child.stderr = (path.read_text() for path in paths)
    assert "Traceback" not in child.stderr, child.stderr

def said_until(child, words):
    while child.is_alive() and words not in child.said():
        time.sleep(0.01)
    return words in child.said()

def run(*words, code=0, **options):
    with start(*words, **options) as child:
        pass
    assert child.exitcode == code, child.stderr
    return child

def answer(*words, **options):
    """The one JSON object that a command with --json ends with."""
    *others, last = run(*words, "--json", **options).stdout.splitlines()
    assert not any(line.startswith("{") for line in others)
    return json.loads(last)

def refused(*words, **options):
    """The one line that says what is wrong with a command, and indented lines of detail."""
    lines = run(*words, code=2, **options).stderr.splitlines()
    [first] = [i for i, line in enumerate(lines) if line.startswith("petseg: ")]
    assert all(line.startswith("  ") for line in lines[first + 1:])
    return "\n".join(lines[first:])

@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A --root that holds 40 + 10 toy pets; runs and caches come with the tests."""
    root = tmp_path_factory.mktemp("root")
    data.make_toys(root, trainval=40, test=10)
    return root

@pytest.fixture(scope="session")
def toys(root):
    """The folder of the toy pets, to be read only."""
    return root / data.TOYS

@pytest.fixture
def pets(toys, tmp_path):
    """A copy of the toy pets, to be spoilt."""
    return shutil.copytree(toys, tmp_path / "pets")

def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}

def read_rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))

# ---------------------------------------------------------------------------------------- layers
def test_encoder_computes_what_the_resnet34_of_the_paper_computes():
    torch.manual_seed(0)
    network, images = layers.ResNet34UNet(width=8).eval(), torch.randn(2, 3, 75, 102)
    for value in [v for v in network.state_dict().values() if v.dim() == 1]:
        value.uniform_(0.3, 0.9)  # batch norms as after some training
    weights = iter(network.encoder.state_dict().values())
    def conv_bn(x, stride=1):
        kernel, scale, shift, mean, variance, _ = (next(weights) for _ in range(6))
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2)
        return F.batch_norm(x, mean, variance, scale, shift)
    expected = [F.relu(conv_bn(images, stride=2))]
    x = F.max_pool2d(expected[0], 3, stride=2, padding=1)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            y = conv_bn(F.relu(conv_bn(x, stride)))
            x = F.relu(y + (conv_bn(x, stride) if stride == 2 else x))
        expected.append(x)
    for stage, output in zip(network.encoder, expected, strict=True):
        images = stage(images)
        torch.testing.assert_close(images, output, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("upsample", ["transpose", "bilinear"])
@pytest.mark.parametrize("model", MODELS)
def test_networks_take_any_size_and_a_batch_of_one(model, upsample):
    network = model(in_channels=2, classes=3, width=8, upsample=upsample).eval()
    for height, width in [(47, 63)] + [(n, 97 - n) for n in range(32, 66)]:
        assert network(torch.rand(2, 2, height, width)).shape == (2, 3, height, width)
    network.train()(torch.rand(1, 2, 32, 32)).sum().backward()  # 1×1 at the ResNet's bottom
    assert all(p.grad.isfinite().all() for p in network.parameters())

@pytest.mark.parametrize("upsample", ["transpose", "bilinear"])
@pytest.mark.parametrize("height, width", [(8, 10), (9, 11), (7, 9), (9, 9)])
def test_up_concat_convolves_skip_and_upsampled_x_together(upsample, height, width):
    block = layers.UpConcat(2, 3, 5, upsample).eval()
    x, skip = torch.rand(2, 2, 4, 5), torch.rand(2, 3, height, width)
    upsampled = F.interpolate(x, scale_factor=2, mode="bilinear")
    if upsample == "transpose":
        upsampled = F.conv_transpose2d(x, block.up.weight, block.up.bias, stride=2)
    upsampled = F.pad(upsampled, (0, 1, 0, 1))[..., :height, :width]  # zero-padded or cropped
    expected = torch.cat((skip, upsampled), dim=1)
    for layer in block.conv:  # new batch norms in eval mode divide by √(1 + ε)
        expected = F.relu(F.conv2d(expected, layer.conv.weight, padding=1) / math.sqrt(1 + 1e-5))
    torch.testing.assert_close(block(x, skip), expected)

@pytest.mark.parametrize("model", MODELS)
def test_he_initialization(model):
    torch.manual_seed(0)
    for module in model(width=16).modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight.numel() > 2000:
            taps = 1 if isinstance(module, nn.ConvTranspose2d) else math.prod(module.kernel_size)
            expected = math.sqrt(2 / (module.in_channels * taps))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.08)
            assert module.bias is None or not module.bias.any()
        if isinstance(module, layers.BasicBlock):  # starts as its shortcut
            x = torch.randn(2, module.conv1.conv.in_channels, 4, 4)
            assert torch.equal(module(x), F.relu(module.shortcut(x)))

@pytest.mark.parametrize("model", petseg.MODELS)
def test_gradient_checkpointing_changes_memory_and_nothing_else(model):
    images, results, saved = torch.rand(3, 3, 64, 64), [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        options = {"model": model, "dropout": 0.5, "grad_checkpoint": checkpointing}
        network, sizes = petseg.build_model(CONFIG | options), []
        hooks = (lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            network(images).square().mean().backward()
        saved.append(sum(sizes))
        results.append([*network.state_dict().values(), *(p.grad for p in network.parameters())])
    assert all(map(torch.equal, *results)) and saved[1] < saved[0] / 2
    assert not torch.equal(network(images), network(images))  # dropout drops

@pytest.mark.parametrize("model", MODELS)
def test_fused_model_says_the_same(model):
    torch.manual_seed(0)
    network, images = model(width=8).eval(), torch.rand(4, 3, 64, 64)
    for value in [v for v in network.state_dict().values() if v.dim() == 1]:
        value.uniform_(0.3, 0.9)  # batch norms as after some training
    expected, fused = network(images), layers.fuse_conv_bn(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(network(images), expected)  # the model itself is left alone

def slow_losses(logits, target, weights):
    """The losses by their formulas, pixel by pixel; one logit z is the pair 0, z."""
    first_class = 1 if logits.shape[1] == 1 else 0
    logits = torch.cat((0 * logits, logits), dim=1) if first_class else logits
    bce, weight_sum, dices = 0, 0, []
    for z, labels in zip(logits.flatten(2).mT, target.flatten(1).tolist()):
        pixels = [(a.exp() / a.exp().sum(), y) for a, y in zip(z, labels) if y != 255]
        bce -= sum(weights[y] * p[y].log() for p, y in pixels)
        weight_sum += sum(weights[y] for _, y in pixels)
        for c in range(first_class, z.shape[1]):
            intersection = sum(p[c] for p, y in pixels if y == c)
            cardinality = sum(p[c] + (y == c) for p, y in pixels)
            dices.append((2 * intersection + 1) / (cardinality + 1))
    bce, dice = bce / weight_sum, 1 - sum(dices) / len(dices)
    return {"bce": bce, "dice": dice, "bce_dice": bce + dice}

@pytest.mark.parametrize("classes, weights", [(1, None), (1, [1, 3]), (3, None), (3, [0.5, 0, 2])])
def test_losses_against_slow_loops_and_at_infinite_logits(classes, weights):
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, classes, 3, 4, generator=rng)
    target = torch.randint(max(2, classes), (3, 3, 4), generator=rng).to(torch.uint8)
    target[torch.rand(target.shape, generator=rng) < 0.2] = target[2] = 255
    for name, loss in layers.LOSSES.items():
        x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
        found = loss(x, target, torch.tensor(weights) if weights else None)
        expected = slow_losses(y, target, weights or [1] * 3)[name]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        (found + expected).backward()
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6)
        x = logits.mul(math.inf).requires_grad_()
        loss(x, target).backward()
        assert loss(x, target).isfinite() and x.grad.isfinite().all()
        assert loss(logits, target * 0 + 255) == 0  # all is ignored

@pytest.mark.parametrize("mode, frequencies, expected", [
    ("none", [0.6, 0.4], [1, 1]), ("inverse", [0.6, 0.4], [0.8, 1.2]), ("auto", [0.8, 0.2], [1, 1]),
    ("sqrt", [0.8, 0.2], [2 / 3, 4 / 3]), ("auto", [0.8, 0.2, 0], [2 / 3, 4 / 3, 0])])
def test_class_weights(mode, frequencies, expected):
    assert layers.class_weights(mode, torch.tensor(frequencies)).tolist() == pytest.approx(expected)

def slow_metrics(mask, target, label):
    """True positives, predicted and true pixels, Dice and IoU of a class, pixel by pixel."""
    pixels = zip(mask.flatten().tolist(), target.flatten().tolist())
    pairs = [(m == label, t == label) for m, t in pixels if t != 255]
    tp, fp, fn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True)))
    dice, iou = (2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)) if tp + fp + fn else (1, 1)
    return [tp, tp + fp, tp + fn, dice, iou]

def test_metrics_against_slow_loops():
    rng = torch.Generator().manual_seed(0)
    mask, target = torch.randint(2, (2, 6, 6, 7), generator=rng).to(torch.uint8)
    target[torch.rand(target.shape, generator=rng) < 0.2] = target[5] = 255  # 5: all is ignored
    mask[3] = target[3] = target[4] = 0  # an empty mask: 1 if nothing is predicted, else 0
    images = np.array([[slow_metrics(*pair, c) for c in range(3)] for pair in zip(mask, target)])
    total = np.array([slow_metrics(mask, target, c) for c in range(3)])
    tp, predicted, true, dice, iou = total[1]
    accuracy = total[:, 0].sum() / total[:, 2].sum()
    confusion = layers.confusion_matrix(mask, target, 3)
    counts = confusion.diagonal(dim1=1, dim2=2), confusion.sum(dim=1), confusion.sum(dim=2)
    assert (torch.stack(counts, dim=2).numpy() == images[..., :3]).all()
    assert layers.compute_metrics(confusion[:, :2, :2], TWO) == pytest.approx({
        "dice": images[:, 1, 3].mean(), "iou": images[:, 1, 4].mean(), "dataset_dice": dice,
        "dataset_iou": iou, "precision": tp / predicted, "recall": tp / true, "accuracy": accuracy,
        "images": 6})
    result = layers.compute_metrics(confusion, [*TWO, "nowhere"])
    for name, row, c in zip(TWO, result.pop("classes"), total[:2], strict=True):
        assert row == {"class": name, "dice": pytest.approx(c[3]), "iou": pytest.approx(c[4]),
                       "fraction": pytest.approx(c[2] / total[:, 2].sum())}
    assert result == pytest.approx({"mean_dice": total[:2, 3].mean(), "accuracy": accuracy,
                                    "mean_iou": total[:2, 4].mean(), "images": 6})
    for name, counts in ("precision", [[0, 0], [5, 0]]), ("recall", [[0, 5], [0, 0]]):
        assert layers.compute_metrics(torch.tensor([counts]), TWO)[name] is None

def test_ema_follows_its_formula_with_warm_up():
    model, ema_model = nn.BatchNorm2d(1), nn.BatchNorm2d(1)  # has weights, statistics, a counter
    expected = [value.item() for value in ema_model.state_dict().values()]
    for step in range(20):  # the decay grows from 1/10 and reaches 0.6 at step 13
        decay = min(0.6, (1 + step) / (10 + step))
        for i, value in enumerate([*model.state_dict().values()][:-1]):
            expected[i] = decay * expected[i] + (1 - decay) * value.uniform_().item()
        layers.update_ema(ema_model, model, 0.6, step)
        assert [v.item() for v in ema_model.state_dict().values()] == pytest.approx(expected, 1e-5)

def test_guided_filter_against_slow_loops():
    rng = torch.Generator().manual_seed(0)
    image, p = torch.rand(3, 7, 9, generator=rng), torch.rand(1, 7, 9, generator=rng)
    def windows(y, x, radius=2):
        return slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1)
    places, linear = [(y, x) for y in range(7) for x in range(9)], torch.zeros(4, 7, 9)
    for y, x in places:  # in each window ridge regression of p on the colours
        colours = image[(slice(None), *windows(y, x))].flatten(1).double()
        target = p[0][windows(y, x)].flatten().double()
        centred = colours - colours.mean(dim=1, keepdim=True)
        cov = centred @ centred.T / len(target) + 1e-2 * torch.eye(3)
        a = torch.linalg.solve(cov, centred @ target / len(target))
        linear[:, y, x] = torch.cat((a, target.mean()[None] - a @ colours.mean(dim=1)[:, None]))
    result = layers.guided_filter(image, p, radius=2, eps=1e-2)
    for y, x in places:
        expected = linear[(slice(None), *windows(y, x))].mean(dim=(1, 2))
        torch.testing.assert_close(result[:, y, x], expected, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("size, progressive, expected", [
    (128, 0.85, [128]), (128, 1.0, [64, 128]), (128, 0.0, [128] * 3), (33, 1.0, [32, 32, 33]),
    (128, 0.75, [64] * 6 + [96] * 3 + [128] * 3)])
def test_progressive_resizing(size, progressive, expected):
    epochs, pixels = len(expected), [n * n for n in expected]
    config = {"size": (size, size), "epochs": epochs, "progressive": progressive}
    for epoch, n in enumerate(expected, 1):
        assert layers.train_image_size(config, epoch) == (n, n)
    assert layers.epoch_progress(config) == pytest.approx(
        [sum(pixels[:done]) / sum(pixels) for done in range(epochs + 1)])

@pytest.mark.parametrize("name, warmup, expected", [
    ("constant", 0.2, {0.1: 0.5, 1: 0.5}), ("exponential", 0.2, {0.1: 0.5 * 0.9**3}),
    ("cosine", 0.2, {0.1: 0.25, 0.2: 0.5, 0.4: 0.25 + 0.125 * math.sqrt(2), 0.6: 0.25, 1: 0}),
    ("cosine", 0, {0.5: 0.25, 1: 0}), ("cosine", 1, {0.5: 0.25, 1: 0.5}),
    ("inverse_sqrt", 0.2, {0.1: 0.125, 0.2: 0.5, 0.8: 0.25}), ("inverse_sqrt", 0, {0.1: 0.05})])
def test_schedules(name, warmup, expected):
    config, val_scores = {"lr": 0.5, "warmup": warmup, "gamma": 0.9}, [0.3, 0.1, 0.2]
    for progress, lr in expected.items():
        assert layers.SCHEDULES[name](config, progress, val_scores) == pytest.approx(lr)

@pytest.mark.parametrize("lr, levels", [(0.5, 3), (0.5, 10), (0.5, 99), (1e-5, 1), (1e-7, 1)])
def test_plateau_is_torchs(lr, levels):
    scores = torch.randint(levels, (60,), generator=torch.Generator().manual_seed(0)) / levels
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=3, threshold=0, min_lr=1e-6)
    for epoch, score in enumerate(scores.tolist()):
        found = layers.SCHEDULES["plateau"]({"lr": lr}, 0.5, scores[:epoch].tolist())
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=0)
        scheduler.step(score)

@pytest.mark.parametrize("rows, columns, rank, dtype", [(5, 5, 3, None), (3, 40, 3, None), (
    40, 3, 3, None), (8, 8, 8, None), (64, 576, 8, None), (30, 20, 20, torch.bfloat16)])
def test_newton_schulz_evens_singular_values(rows, columns, rank, dtype):
    rng = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(3, n, rank, generator=rng)).Q for n in (rows, columns))
    scales = torch.tensor([1e-3, 1e3, 0]).view(3, 1, 1)
    smallest, atol = (-0.5, 0.02) if dtype else (-1.5, 0.002)
    matrices = u * torch.logspace(0, smallest, rank) * scales @ v.mT
    result = torch.stack(layers.newton_schulz(matrices, dtype=dtype or torch.float32)).float()
    values = (u.mT @ result @ v).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(u * values.unsqueeze(1) @ v.mT, result, rtol=0, atol=atol)
    assert 0.6 < values[:2].min() and values[:2].max() < 1.3 and not result[2].any()

@pytest.mark.parametrize("shape, scale", [((2, 2, 1, 1), 1), ((4, 3, 3, 3), 1), ((32, 2, 1, 1), 4)])
def test_muon_orthogonalizes_its_nesterov_momentum(shape, scale):
    rng, turn = torch.Generator().manual_seed(0), torch.tensor([[0.0, -3.0], [3.0, 0.0]])
    left, right = (torch.linalg.qr(torch.randn(4, n, 2, generator=rng)).Q
                   for n in (shape[0], math.prod(shape[1:])))
    weights = [nn.Parameter(torch.empty(shape, memory_format=torch.channels_last)) for _ in left]
    muon, momentum, lengths = layers.Muon([{"params": weights, "lr": 0.1}]), torch.zeros(2, 2), []
    # a sum of these is a rotation times a factor; orthogonalized, it is the rotation
    for gradient in (torch.eye(2), turn, turn, torch.eye(2), -turn, torch.eye(2)):
        for weight, matrix in zip(weights, left @ gradient @ right.mT):
            weight.data.zero_()
            weight.grad = matrix.reshape(shape)
        muon.step()
        moved = -torch.stack([*weights]).flatten(2) / (0.1 * scale)
        momentum = 0.95 * momentum + gradient
        expected = left @ F.normalize(gradient + 0.95 * momentum, dim=0) @ right.mT
        length = moved.norm(dim=(1, 2), keepdim=True) / math.sqrt(2)
        torch.testing.assert_close(moved, length * expected, rtol=0, atol=1e-3)
        lengths.append(length.flatten())
    lengths = torch.stack(lengths)
    assert 0.6 < lengths.mean(dim=0).min() and lengths.mean(dim=0).max() < 1.3
    even_moved, odd_moved = lengths[:, ::2] > 0, lengths[:, 1::2] > 0  # they take turns
    assert torch.equal(even_moved, ~odd_moved) and torch.equal(even_moved[1:], ~even_moved[:-1])

@pytest.mark.parametrize("name", petseg.OPTIONS["optimizer"][1])
def test_each_parameter_has_one_optimizer_and_its_weight_decay(name):
    model, config = layers.UNet(width=2), {"optimizer": name, "weight_decay": 0.5}
    model.context = nn.Conv2d(2, 2, 3)  # what a network adds beside the encoder and the decoder
    optimizers = layers.make_optimizers(model, config | {"precision": "fp32"})
    given = [id(p) for each in optimizers for group in each.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters())
    for p in model.parameters():
        p.data, p.grad = torch.ones_like(p), torch.zeros_like(p)
    for optimizer in optimizers * 2:
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        optimizer.step()
    for path, p in model.named_parameters():  # w ← (1 − lr · weight decay) w, twice
        decays = name != "adam" and (name != "muon" or p.dim() == 4 and "head" not in path)
        assert ((p - (0.98 if decays else 1)).abs() < 2e-4).all(), path

# ------------------------------------------------------------------------------------------ data
FUZZ = int(os.environ.get("PETSEG_FUZZ", 150))  # damaged files; for more: PETSEG_FUZZ=2000 -k fuzz
MOVES = dict(flip=0.5, vflip=0.5, rotate=25, zoom=1.4, aspect=1.2, shift=0.1)
PAIRS = [f"{folder}/{i}.png" for folder in ("images", "masks") for i in range(40)]
RED, BLUE, WHITE, GRAYS = (200, 30, 30), (30, 30, 200), (255, 255, 255), ((200,) * 3, (30,) * 3)
RED_BLUE = Image.new("RGB", (40, 30), RED)
RED_BLUE.paste(BLUE, (20, 0, 40, 30))
GRAY, PALETTE = RED_BLUE.getchannel("R"), RED_BLUE.quantize(4)
HALF = GRAY.point(lambda value: 255 * (value > 99))  # opaque beside transparent
WORDS = np.asarray(GRAY).astype(np.uint16)
FLOATS = np.where(np.arange(30)[:, None] > 9, WORDS, np.float32([np.nan, np.inf, -np.inf, 0] * 10))
DISTANCE = np.hypot(np.arange(200) - 100, np.arange(150)[:, None] - 75) - 50
DISC = np.uint8(255 * (DISTANCE < 0))  # an object of 26% of the pixels
BOX = np.pad(np.full((89, 99), 255, np.uint8), 8)  # as JPEG of quality 100 it holds 0, 1, 255
BLURRED, TOO_BLURRED = (np.uint8((127.5 - DISTANCE * n).clip(0, 255)) for n in (64, 25))

def outcome(function, *args):
    try:
        return function(*args)
    except data.UserError as error:
        return str(error)

def test_cache(pets, tmp_path, monkeypatch):
    def open_cache(split="train", classes="pet"):
        return data.open_split(data.scan_dataset(pets, classes), split, (64, 128), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in pets.rglob("*")}
    split, samples = open_cache(), data.scan_dataset(pets).splits["train"]
    assert times == {path: path.stat().st_mtime_ns for path in pets.rglob("*")}  # is only read
    for sample, pixels, labels in zip(samples, split.images, split.labels, strict=True):
        photo, trimap = Image.open(sample.image), np.asarray(Image.open(sample.mask))
        assert np.abs(np.int16(photo.resize((128, 64), Image.BILINEAR)) - pixels).mean() < 3
        y, x = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip((64, 128), trimap.shape))
        assert np.array_equal(labels, np.array([255, 1, 0, 129])[trimap[np.ix_(y, x)]])
    images, labels = data.get_batch(split, torch.tensor([2, 0]))
    assert np.allclose(images.permute(0, 2, 3, 1) * 255, split.images[[2, 0]], atol=1e-3)
    assert np.array_equal(labels, split.labels[[2, 0]])
    assert {*np.unique(open_cache(classes="species").labels)} == {0, 1, 2, 129, 130}
    path = samples[0].image
    path.write_bytes(bytes(path.stat().st_size))  # damaged, but of the same size and time
    os.utime(path, ns=(times[path], times[path]))
    assert np.array_equal(open_cache().images, split.images)
    os.utime(path)
    assert open_cache().names == split.names[1:]
    samples[3].image.unlink()
    samples[7].mask.unlink()
    for path in samples[9][1:3]:
        Image.open(path).resize((300, 300)).save(path)
    for pixels, broken in ((300 * 300 - 1, (0, 3, 7, 9)), (300 * 300, (0, 3, 7))):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels / 2)
        with pytest.warns(match=f"images: {len(broken)}: .*{samples[broken[0]].name}"):
            split = open_cache()
        assert split.names == [s.name for i, s in enumerate(samples) if i not in broken]
        assert len(split.images) == len(split.labels) == 36 - len(broken)
    _, before = open_cache("val"), files(tmp_path / "cache")
    Image.new("L", Image.open(samples[-1].mask).size, 7).save(samples[-1].mask)
    assert f"{samples[-1].name}.png holds 7 (100.00%)" in outcome(open_cache)
    monkeypatch.setattr(data, "FORMATS", {"PNG"})  # the images are JPEGs
    assert "none of 4 images" in outcome(open_cache, "val")
    assert files(tmp_path / "cache") == before

@pytest.mark.parametrize("size", [(60, 80), (20, 32)])
@pytest.mark.parametrize("strengths", [{}, *({name: MOVES[name]} for name in MOVES), MOVES])
def test_images_and_labels_move_together_and_as_far_as_told(strengths, size):
    (h, w), labels = size, torch.randint(9, (60, 80)).to(torch.uint8)
    y, x = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    images = torch.stack((x / 80, y / 60, 0 * x)).repeat(300, 1, 1, 1)  # a pixel says where it is
    images, moved = data.augment(images, labels.repeat(300, 1, 1), data.seeded_generator(7), size,
                                 **strengths)
    x, y = images[:, 0] * 80, images[:, 1] * 60
    assert (moved == labels[y.long().clamp(max=59), x.long().clamp(max=79)]).float().mean() > 0.99
    # from the centre, (x, y) = diag(aspect, 1 / aspect) / zoom · rotation · flips · (u, v) + shift
    middle = torch.stack((x, y), dim=1)[..., h // 2 - 4:h // 2 + 4, w // 2 - 4:w // 2 + 4]
    dx_dv, dy_dv = (middle.diff(dim=2).mean(dim=(2, 3)) * h / 60).T  # for a step down in the result
    dx_du, dy_du = (middle.diff(dim=3).mean(dim=(2, 3)) * w / 80).T  # for a step to the right
    scale_x, scale_y = torch.hypot(dx_du, dx_dv), torch.hypot(dy_du, dy_dv)
    sine = dy_du * dx_du.sign() / scale_y
    torch.testing.assert_close(sine, -dx_dv * dy_dv.sign() / scale_x, rtol=0, atol=1e-3)
    for name, values in (("rotate", sine.asin().rad2deg()), ("zoom", (scale_x * scale_y)**-0.5),
                         ("aspect", (scale_x / scale_y)**0.5),
                         ("shift", middle.mean(dim=(2, 3)) / torch.tensor([80, 60]) - 0.5)):
        high = strengths.get(name, int(name in ("zoom", "aspect")))
        extremes = 1 / high if name in ("zoom", "aspect") else -high, high
        assert [values.min(), values.max()] == pytest.approx(extremes, rel=0.04, abs=0.003)
    p, q = strengths.get("flip", 0), strengths.get("vflip", 0)
    flipped = [each.float().mean() for each in (dx_du < 0, dy_dv < 0, (dx_du < 0) & (dy_dv < 0))]
    assert flipped == pytest.approx([p, q, p * q], abs=0.1)

def test_cutmix_puts_a_box_of_another_image_into_its_fraction():
    labels = torch.arange(60).view(-1, 1, 1).repeat(1, 40, 30).to(torch.uint8)
    images = labels.unsqueeze(1).repeat(1, 3, 1, 1) / 60
    mixed, follows = data.augment(images, labels, data.seeded_generator(5), cutmix=0.5)
    torch.testing.assert_close(mixed * 60, follows.unsqueeze(1).expand_as(mixed).float())
    foreign = follows != labels
    assert torch.equal(follows, torch.where(foreign, labels.roll(1, dims=0), labels))
    rows, columns = foreign.any(dim=2), foreign.any(dim=1)
    assert torch.equal(foreign, rows[:, :, None] & columns[:, None])  # a box, wherever it is
    assert 15 < rows.any(dim=1).sum() < 45 and rows.sum(dim=1).unique().numel() > 10

def test_augment_changes_its_fraction_of_images_and_follows_its_generator():
    images, labels = torch.rand(200, 3, 24, 40), torch.randint(3, (200, 24, 40)).to(torch.uint8)
    strong = {n: low + (high - low) / 4 for n, (low, high) in petseg.AUGMENT_BOUNDS.items()}
    first, again, other, none = (data.augment(images, labels, data.seeded_generator(key), p=p,
                                 **strong) for key, p in ((1, 0.5), (1, 0.5), (2, 0.5), (1, 0)))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    assert 70 < ((first[0] - images).abs().flatten(1).amax(dim=1) > 1e-3).sum() < 130
    assert 0 <= first[0].min() and first[0].max() <= 1
    assert torch.allclose(none[0], images, atol=1e-4) and torch.equal(none[1], labels)

@pytest.mark.parametrize("border, targets", [
    ("foreground", {(1, 2)}), ("background", {(0, 0)}), ("ignore", {(255, 255)}),
    ("class", {(4, 4)}), ("random", {(0, 0), (1, 2)})])  # one coin an image
def test_a_border_becomes_what_is_asked(border, targets):
    labels = torch.tensor([[[0, 1, 2, 129, 130, 255]]], dtype=torch.uint8).repeat(100, 1, 1)
    target = data.labels_to_target(labels, border, data.seeded_generator(1), classes=5)
    rows = [(*row,) for [row] in target.tolist()]
    assert {*rows} == {(0, 1, 2, *pair, 255) for pair in targets} and target.dtype == torch.uint8
    assert min(map(rows.count, rows)) > 30
    target = petseg.eval_target({"border": border, "class_names": range(5)}, labels)
    assert target[0, 0, 3:5].tolist() == ([4, 4] if border == "class" else [1, 2])  # of scores

@pytest.mark.parametrize("name, image, options, left, right", [
    ("gray.jpg", GRAY, {}, *GRAYS), ("cmyk.jpg", RED_BLUE.convert("CMYK"), {}, RED, BLUE),
    ("large.jpg", RED_BLUE.resize((800, 600), Image.NEAREST), {}, RED, BLUE),
    ("gif.jpg", RED_BLUE, {"format": "GIF"}, RED, BLUE), ("palette.png", PALETTE, {}, RED, BLUE),
    ("see-through.png", PALETTE, {"transparency": PALETTE.getpixel((30, 9))}, RED, WHITE),
    ("rgba.png", Image.merge("RGBA", (*RED_BLUE.split(), HALF)), {}, RED, WHITE),
    ("la.png", Image.merge("LA", (GRAY, HALF)), {}, GRAYS[0], WHITE),
    ("bits.png", HALF.convert("1"), {}, WHITE, (0, 0, 0)),
    ("16-bit.png", Image.fromarray(WORDS * 257), {}, *GRAYS),  # white is 65535
    ("12-bit.tif", Image.fromarray(WORDS * 16), {}, *GRAYS),   # white is 4095
    ("10-bit.tif", Image.fromarray(WORDS * 4), {}, *GRAYS),    # white is 1023
    ("float.tif", Image.fromarray(FLOATS), {}, WHITE, (38,) * 3)])
def test_read_image_takes_every_kind_of_image(tmp_path, name, image, options, left, right):
    image.save(tmp_path / name, **options)
    for size in (None, (15, 20)):
        read = data.read_image(tmp_path / name, size)
        assert (read.mode, read.size) == ("RGB", size[::-1] if size else image.size)
        assert np.abs(np.int16(read)[-5, [4, -4]] - (left, right)).max() <= 6

@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_rotation_and_the_mask_that_goes_with_it(tmp_path, orientation, turns, ending):
    stored = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    upright, exif = np.rot90(stored, turns), Image.Exif()
    exif[0x0112] = orientation
    sample = data.Sample("a", tmp_path / f"a.{ending}", tmp_path / "mask.png", None)
    Image.fromarray(stored).save(sample.image, exif=exif)
    stays = [(stored, b"", stored)] * (orientation > 4 and ending == "png")  # Pillow turns a TIFF
    for drawn_on, own_exif, read in [(upright, b"", upright), (stored, exif, upright), *stays]:
        Image.fromarray((drawn_on[..., 0] > 99).astype(np.uint8)).save(sample.mask, exif=own_exif)
        image, labels = data.read_pair(sample, read.shape[:2])
        assert np.array_equal(image, read) and np.array_equal(image[..., 0] > 99, labels)
    assert np.array_equal(data.read_image(sample.image), upright)
    Image.new("L", (31, 40)).save(sample.mask)
    assert "is {}×{} ".format(*upright.shape) in outcome(data.read_pair, sample, (32, 32))

@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "tif"])
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # put back at the end
    path = tmp_path / f"damaged.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    half = path.read_bytes()[:path.stat().st_size // 2]
    os.mkfifo(tmp_path / "pipe")  # reading it would never end
    for name, content, pixels, expected in (
            (path.name, half, 4096, ""), (path.name, b"", 4096, ""), (path.name, b"abc", 4096, ""),
            (path.name, half, 4095, "over 4,095 pixels.*--max-pixels"),  # by its header alone
            ("pipe", b"", 4096, ""), ("gone.png", b"", 4096, "")):
        path.write_bytes(content)
        data.set_max_pixels(pixels)
        for read in (data.read_image, data.read_mask):
            with pytest.raises(data.ImageError, match=f"{name}.*{expected}"):
                read(tmp_path / name, None)

def test_fuzz(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**8 / 2)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (59, 83, 4), np.uint8))
    contents, read, path = [], 0, tmp_path / "damaged"
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "JPEG2000", "PPM"):
        for mode in ("RGBA", "RGB", "CMYK", "L", "P", "I;16", "F"):
            with suppress(KeyError, OSError, ValueError):  # no such format, or not in this mode
                noise.convert(mode).save(path, kind)
                contents.append(path.read_bytes())
    for i in range(FUZZ):
        rng, content = np.random.default_rng((2026, i)), bytearray(contents[i % len(contents)])
        for at in rng.integers(rng.choice((200, len(content))), size=rng.integers(0, 12)):
            content[at % len(content)] ^= 1 << rng.integers(8)  # a bit flips, often in the header
        if content[12:16] == b"IHDR":  # else a PNG ends at its checksum
            content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        path.write_bytes(content[:rng.integers(1, 2 * len(content))])  # half of them are cut off
        for call, arg in (data.read_image, None), (data.read_image, (9, 9)), (data.read_mask, None):
            result = outcome(call, path, arg)  # another error ends the test
            assert str(path) in result if isinstance(result, str) else np.asarray(result).size
            read += not isinstance(result, str)
    assert 0 < read < 3 * FUZZ

@pytest.mark.parametrize("values, mode, kind, quality", [
    *((x, mode, "PNG", 0) for x in (DISC, BLURRED) for mode in ("L", "LA", "RGB")),
    (DISC, "1", "PNG", 0), (DISC // 255, "P", "PNG", 0),
    *((x, mode, "JPEG", n) for x in (DISC, BOX) for mode in ("L", "RGB") for n in (50, 100))])
def test_masks_of_two_classes_in_every_form(tmp_path, values, mode, kind, quality):
    path, expected = tmp_path / "a.png", values >= min(128, values.max())  # its name says nothing
    Image.fromarray(values).convert(mode).save(path, kind, quality=quality)
    assert (data.read_mask(path, None) != expected).mean() <= (0.001 if kind == "JPEG" else 0)
    Image.fromarray(DISC).quantize(2).save(path)  # its palette begins with white
    assert (outcome(data.read_mask, path, None) == (DISC > 0)).all()
    for refused in Image.fromarray(TOO_BLURRED), PALETTE:
        refused.save(path)
        assert "a.png holds" in outcome(data.read_mask, path, None)

@pytest.mark.parametrize("text, values, expected", [
    ("", [0, 1], [0, 1]), ("", [0, 1, 255], [0, 1, 255]), ("", [255], [1]),
    ("", [0, 0, 0, 128], "0 (75.00%), 128 (25.00%)"), ("", [0, 1, 2], "1 (33.33%)"),
    ("", [0, 1, 2, 255], "255 (25.00%)"), ("", [0, 15, 255], "15 (33.33%)"),
    ("", [0, 300], "300 (50.00%)"), ("", [(0, 0, 0), (64, 0, 128)], "64 0 128 (50.00%)"),
    ("0 car\n5 my house", [0, 5, 255], [0, 1, 255]), ("0 car\n255 house", [0, 255], [0, 1]),
    ("3, a\n700:b", [700, 3], [1, 0]), ("ü\n\nbackground\nvoid", [0, 1, 2, 255], [1, 0, 255, 255]),
    ("# a c\n0 a\n1 b\n8 Ignore\n9 void", [0, 1, 8, 9], [0, 1, 255, 255]),
    ("0 0 0 a\n64 0 128 b\n9 9 9 void", [(64, 0, 128), (9, 9, 9), (0, 0, 0)], [1, 255, 0]),
    ("0 0 0 a\n255 255 255 b", [255, 0], [1, 0]), ("0 a\n7 b", [0, 0, 0, 1], "1 (25.00%)"),
    ("0 a\nb", [0], "'b'; expected VALUE NAME, or R G B NAME, or NAME"), ("\n", [0], "0 classes"),
    ("0 a\n1 2 3 b", [0], "'1 2 3 b'; expected"), ("a\nvoid", [0], "1 classes"),
    ("0 0 300 a\n1 1 1 b", [0], "'0 0 300 a'; expected"), ("a\na", [0], "twice"),
    ("0 a\n0 b", [0], "twice"), ("\n".join(map(str, range(101))), [0], "101 classes"),
    ("0 a\n99999999999 b", [7], "99999999999")])
def test_what_values_of_masks_mean(tmp_path, text, values, expected):
    path, listed, values = tmp_path / "mask.png", tmp_path / "classes.txt", np.array([values])
    Image.fromarray(values.astype(np.uint16 if values.max() > 255 else np.uint8)).save(path)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # as Windows may write it
        if text:
            listed.write_bytes(text.replace("\n", "\r\n").encode(encoding))
        found = outcome(lambda: data.read_mask(path, data.read_classes(tmp_path)[0]))
        if isinstance(expected, list):
            names = data.read_classes(tmp_path)[1]  # here they are in order; each ends a line
            assert found.tolist() == [expected] and names == sorted(names)
            assert not text or all(f"{name}\n" in f"{text}\n" for name in names)
        else:
            assert expected in found and str(tmp_path) in found
    if isinstance(expected, str) and not text:  # the refusal ends with a classes.txt to start from
        listed.write_text("\n".join(found.splitlines()[1:]))
        labels = data.read_mask(path, data.read_classes(tmp_path)[0])
        classes = np.unique(values[0], axis=0, return_inverse=True)[1].ravel()
        void = values[0].reshape(len(classes), -1).min(axis=1) == 255
        assert np.array_equal(labels[0], np.where(void & (values.ndim == 2), 255, classes))

def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return tuple(folder / name for name in names)

@pytest.mark.parametrize("image, mask, splits", [
    ("images/{0}.jpg", "masks/{0}.png", ""), ("imgs/{0}.png", "mask/{0}.png", ""),
    ("image/{0}.jpg", "labels/{0}.png", ""), ("img/{0}.jpg", "label/{0}.png", ""),
    ("Photos/{0}.jpg", "annotations/{0}.gif", ""), ("Images/{0}.JPG", "GT/{0}.png", ""),
    ("JPEGImages/{0}.jpg", "SegmentationClass/{0}_segmentation.png", ""),
    ("images/town/{0}.jpg", "masks/town/mask_{0}.png", ""),
    ("{1}/images/{0}.jpg", "{1}/masks/{0}.png", "train val test"),
    ("images/{1}/{0}.jpg", "labels/{1}/{0}.png", "train val test"),
    ("{1}/imgs/{0}.jpg", "{1}/mask/{0}_mask.png", "Training Validation"),
    ("JPEGImages/{1}/{0}.jpg", "gt/{1}/{0}.png", "training valid testing")])
def test_images_and_masks_are_paired_and_split(tmp_path, image, mask, splits):
    splits = splits.split() or [""]
    expected = [{make_files(tmp_path, image.format(name, split), mask.format(name, split))
                 for name in range(i, 40, len(splits))} for i, split in enumerate(splits)]
    dataset = data.scan_dataset(tmp_path)
    found = [{sample[1:3] for sample in samples} for samples in dataset.splits.values()]
    assert [*dataset.splits] == ["train", "val", "test"][:len(found)]
    if splits == [""]:
        assert [*map(len, found)] == [32, 4, 4] and set.union(*found) == expected[0]
    else:
        assert found == expected and not dataset.random_split

@pytest.mark.parametrize("names, expected", [
    (["photos1/a.jpg", "photos1/b.jpg", "outlines/a.png"],
     "(?s)images.*photos.*masks.*labels.*\n  outlines/.* 1 images\n  photos1/.* 2 images"),
    (["images/train/a.jpg", "masks/train/a.png"], "(?s)val.*images/train/.* 1 images"),
    (["images/a.jpg", "masks/x.png"], "no mask in .*masks .* image in .*images.*a .*x"),
    (PAIRS[:40] + ["masks/a.txt"], "no .*masks, or no image in it"), (["a.txt"], "understood"),
    (PAIRS[:2] + PAIRS[40:42], "2 labelled images; at least 3"), ([], "there is no folder"),
    (["annotations/trimaps/a.png"], "trainval.txt.*images/NAME.jpg")])
def test_folders_that_are_not_understood_are_described(tmp_path, names, expected):
    make_files(tmp_path / "own", *names)
    assert re.search(expected, outcome(data.scan_dataset, tmp_path / "own"))

def test_random_split_is_fixed_and_kept_and_what_has_no_partner_is_left_out(tmp_path):
    make_files(tmp_path, *PAIRS)
    first = data.scan_dataset(tmp_path)
    assert data.scan_dataset(tmp_path, random_split={"val": ["of other data"]}) == first
    assert first.random_split["val"] != ["0", "1", "10", "11"]  # not the first names
    make_files(tmp_path, "images/a.png", "masks/a.png")  # what comes later is for training
    make_files(tmp_path, "images/7.jpg", "images/odd.jpg", "masks/spare.png")
    with pytest.warns() as warned:
        second = data.scan_dataset(tmp_path, random_split=first.random_split)
    assert [*map(len, (splits := second.splits).values())] == [33, 4, 4]
    assert splits["test"] == first.splits["test"] == data.scan_dataset(tmp_path).splits["test"]
    assert re.search(r"(?s)7.png is left out.*7.jpg.*\n1 images.*odd.jpg\n1 masks.*spare.png",
                     "\n".join(str(each.message) for each in warned))

def test_layout_of_the_pets(tmp_path):
    _, path, mask = make_files(tmp_path, "annotations/trimaps/a", "annotations/trainval.txt", "a")
    path.write_text("# a comment\n" + "".join(f"Cat_{i} 9 {1 + i // 12} 1\n\n" for i in range(24)))
    pet, species = (data.scan_dataset(tmp_path, classes).splits for classes in ("pet", "species"))
    assert [sample.name for sample in pet["val"]] == ["Cat_0", "Cat_10", "Cat_20"]
    assert [sample.name for sample in pet["train"]] == [f"Cat_{i}" for i in range(24) if i % 10]
    assert pet["val"][1].mask == tmp_path / "annotations" / "trimaps" / "Cat_10.png"
    Image.fromarray(np.uint8([[1, 2, 3]])).save(mask, "png")
    for sample, label in ((pet["val"][2], 1), (species["val"][0], 1), (species["val"][2], 2)):
        assert data.read_mask(mask, sample.value_to_label).tolist() == [[label, 0, 128 + label]]
    path.write_text("a\nb")
    assert "what species a is" in outcome(data.scan_dataset, tmp_path, "species")

@pytest.fixture
def mirror(toys, tmp_path_factory):
    """A server of the toy pets' archives on loopback, which behaves as its attributes say."""
    class Mirror(http.server.BaseHTTPRequestHandler):
        log_message = nothing
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[len("bytes="):-1])
            server.asked.append(start)
            content = server.files[self.path.rpartition("/")[2]]
            end = len(content) // 2 if server.breaks else len(content)
            start, server.breaks = start if server.ranges else 0, False
            self.send_response(server.status or (200 if not start else 206 if start < end else 416))
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(b"" if server.status else content[start:end])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.asked, server.ranges, server.breaks, server.status = [], True, False, None
        server.url = f"http://127.0.0.1:{server.server_port}/pets/"
        server.folder = tmp_path_factory.mktemp("mirror")
        for name in ("images", "annotations"):
            shutil.make_archive(f"{server.folder}/{name}", "gztar", toys, name)
        server.files = dict(sorted(files(server.folder).items()))
        server.md5 = {name: hashlib.md5(file).hexdigest() for name, file in server.files.items()}
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()

@pytest.mark.parametrize("settings, ending, part, asked, expected", [
    ({}, ".part", 0, [0, 0], ""), ({"breaks": True}, ".part", 0, [0, 0.5, 0], ""),
    ({"breaks": True, "ranges": False}, ".part", 0, [0, 0.5, 0], ""), ({}, ".part", 1, [1, 0], ""),
    ({"status": 404}, ".part", 0, [0], "404"),
    *(({"status": code}, ".part", 0, [0, 0, 0], f"{code}") for code in (408, 429, 503)),
    ({"md5": {"annotations.tar.gz": "0"}}, ".part", 0, [0], "checksum"),
    ({}, "", 0.5, [], "checksum")])  # an archive that was put there by hand
def test_download(mirror, toys, tmp_path, settings, ending, part, asked, expected):
    vars(mirror).update(settings)
    content = mirror.files["annotations.tar.gz"]
    [path] = make_files(tmp_path, f"{data.PETS}/annotations.tar.gz{ending}")
    path.write_bytes(content[:int(part * len(content))])
    for _ in range(1 if expected else 2):  # what is there is not downloaded again
        result = outcome(data.get_pets, tmp_path, mirror.url, mirror.md5, (0, 0))
        assert mirror.asked == [int(part * len(content)) for part in asked]
        if expected:
            assert "annotations.tar.gz" in result and expected in result
            assert not any(files(tmp_path).values())  # but maybe an empty .part
        else:
            assert files(result) == files(toys)
            result = data.get_pets(tmp_path / "2", mirror.folder.as_uri(), mirror.md5)  # no server
            assert files(result) == files(toys)

def test_leftovers_of_killed_processes_are_cleared_away_under_the_lock(tmp_path):
    with data.atomic_path(tmp_path / "cache" / "val") as new:
        make_files(tmp_path, new / "half", f"{data.PETS}/.part-1/a", "run/.part-1/last.pt")
        with data.take_lock(tmp_path):
            assert [*files(tmp_path)] == ["run/.part-1/last.pt"]  # a run has its own lock
            make_files(tmp_path, new / "half")  # of whoever has the lock
            assert data.take_lock(tmp_path, wait=False) is None and len(files(tmp_path)) == 2

def test_parallel_map_keeps_the_order_and_is_lazy():
    begun = []
    def call(i):
        begun.append(i)
        time.sleep(0.05 * (i == 0))  # the first comes last
        return i
    for i, result in enumerate(data.parallel_map(call, range(100), 3)):
        assert result == i and len(begun) <= i + 1 + 4 * 3

def test_upsample_and_argmax_is_the_argmax_of_upsampled_maps():
    probs = torch.rand(5, 8, 6, generator=data.seeded_generator(0))
    for probs in (probs / probs.sum(dim=0), probs[:1]):
        large = F.interpolate(probs[None], (61, 47), mode="bilinear")[0]
        ranked = (torch.cat((1 - large, large)) if len(probs) == 1 else large).sort(dim=0)
        clear = ranked.values[-1] - ranked.values[-2] > 1e-3
        mask = data.upsample_and_argmax(probs.numpy(), (61, 47))
        assert np.array_equal(mask[clear], ranked.indices[-1][clear])

def test_mask_overlay_and_panel():
    photo, mask = Image.new("RGB", (120, 90), (90, 90, 90)), np.zeros((90, 120), np.uint8)
    mask[20:70, 30:90] = 1
    assert np.array_equal(data.colorize_mask(mask, TWO), mask * 255)
    for fur in ((90, 90, 90), (213, 94, 0), (255, 255, 255), (20, 20, 20)):  # the second is ginger
        photo.paste(fur, (30, 20, 90, 70))
        tint = np.abs((result := np.int16(data.overlay(photo, mask, TWO))) - photo).max(axis=2)
        assert tint[:12].max() < 9 and tint[45, 60] > 40
        assert {0, 255} <= {*result[17:23, 60, 0].tolist()}  # the contour, dark beside light
    tint = np.asarray(data.overlay(photo, mask, [*TWO, "third"]))[45, 60]
    assert np.allclose(tint, 20 + 0.5 * (np.array(data.PALETTE[1]) - 20), atol=2)
    one, many = (data.panel(photo, "", {"truth": mask, "A": mask * (len(names) - 1)}, names)
                 for names in (TWO, ["ground", "one", "two"]))
    assert many.width == one.width and many.height > one.height  # the legend; the photo is first
    assert one.getpixel((20, 40)) == many.getpixel((20, 40)) == (90, 90, 90)

def test_islands_go_and_holes_are_filled():
    rng = np.random.default_rng(0)
    for _ in range(50):  # against a flood fill, pixel by pixel
        mask = rng.random(rng.integers(1, 30, 2)) < rng.random()
        found, largest = np.pad(mask, 1), 0
        for value, part in ((True, 0.05), (False, 0.01)):
            regions, todo = [], set(zip(*np.nonzero(found == value)))
            while todo:
                regions.append([todo.pop()])
                for y, x in regions[-1]:
                    near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & todo
                    todo -= near
                    regions[-1] += near
            largest = largest or max(map(len, regions), default=0)
            for place in sum((r for r in regions if len(r) < part * largest), []):
                found[place] = not value
        assert np.array_equal(data.remove_islands(mask), found[1:-1, 1:-1])
    probs = rng.random((1, 40, 40), np.float32)
    found, several = data.remove_islands(probs[0] >= 0.7), np.concatenate((1 - probs, probs / 2))
    assert np.array_equal(data.without_islands(probs, 0.7)[0] >= 0.7, found)
    found = data.remove_islands(several[1] > several[0])
    assert np.array_equal(data.without_islands(several, 0.7).argmax(axis=0), found)

def test_alpha_of_a_large_photo_is_made_in_strips_that_fit():
    b, coefficients = np.linspace(0, 255, 30), np.zeros((4, 30, 10), np.float32)
    coefficients[3] = b[:, None]
    photo = data.to_photo(Image.new("RGB", (1024, 3000)))
    expected = np.interp((np.arange(3000) + 0.5) / 100 - 0.5, range(30), b)
    alpha = np.asarray(data.alpha_from_coefficients(photo, coefficients))
    assert np.abs(alpha - expected[:, None]).max() <= 1

@pytest.mark.parametrize("strength, means, spreads", [
    ("brightness", (0.4, 0.6), (0.16, 0.24)), ("contrast", (0.5, 0.5), (0.16, 0.24)),
    ("saturation", (0.4963, 0.5037), (0.16, 0.24))])  # about the gray of 0.5185
def test_colours_change_by_their_strength(strength, means, spreads):
    images = torch.tensor([0.6, 0.5, 0.4]).view(1, 3, 1, 1).repeat(300, 1, 4, 4)
    images, _ = data.augment(images, images[:, 0], data.seeded_generator(1), **{strength: 0.2})
    red, _, blue = images[..., 0, 0].T
    for values, limits in ((images.mean(dim=(1, 2, 3)), means), (red - blue, spreads)):
        assert [values.min(), values.max()] == pytest.approx(limits, abs=0.003)

def test_curves_run_where_the_numbers_say(tmp_path):
    rows = [{"epoch": 1 + i, "train_dice": i / 40, "val_dice": 0.75, "train_loss": 1 - i / 40,
             "val_loss": 0.25, "lr": 0.1} for i in range(41)]
    for runs in ({"one epoch": rows[:1]}, {f"run {i}" * 9: rows for i in range(7)}, {"run": rows}):
        data.draw_curves(tmp_path / "curves.png", runs)
    image = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    for half, rises in ((image[:, :800], False), (image[:, 800:1600], True)):
        near = [np.abs(half - c).sum(axis=2) < 60 for c in data.LINE_COLORS[:2]]
        train, val = ({x: c.nonzero()[0][-1] for x, c in enumerate(n.T) if c.any()} for n in near)
        first, last = min(train), max(train)
        # the right 40% are clear of the mark of the best epoch, which is the first
        right = sorted(x for x in train if x in val and x > first + 0.6 * (last - first))
        assert (train[right[-1]] < train[right[0]]) == rises
        meeting = min(right, key=lambda x: abs(train[x] - val[x]))
        assert (meeting - first) / (last - first) == pytest.approx(0.75, abs=0.02)

@pytest.mark.parametrize("number, ids", [("30", range(4, 34)), (
    "19", (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33))])
def test_cityscapes(tmp_path, number, ids):
    parts = ("leftImg8bit/{}/ulm/a_leftImg8bit.png", "gtFine/{}/ulm/a_gtFine_labelIds.png")
    mask = make_files(tmp_path, *(part.format(s) for s in ("train", "val") for part in parts))[1]
    Image.fromarray(np.arange(34, dtype=np.uint8)[None]).save(mask)
    dataset = data.scan_dataset(tmp_path, number)
    assert [dataset.class_names[ids.index(i)] for i in (7, 24, 26)] == ["road", "person", "car"]
    [[train], [_]] = dataset.splits.values()
    labels = data.read_mask(train.mask, train.value_to_label)[0].tolist()
    assert labels == [ids.index(i) if i in ids else 255 for i in range(34)]

def test_check_names_errors_and_what_one_might_not_expect(tmp_path):
    make_files(tmp_path, *PAIRS, "images/7.jpg")  # which is empty
    for name in PAIRS:
        Image.fromarray(DISC).save(tmp_path / name)
    for i in range(3):
        Image.fromarray(BLURRED).save(tmp_path / f"masks/{i}.png")
        Image.fromarray(DISC // 255 * np.uint16(4000)).save(tmp_path / f"images/{i}.png")
    errors, notes, fractions = data.verify(data.scan_dataset(tmp_path))
    assert "7.jpg" in str(sum(errors.values(), [])[0])
    for words in ("images of over 8 bits, white at 4095", "edges, cut at 128"):
        assert sum(int(n) for note in notes for n in re.findall(rf"{words} \((\d+)\)", note)) == 3
    for fraction in fractions.values():
        assert fraction[1] == pytest.approx((DISC > 0).mean(), abs=0.01)

# ---------------------------------------------------------------------------------------- petseg
SHORT = ("--schedule", "exponential", "--gamma", 0.5, "--save-every", 1, "--class-weights", "none")
load = partial(petseg.load, device="cpu", precision="fp32")

def assert_same_run(*folders):
    """Two runs have the same weights and pictures bit for bit, and the same metrics."""
    runs = []
    for folder in folders:
        last, best = (torch.load(folder / f"{name}.pt") for name in ("last", "best"))
        parts = [last["model"], last["ema"], best["weights"]]
        parts += [state for each in last["optimizers"] for state in each["state"].values()]
        runs.append(([value.numpy().tobytes() for part in parts for value in part.values()],
                     [row | {"seconds": 0, "images_per_second": 0}
                      for row in read_rows(folder / "metrics.csv")],
                     [(folder / name).read_bytes() for name in ("samples.png", "test-worst.png")]))
    assert runs[0] == runs[1]

@pytest.fixture(scope="session")
def trained(root):
    """The folders of three runs, to be read only: of each model, and of one that is halfway."""
    def train(model, epochs):
        words = ("train", model, "--root", root, *TINY, *SHORT, "--epochs", epochs)
        return Path(answer(*words, "--out", root / f"{epochs}")["checkpoint"]).parent
    return {"halfway": train("unet", 1)} | {model: train(model, 2) for model in petseg.MODELS}

@pytest.fixture
def halfway(trained, root, tmp_path):
    """A copy of the run of one epoch, to be spoilt, and a command that goes on with it."""
    words = ("train", "unet", *TINY, *SHORT, "--root", root, "--out", tmp_path, "--name", "run")
    return words, shutil.copytree(trained["halfway"], tmp_path / "run")

@pytest.mark.parametrize("model", petseg.MODELS)
def test_train_and_eval(model, trained, root, tmp_path):
    folder = trained[model]
    rows, result = read_rows(folder / "metrics.csv"), json.loads((folder / "test.json").read_text())
    assert len(rows) == 2 and folder.match(f"2/toy-pets-{model}-*")
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.csv", "last.pt",
        "previous.pt", "best.pt", "epoch-1.pt", "epoch-2.pt", "curves.png", "samples.png",
        "test.json", "test-worst.png", "test-breeds.csv", "test-confusion.png"}
    scores = [float(row["val_dice"]) for row in rows]
    best = 1 + scores.index(max(scores))
    for name, epoch in ("best", best), ("epoch-1", 1), ("epoch-2", 2):
        config, weights, metrics = torch.load(folder / f"{name}.pt").values()
        assert (config["lr"], config["width"]) == (0.02, 8) and "width" not in metrics
        assert [metrics[key] for key in ("epoch", "lr", "val_dice")] == [
            epoch, 0.02 / epoch, scores[epoch - 1]]
        assert {w.dtype for w in weights.values() if w.dim() == 1} == {torch.float32}  # variances
    ema, content = torch.load(folder / "last.pt")["ema"], files(folder)  # after epoch 2
    assert all(torch.equal(w, ema[name].to(w.dtype)) for name, w in weights.items())
    assert content["best.pt"] == content[f"epoch-{best}.pt"]
    split = data.open_split(data.scan_dataset(root / data.TOYS), "test", (32, 32), tmp_path)
    worst = layers.image_scores(petseg.evaluate(petseg.load(folder), split)[1], TWO).argmin()
    worst = data.to_image(split.images[worst]).resize((160, 160), Image.BICUBIC)
    assert np.array_equal(Image.open(folder / "test-worst.png").crop((8, 28, 168, 188)), worst)
    words = ("--ckpt", folder, "--root", root, "--out")
    val = answer("eval", *words, tmp_path / "val", "--split", "val", "--no-tta")
    assert val["dice"] == pytest.approx(max(scores), abs=4e-3)  # weights in half precision
    again, out = answer("eval", *words, tmp_path / "eval"), tmp_path / "eval"
    assert again == result | {"checkpoint": str(folder), "out": str(out)} and len(files(out)) == 4
    assert result["images"] == sum(breed["images"] for breed in again["breeds"]) == 10
    new = answer("infer", *words, tmp_path / "infer", "--threshold", 1)  # no pixel is so sure
    assert [new["images"], new["dice"], len([*tmp_path.glob("infer/*_panel.jpg")])] == [10, 0, 10]

def test_other_evaluations_do_not_write_over_the_scores_of_a_run(trained, root, tmp_path):
    folder, here = trained["unet"], {"before": partial(os.chdir, tmp_path)}
    before, dices = files(folder), [json.loads((folder / "test.json").read_text())["dice"]]
    for option, *value in ("--threshold", 1), ("--no-tta",), ("--data", "toy"):
        other = answer("eval", "--ckpt", folder, "--root", root, option, *value, **here)
        assert other["out"].startswith("evaluation/") and files(folder) == before
        dices.append(other["dice"])
    assert dices[1] == 0 and dices[2] != dices[0] == dices[3]

def test_weights_of_pets_are_scored_on_own_data(trained, tmp_path):
    make_own_data(tmp_path / "own", "two classes")
    for path in [*tmp_path.glob("own/*/*")]:
        path.rename(path.with_name(os.fsdecode(b"\xff_") + path.name))
    other = shutil.copytree(trained["unet"], tmp_path / "other")
    for name in ("best.pt", "last.pt"):  # as if trained with --classes pet, on another pet
        content = torch.load(other / name)
        content["config"] |= {"classes": "pet", "class_names": ["background", "hamster"]}
        petseg.save_checkpoint(other / name, content)
    words = ("--data", tmp_path / "own", "--root", tmp_path, "--out", tmp_path / "out")
    dices = [row["test_dice"] for row in answer("compare", trained["unet"], other, *words)["runs"]]
    [row] = answer("eval", "--ckpt", trained["unet"], *words)["breeds"]
    assert dices == [row["dice"]] * 2 and row["breed"] == r"\udcff"

# layouts: the files of image {0} in split {1}; what stands in a mask for background and the halves
# of a box; classes.txt; the labels; the names of the classes
OWN_DATA = {
    "two classes": ("images/{0}.jpg", "masks/{0}.png", (9, 240, 240), "", (0, 1, 1),
                    ["background", "foreground"]),
    "R G B": ("images/{0}.jpg", "masks/{0}.png", ((0, 0, 0), (64, 0, 128), (0, 9, 0)),
              "0 0 0 ground\n64 0 128 car\n0 9 0 tree", (0, 1, 2), ["ground", "car", "tree"]),
    "splits": ("{1}/images/{0}.jpg", "{1}/masks/{0}.png", (0, 1, 2), "ground\ncar\nvoid",
               (0, 1, 255), ["ground", "car"]),
    "Cityscapes": ("leftImg8bit/{1}/town/{0}_leftImg8bit.png",
                   "gtFine/{1}/town/{0}_gtFine_labelIds.png", (7, 26, 5), "", (0, 13, 255),
                   [data.CITYSCAPES[i - 4] for i in data.CITYSCAPES_EVAL_IDS])}

def make_own_data(folder, kind, n=20):
    """Makes `n` labelled images of 40×32, all of a coloured box; returns the labels of each."""
    image_path, mask_path, values, classes, labels, _ = OWN_DATA[kind]
    box = np.zeros((32, 40), int)
    box[8:24, 4:16], box[8:24, 16:28] = 1, 2
    photo = np.stack((box * 100, 200 - box * 50, box * 9), axis=2)
    for i in range(n):
        split = ("train", "val", "test")[max(0, i - n + 3)]
        for name, array in ((image_path, photo), (mask_path, np.array(values)[box])):
            path = folder / name.format(i, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(path)
    if classes:
        (folder / "classes.txt").write_text(classes)
    return np.array(labels)[box]

@pytest.mark.parametrize("kind, options", [
    ("splits", "unet --loss dice"), ("two classes", "resnet34_unet --ema 0 --progressive 0"),
    ("R G B", "unet --size 32x48 --loss bce --class-weights inverse"),
    ("Cityscapes", "unet --schedule plateau --repeat 6")])
def test_own_data_from_training_to_masks(kind, options, tmp_path):
    folder, names, words = tmp_path / "own", OWN_DATA[kind][-1], ("--root", tmp_path, "--out")
    labels, metric = make_own_data(folder, kind), "dice" if len(names) == 2 else "mean_iou"
    where = {"before": partial(become, "no fcntl" if kind == "splits" else "")}
    trained = run("train", "--data", folder, *words, tmp_path / "runs", "--size", 32, "--width", 8,
                  "--batch-size", 4, "--epochs", 3, "--repeat", 4, "--augment", "none", "--json",
                  *options.split(), **where)
    assert ("no training pixel is sidewalk, " in trained.stderr) == (kind == "Cityscapes")
    result = json.loads(trained.stdout)
    words = ("--ckpt", result["checkpoint"], *words)
    again = answer("eval", *words, tmp_path / "eval", "--split", result["split"], **where)
    assert again["images"] == result["images"] > 0 and again[metric] == result[metric] > 0.4
    if kind != "Cityscapes":  # its test split has no labels
        scores = answer("infer", *words, tmp_path / "test", **where)
        assert scores["dice" if len(names) == 2 else "mean_dice"] > 0.4
    run("infer", *words, tmp_path / "one", folder / OWN_DATA[kind][0].format(0, "train"))
    if kind == "R G B":  # the weights that come with the program are of two classes
        assert "classes ground, car, tree, the model" in refused("eval", "--data", folder)
    [row] = read_rows(tmp_path / "one" / "predictions.csv")
    mask = Image.open(tmp_path / "one" / f"{row['output']}_mask.png")
    assert (mask.size, mask.mode) == ((40, 32), "L" if len(names) == 2 else "P")
    mask = np.asarray(mask) // (255 if len(names) == 2 else 1)
    assert all((mask == labels)[labels == c].mean() > 0.5 for c in {*labels.flat} - {255})
    for i, name in enumerate(names):
        assert float(row[f"fraction of {name}"]) == pytest.approx((mask == i).mean())

def test_the_random_split_stays_wherever_its_folder_lies(tmp_path):
    make_own_data(tmp_path / "own", "two classes", 20)
    here = {"before": partial(os.chdir, tmp_path)}
    for words in ("unet", "--data", "own", *TINY[2:], "--epochs", 1), ("--epochs", 2):
        run("train", *words, "--name", "a", **here)
    (tmp_path / "own" / "classes.txt").write_text("9 ground\n240 box\n")
    assert "or classes are not" in refused("train", "--resume", "runs/a", "--data", "./own", **here)
    make_own_data(tmp_path / "own", "two classes", 60)  # a new random split would be 6 and 6
    shutil.copytree(tmp_path / "own", tmp_path / "copy")
    for place, *options in ("own",), ("./own/", "--data", "./own/"), ("copy", "--data", "copy"):
        result = answer("eval", "--ckpt", "runs/a", *options, **here)
        assert result["images"] == 2 and result["data"] == place

def test_scores_are_of_each_image_once_and_of_the_mean_of_four_views(trained, toys, tmp_path):
    split = data.open_split(data.scan_dataset(toys), "test", (64, 64), tmp_path)
    (images, labels), predictor = data.get_batch(split, torch.arange(10)), load(trained["unet"])
    views, target = [], data.labels_to_target(labels)
    for size, flip in (64, ()), (64, (3,)), (48, ()), (80, (3,)):
        view = F.interpolate(data.normalize(images).flip(flip), (size, size), mode="bilinear",
                             antialias=True)
        probs = predictor.model(view).sigmoid().flip(flip)
        views.append(F.interpolate(probs, (64, 64), mode="bilinear"))
    logits, mask, pet = predictor.logits(images), sum(views)[:, 0] >= 2, target == 1
    torch.testing.assert_close(logits.sigmoid(), sum(views) / 4, rtol=0, atol=1e-5)
    dices = (2 * (mask & pet).sum((1, 2)) / (mask.sum((1, 2)) + pet.sum((1, 2)))).tolist()
    for batch_size, name in (4, "bce"), (10, "dice"):
        predictor.config |= {"batch_size": batch_size, "loss": name}
        loss, confusion = petseg.evaluate(predictor, split)
        assert loss == pytest.approx(layers.LOSSES[name](logits, target).item(), rel=1e-4)
        assert layers.image_scores(confusion, TWO).tolist() == pytest.approx(dices, abs=2e-3)

def test_options_name_what_there_is_and_long_runs_augment_more():
    for n, preset, name, lr in (99, "full", "muon", 0.02), (100, "strong", "adam", 0.004):
        config = petseg.resolve_config({"epochs": n, "optimizer": name}, torch.device("cpu"))
        assert (config["augment"], config["lr"]) == (petseg.AUGMENT_PRESETS[preset], lr)
    assert petseg.parse_augment("full,zoom=2,vflip=1") == petseg.FULL | {"zoom": 2, "vflip": 1}
    for names, table in ((petseg.MODELS, layers.MODELS), (petseg.OPTIONS["loss"][1], layers.LOSSES),
                         (petseg.OPTIONS["schedule"][1], layers.SCHEDULES)):
        assert {*names} == {*table}

def test_minutes_settle_epochs_and_progress_says_what_is_left(root, tmp_path, monkeypatch, capsys):
    words = ("train", "unet", *TINY, "--root", root, "--out", tmp_path, "--name")
    said = run(*words, "a", "--minutes", 0.05).stderr
    run(*words, "b", "--epochs", re.search(r"--epochs (\d+): about", said)[1])
    assert_same_run(tmp_path / "a", tmp_path / "b")
    # an epoch: 5 steps of 1, 2 or 3 s by size, and 3 s of val; at the end 10 s: 7 in 96, 8 in 104 s
    train_set, val_set = (data.CachedSplit([""] * n, None, None) for n in (20, 8))
    for seconds, epochs in (100, 7), (108, 8), (9, 1):
        monkeypatch.setattr(petseg, "seconds_per_batch", lambda *_, t=iter((1, 2, 3, 4)): next(t))
        args = CONFIG | {"minutes": seconds / 60, "size": (64, 64)}, petseg.build_model(CONFIG)
        assert petseg.epochs_in_minutes(*args, train_set, val_set, 10) == epochs
    monkeypatch.setattr(time, "monotonic", iter(range(0, 999, 31)).__next__)
    assert [*data.progress("ab", "read", 6, done=2)] == ["a", "b"]  # 31 s each
    assert "read: 4 of 6 images, 0.0/s, 0:01:02 left" in capsys.readouterr().err

def become(situation="", **environment):
    """Puts a process that is about to be the program into another situation."""
    os.environ |= environment
    if situation == "a full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    elif situation == "no right to write" and sys.platform == "linux":
        version, no_capabilities = (ctypes.c_uint * 2)(0x20080522), (ctypes.c_uint * 6)()
        assert ctypes.CDLL(None).capset(version, no_capabilities) == 0
    elif situation == "no fcntl":
        sys.modules["fcntl"] = None
    elif situation in ("Ctrl-C", "kill"):
        colorize, numbers = data.colorize_mask, iter(range(1, 999))
        last, signum = (9, signal.SIGINT) if situation == "Ctrl-C" else (151, signal.SIGKILL)
        def colorize_until_last(*args):
            if next(numbers) == last:
                os.kill(os.getpid(), signum)
            return colorize(*args)
        data.colorize_mask = colorize_until_last

def test_the_same_command_goes_on_or_says_finished(halfway, trained, root, tmp_path):
    words, folder = halfway
    (folder / "train.json").touch()
    before = files(folder)
    assert "it is finished; --epochs prolongs it" in run(*words, "--epochs", 1).stderr
    run(*words, "--epochs", 1, before=partial(exec, "import sys; sys.stderr = None"))  # 2>&-
    old, new = (json.loads(content["test.json"]) for content in (before, files(folder)))
    assert new == old | {"checkpoint": str(folder / "best.pt")} and "train.json" in files(folder)
    before = files(folder)
    for option, old, new in ("--lr", "0.02", "0.1"), ("--class-weights", "none", "auto"):
        assert f"begun with {option} {old}, not {new}" in refused(*words, option, new)
    less = shutil.copytree(root, tmp_path / "less")
    data.scan_dataset(less / data.TOYS).splits["train"][0].image.unlink()
    line = refused("train", "--resume", folder, "--epochs", 2, "--save-every", 9, "--root", less)
    assert re.search("images or classes are not those.*--name", line) and files(folder) == before
    for _ in range(2):  # the second time nothing is left to do
        answer(*words, "--epochs", 2)
    assert_same_run(folder, trained["unet"])
    for epochs, threads in (3, ("--threads", 2)), (4, ()):  # then the same number by itself
        said = run(*words, "--epochs", epochs, *threads).stderr
        assert ("not bit-exact" in said) == bool(threads) and not (folder / "train.json").exists()

KILLS = int(os.environ.get("PETSEG_KILLS", 0))  # of the long soak; -k killed_at runs it
KILLED = [
    "unet --dropout 0.3 --border random --grad-accum 2 --classes species --class-weights inverse",
    "resnet34_unet --precision bf16 --progressive 0.8 --schedule plateau --repeat 2 --grad-clip 0",
    "unet --optimizer adamw --dropout 0.2 --grad-accum 3 --schedule exponential --augment strong",
    "resnet34_unet --optimizer adam --ema 0 --border class --upsample bilinear --grad-checkpoint"]

@pytest.mark.parametrize("options", KILLED if KILLS else KILLED[:1])
def test_killed_at_random_moments_and_resumed_equals_undisturbed(options, root, tmp_path):
    words = ("train", *options.split(), *TINY, "--epochs", 4, "--size", 48, "--batch-size", 4,
             "--checkpoint-minutes", 0.001, "--root", root, "--out", tmp_path, "--name")
    run(*words, "undisturbed", "--checkpoint-minutes", 0)
    rng, kills, folder = np.random.default_rng(KILLED.index(options)), 0, tmp_path / "killed"
    while kills < (math.ceil(KILLS / len(KILLED)) or 3):
        with start(*words, "killed") as child:
            if rng.random() < 0.8:  # else while it starts
                assert said_until(child, f"{folder} on cpu")
            time.sleep(rng.uniform(0, 1.5))
            child.kill()
        kills += child.exitcode == -signal.SIGKILL
        if (folder / "test.json").exists():
            shutil.rmtree(folder)  # it came to its end: from the start again
    run(*words, "killed")
    assert_same_run(folder, tmp_path / "undisturbed")
    assert not list(folder.glob(".part-*"))

def test_stopped_saves_says_how_to_go_on_and_equals_undisturbed(root, tmp_path):
    words = ("train", "unet", *TINY, "--root", root, "--epochs", 3, "--batch-size", 2, "--out")
    large = ("--max-pixels", 40_000)  # what some of the toys have; a resume knows it by itself
    undisturbed = Path(answer(*words, tmp_path / "undisturbed", *large)["checkpoint"]).parent
    for signum, code, program in (signal.SIGINT, 130, "./run.sh"), (signal.SIGTERM, 143, ""):
        out, before = tmp_path / f"a {signum}", partial(become, PETSEG_PROGRAM=program)
        with start(*words, out, *large, before=before) as child:
            assert said_until(child, "epoch 1/3  32×32")
            [folder] = out.iterdir()
            assert "another process" in refused("train", "--resume", folder)
            os.kill(child.pid, signum)
        assert child.exitcode == code and len(read_rows(folder / "metrics.csv")) < 3
        command = child.stderr.splitlines()[-1].partition(f" {program or f'python {PROGRAM}'} ")[2]
        run(*shlex.split(command)), run("eval", "--ckpt", folder)
        assert_same_run(folder, undisturbed)

def make_infinite(part, name, path):
    last = torch.load(path, weights_only=True)
    last[part][name].view(-1)[0] = math.inf
    petseg.save_checkpoint(path, last)

@pytest.mark.parametrize("spoil, situation, expected", [
    (lambda path: os.truncate(path, path.stat().st_size // 2), "", "warning: .*last.pt"),
    (lambda path: path.unlink(), "", "warning: .*last.pt"),
    (lambda path: path.rename(path.with_name("next.pt")), "", "warning: .*last.pt"),
    (partial(make_infinite, "model", "head.weight"), "", "last.pt.*finite"),
    (partial(make_infinite, "ema", "encoder.0.0.bn.running_var"), "", "last.pt.*finite"),
    (nothing, "a full disk", "petseg: .*make room"),
    (lambda path: path.parent.chmod(0o555), "no right to write", "denied: .{}.*--out")])
def test_damaged_files_and_failed_writes_lose_nothing(spoil, situation, expected, halfway, trained):
    words, folder = halfway
    spoil(folder / "last.pt")
    before = {name: content for name, content in files(folder).items() if ".pt" in name}
    done = run(*words, "--epochs", 2, before=partial(become, situation), code=2 if situation else 0)
    folder.chmod(0o755)
    assert re.search(expected.format(folder), done.stderr)
    if situation:
        assert before.items() <= files(folder).items() and not [*folder.glob(".part-*")]
        run(*words, "--epochs", 2)
    assert_same_run(folder, trained["unet"])
    for name in ("last.pt", "previous.pt"):
        os.truncate(folder / name, 9999)
    assert "--init-from" in refused(*words, "--epochs", 3)

@pytest.mark.parametrize("options", [
    "--lr 1e30", "--optimizer adamw --lr 1e20 --ema 0 --checkpoint-minutes 0.0001"])
def test_a_run_that_diverges_stops_with_advice_and_keeps_a_good_checkpoint(options, root, tmp_path):
    words = ("train", "unet", *TINY, *options.split(), "--grad-clip", 0, "--precision", "fp32",
             "--epochs", 2, "--root", root, "--out", tmp_path, "--name", "a")
    for _ in range(2):  # the second time from the last good checkpoint
        assert re.search("not finite.*begin anew.*--lr", refused(*words))
        last = torch.load(tmp_path / "a" / "last.pt")
        assert all(x.isfinite().all() for key in ("model", "ema") for x in last[key].values())

def test_an_epoch_takes_all_images_in_an_order_of_its_own(root, tmp_path, monkeypatch):
    orders, heads, saved, ema_steps, rates = {}, set(), [], [], []
    def step(config, model, optimizers, train_set, indices, epoch, step, weights):
        orders.setdefault((config["seed"], epoch), []).append(indices.tolist())
        heads.add(model.head.weight.sum().item())  # as drawn, since no step is made
        muon, adamw = (optimizer.param_groups[0]["lr"] for optimizer in optimizers)
        pet = float((train_set.labels % 128).mean())  # 1 and 129
        assert adamw == 0.3 * muon
        rates.append(muon)
        assert weights.tolist() == pytest.approx([2 * pet, 2 * (1 - pet)], rel=1e-3)  # inverse
        return torch.tensor([2.0, 4, 3, 1]), torch.zeros(2, 2).long()
    monkeypatch.setattr(petseg, "train_step", step)
    monkeypatch.setattr(petseg, "save_last", lambda folder, run, *_: saved.append(
        (run.epoch, run.step)) or -math.inf)  # the last time was long ago
    monkeypatch.setattr(layers, "update_ema", lambda *args: ema_steps.append(args[3]))
    monkeypatch.setattr(signal, "signal", nothing)
    lost = Namespace(isatty=bool, flush=nothing, write=lambda text: os.close(-1))  # an OSError
    monkeypatch.setattr(sys, "stderr", lost)  # a log that is lost ends no run
    for seed in 0, 1:
        words = ("train", "unet", *TINY, "--root", root, "--out", tmp_path, "--epochs=2", "--seed",
                 seed, "--repeat=2", "--batch-size=5", "--grad-accum=3", "--class-weights=inverse",
                 "--size=64x96", "--name", seed)
        petseg.train(petseg.command_line().parse_args([*map(str, words)]))
        for row in read_rows(tmp_path / f"{seed}" / "metrics.csv"):
            assert [float(row[f"train_{n}"]) for n in ("loss", "dice", "iou")] == [0.5, 0.75, 0.25]
    # the first epoch has a fifth of the pixels; the rate warms up for 0.15 of all, then a cosine
    done = [*np.arange(0.02, 0.2, 0.04), *np.arange(0.28, 1, 0.16)]
    assert rates == pytest.approx(2 * [0.02 * min(
        p / 0.15, 0.5 + 0.5 * math.cos(math.pi * (p - 0.15) / 0.85)) for p in done])
    assert all([*map(len, order)] == [15, 15, 15, 15, 12] for order in orders.values())
    epochs = {tuple(sum(order, [])) for order in orders.values()}
    assert {(*sorted(epoch),) for epoch in epochs} == {(*sorted([*range(36)] * 2),)}
    assert len(epochs) == 4 and len(heads) == 2 and ema_steps == [*range(10)] * 2
    assert {(1, 3), (2, 1)} <= {*saved}
    monkeypatch.setattr(petseg, "catch_signals", lambda: [signal.SIGTERM])  # at the first step
    saved.clear()
    words = (*words[:-1], "stopped", "--checkpoint-minutes=0")
    with pytest.raises(SystemExit, match="143"):
        petseg.train(petseg.command_line().parse_args([*map(str, words)]))
    assert saved == [(1, 0)] * 2  # at the start, and when it stops

def test_init_from_takes_all_weights_but_a_head_of_other_classes(trained, root, tmp_path):
    best = shutil.copy(trained["unet"] / "best.pt", tmp_path)
    given, words = torch.load(best, weights_only=True), ("--root", root, "--out", tmp_path)
    for options, other in ("", "running|tracked"), ("--classes species", "running|tracked|head"):
        done = run("train", "unet", "--init-from", best, "--data", "toy", *words, "--lr", 0,
                   "--json", "--ema", 0, "--epochs", 1, *options.split())  # nothing is learned
        assert ("the head starts at random" in done.stderr) == bool(options)
        result = json.loads(done.stdout)
        folder = Path(result["checkpoint"]).parent
        last = torch.load(folder / "last.pt", weights_only=True)
        assert all(torch.equal(last["model"][name], weight.float())
                   for name, weight in given["weights"].items() if not re.search(other, name))
    assert [row["class"] for row in result["classes"]] == ["background", "cat", "dog"]
    assert "do not compare" in refused("compare", folder, trained["unet"], *words[2:])
    os.remove(best)  # a resumed run has no need of it
    run("train", "--resume", folder, "--epochs", 2)

def model_and_split(*labels):
    """A convolution, and nine images of noise with labels drawn from these four."""
    torch.manual_seed(0)
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 4)).astype(np.uint8)
    split = data.CachedSplit([*"abcdefghi"], noise[..., :3], np.uint8(labels)[noise[..., 3] // 64])
    return nn.Conv2d(3, 1, 3, padding=1), split

def take_step(model, split, config, indices, *args):
    """What a training step returns, and the gradients."""
    config = CONFIG | {"size": (64, 64), "epochs": 3, "progressive": 0} | config
    stay = Namespace(step=nothing, zero_grad=nothing)
    result = petseg.train_step(config, model, [stay], split, torch.tensor(indices), *args)
    return *result, model.weight.grad, model.bias.grad

@pytest.mark.parametrize("change", [
    {"loss": "bce"}, {"loss": "dice"}, {"border": "ignore"}, {"border": "background"},
    {"border": "random"}, {"augment": {}}, {"augment_prob": 0.5}, {"progressive": 1.0},
    {"precision": "bf16"}, {"grad_clip": 1e-3}, {"weights": [1.0, 5.0]}])
def test_a_training_step_heeds_its_options(change):
    def gradient(weights=(1.0, 1.0), **config):
        config = {"augment": {"shift": 0.9, "flip": 0.5}} | config
        return take_step(*model_and_split(0, 1, 129, 255), config, range(8), 1, 0,
                         torch.tensor(weights))[2]
    assert torch.equal(gradient(), gradient()) and not torch.equal(gradient(), gradient(**change))

def test_each_seed_epoch_step_and_micro_step_draws_its_own_numbers():
    (model, split), draws = model_and_split(0, 1, 0, 1), []
    split = split._replace(images=split.images[[0] * 9])  # all the same
    model.register_forward_pre_hook(lambda _, x: draws.append((x[0].sum().item(), *torch.rand(1))))
    for seed, *when in (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1):
        take_step(model, split, {"augment": {"shift": 0.9}, "seed": seed}, range(8), *when)
    assert [len({*map(float, each)}) for each in zip(*draws)] == [8, 8]  # two micro-steps each

def test_a_step_with_infinite_gradients_is_skipped(monkeypatch):
    model, split = model_and_split(0, 1, 0, 1)
    optimizer, before = torch.optim.SGD(model.parameters(), 0.1), copy.deepcopy(model.state_dict())
    for factor, moves in (math.inf, False), (1, True):
        monkeypatch.setitem(layers.LOSSES, "bce", lambda logits, *_: logits.sum() * factor)
        sums, confusion = petseg.train_step(CONFIG | {"loss": "bce"}, model, [optimizer], split,
                                            torch.arange(9), 1, 0)
        assert sums.any() == confusion.any() == moves and model.weight.grad is None
        assert torch.equal(model.weight, before["weight"]) != moves

def step_gradients(folder, number, processes):
    """What evaluation and a training step give in one of several processes."""
    store = dist.FileStore(str(folder / f"store of {processes}"), processes)
    dist.init_process_group("gloo", store=store, rank=number, world_size=processes)
    petseg.RANK, petseg.WORLD_SIZE = number, processes
    model, split = model_and_split(0, 1, 0, 1)
    model.register_buffer("mean", torch.tensor([2.0 * number + (processes == 1)]))  # mean: 1
    predictor = Namespace(config=CONFIG, threshold=0.5, logits=model, device=torch.device("cpu"))
    loss, confusion = petseg.evaluate(predictor, split)
    values = take_step(model, split, {"batch_size": 3, "grad_clip": 0}, [8, 1, 7, 2, 6, 3, 5], 1, 0)
    return [value.numpy() for value in (*values, model.mean, torch.tensor(loss), confusion)]

def test_two_processes_find_the_gradients_and_scores_of_one(tmp_path):
    places = [(tmp_path, 0, 1), (tmp_path, 0, 2), (tmp_path, 1, 2)]
    with FORKS.Pool(3, maxtasksperchild=1) as pool:
        one, *two = pool.starmap(step_gradients, places, chunksize=1)
    # in batches of 3, 3 and 1: the last has none for the second process
    model, split = model_and_split(0, 1, 0, 1)
    images, labels = data.get_batch(split, [8, 1, 7, 2, 6, 3, 5])
    logits = model(data.normalize(images))
    dice, iou = np.sum([slow_metrics(*pair, 1)[3:] for pair in zip(logits >= 0, labels)], axis=0)
    (loss := layers.bce_dice_loss(logits, labels)).backward()  # of all as one batch
    assert one[0].tolist() == pytest.approx([7 * loss.item(), 7, dice, iou], rel=1e-3)
    torch.testing.assert_close(one[2], model.weight.grad.numpy(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(two, [one, one], rtol=1e-5, atol=1e-5)

def run_by_two(*words, between=nothing, code=0):
    """The first of two processes that run a command under torchrun; the second is silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    job = dict(TORCHELASTIC_RUN_ID="job", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    both = [start(*words, before=partial(become, RANK=r, LOCAL_RANK=r, **job)) for r in "01"]
    with both[0] as first, both[1] as second:
        between(first, second)
    assert (first.exitcode, second.exitcode) == (code, code), (first.stderr, second.stderr)
    assert second.stdout == "" and (code == 2 or second.stderr == "")
    return first

@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's workers in /proc")
def test_two_processes_stopped_or_killed_equal_undisturbed(root, tmp_path):
    def stop(first, second):
        assert said_until(first, "epoch 1/4  32×32")
        os.kill(second.pid, signal.SIGTERM)
    words = ("train", "unet", *TINY, "--root", root, "--epochs", 4, "--batch-size", 7, "--border",
             "random", "--dropout", 0.5, "--checkpoint-minutes", 0.001, "--out")
    assert "threads: 2 × 1" in run_by_two(*words, tmp_path / "quiet").stderr
    undisturbed, folder = (tmp_path / name / "toy-pets-unet-job" for name in ("quiet", "stopped"))
    stopped = run_by_two(*words, folder.parent, between=stop, code=143)
    assert f"--resume {folder}" in stopped.stderr and len(read_rows(folder / "metrics.csv")) < 4
    run_by_two(*words, folder.parent)  # finds the run by the launcher's id
    assert_same_run(folder, undisturbed)
    words, needed = (*words, tmp_path, "--name", "killed"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    assert f"{needed}=1" in refused(*words, before=partial(
        become, TORCHELASTIC_RUN_ID="job", TORCHELASTIC_MAX_RESTARTS="3"))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             "--max-restarts=3", PROGRAM, *words]
    with subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          text=True, env=os.environ | {needed: "1"}) as launcher:
        assert any("epoch 2/4  32×32" in line for line in launcher.stderr)
        workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(workers[1]), signal.SIGKILL)
        rest = launcher.stderr.read()
    assert launcher.returncode == 0 and "resuming" in rest and "Traceback" not in rest
    assert_same_run(tmp_path / "killed", undisturbed)
    words = ("--ckpt", undisturbed, "--root", root, "--out")
    run("eval", *words, tmp_path / "one")
    run_by_two("eval", *words, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert "leave out torchrun" in refused("infer", before=partial(become, WORLD_SIZE="2"))

def test_infer_takes_images_of_any_kind_and_names_the_broken(trained, pets, tmp_path):
    folder, out = tmp_path / "in", tmp_path / os.fsdecode(b"out \xff")
    (folder / "deep" / ".hidden").mkdir(parents=True)
    (folder / "deep" / "loop").symlink_to(folder)
    for name in (b"a b.png", b"two\nlines.tif", b"-dash.bmp", b"Cat.png", b"deep/cat.jpg",
                 b"deep/.hidden/a.png", b"\xff.png", b"x" * 251 + b".gif", b"x" * 250 + b"y.png"):
        Image.linear_gradient("L").resize((300, 7)).save(folder / os.fsdecode(name))
    (folder / "cut.jpg").write_bytes((folder / "deep" / "cat.jpg").read_bytes()[:-99])
    (folder / "text\n.jpg").write_bytes(b"no image")
    Image.new("L", (65_501, 1)).save(folder / "long.png")  # too long for its overlay
    known, *damaged = data.scan_dataset(pets).splits["val"]
    damaged[0].mask.write_text("text")
    Image.new("L", (9, 9), 1).save(damaged[1].mask)
    Image.open(damaged[2].mask).point(lambda value: 9).save(damaged[2].mask)
    photos = [sample.image for sample in (known, *damaged)]  # a damaged trimap stops no photo
    cut = data.scan_dataset(pets).splits["train"][0].image  # the photo itself, beside a good trimap
    os.truncate(cut, 999)
    words = ("infer", "--ckpt", trained["unet"], "--save")
    done = run(*words, "mask,overlay,cutout,panel", "--json", "--out", out, cut, *photos,
               "--", "-dash.bmp", ".", code=2, before=partial(os.chdir, folder))
    result, rows = json.loads(done.stdout), read_rows(out / "predictions.csv")
    assert "could not be read: 4 of 17" in done.stderr and len(rows) == result["images"] == 13
    assert done.stderr.count(cut.name) == 1
    assert all(re.search(f"\n  .*{name}: ", done.stderr) for name in ("cut.jpg", "n.jpg", "ng.png"))
    assert all(re.search(f"warning: .*{sample.name}", done.stderr) for sample in damaged)
    names = ["-dash", "-dash-2", "Cat", "cat-2", "a b", r"two\nlines", r"\udcff", 200 * "x",
             200 * "x" + "-2"]
    sizes = {path.stem: Image.open(path).size for path in photos} | dict.fromkeys(names, (300, 7))
    outputs = {"mask.png": "L", "overlay.jpg": "RGB", "cutout.png": "RGBA", "panel.jpg": "RGB"}
    assert {path.name for path in out.iterdir()} == {"predictions.csv"} | {
        f"{name}_{output}" for name in sizes for output in outputs}
    for row in rows:
        images = [Image.open(out / f"{row['output']}_{output}") for output in outputs]
        assert [image.mode for image in images] == [*outputs.values()]
        assert {image.size for image in images[:3]} == {sizes[row["output"]]}
        assert float(row["fraction of pet"]) == pytest.approx((np.asarray(images[0]) == 255).mean())
        assert [row[edge] for edge in ("left", "top", "right", "bottom")] == [
            *map(str, images[0].getbbox() or [""] * 4)]
        assert row["dice"] == (str(result["dice"]) if row["output"] == known.name else "")
        assert 0.5 <= float(row["confidence"]) <= 1
    words += ("mask", "--out", tmp_path / "fewer", known.image)
    done = run(*words, max(pets.glob("images/*")), "--threshold", 1)
    assert f"no pet found in {known.image}" in done.stderr
    assert answer(*words, "--skip-existing", "--save", "overlay")["scored"] == 1
    assert len(read_rows(tmp_path / "fewer" / "predictions.csv")) == 2  # the other one too
    mask, done = f"{known.name}_mask.png", run(*words)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "fewer" / mask)
    assert (tmp_path / "fewer" / mask).read_bytes() == (out / mask).read_bytes()  # as among others

def test_infer_writes_one_file_or_stdout_on_a_background_and_cropped(trained, tmp_path):
    photo, folder, profile = np.full((80, 120, 4), 255, np.uint8), tmp_path / "in", b"profile" * 9
    photo[:, :60, :3] = np.random.default_rng(0).integers(0, 255, (80, 60, 3))
    photo[:, 90:, 3] = 0
    folder.mkdir()
    Image.fromarray(photo).save(folder / "cat.png", icc_profile=profile)
    words, images = ("infer", "--ckpt", trained["unet"], "--threshold", 0.05), []
    done = run(*words, folder / "cat.png", "--out", tmp_path / "a.png")
    assert done.stdout.split()[-1] == str(tmp_path / "a.png") and len([*tmp_path.iterdir()]) == 2
    with open(folder / "cat.png") as stdin:
        done = subprocess.run([sys.executable, PROGRAM, *map(str, words), "-"], stdin=stdin,
                              capture_output=True, cwd=tmp_path)
    assert done.stdout == (tmp_path / "a.png").read_bytes() and len([*tmp_path.iterdir()]) == 2
    cut = Image.open(tmp_path / "a.png")
    assert cut.info["icc_profile"] == profile and cut.mode == "RGBA" and cut.size == (120, 80)
    assert cut.getbbox() and not np.asarray(cut)[:, 90:].any()  # what was transparent stays so
    for options in "--background blur --crop", "", "--background lime":
        run(*words, folder / "cat.png", *options.split(), "--out", tmp_path / "b.jpg")
        images.append(Image.open(tmp_path / "b.jpg").copy())
        assert images[-1].mode == "RGB" and images[-1].info["icc_profile"] == profile
    assert images[0].width < 120 and min(images[1].getpixel((119, 79))) > 250  # JPEG has no alpha
    assert np.allclose(images[2].getpixel((119, 79)), (0, 255, 0), atol=9)
    make_files(folder, "note.txt", "clip.mov", "phone.HEIC")
    done = run(*words, folder, "--out", tmp_path / "out", code=2)
    assert re.search("read: 1 of 2:\n  .*phone.HEIC: .*pip install pillow-heif", done.stderr)

def test_backgrounds_and_crops(tmp_path):
    cut = Image.new("RGBA", (100, 60), (9, 9, 9, 0))
    cut.paste((200, 100, 0, 255), (40, 20, 60, 60))
    cut.paste((200, 100, 0, 127), (40, 10, 60, 20))
    Image.new("RGB", (400, 120), "blue").save(tmp_path / "a.png")
    for text, *rgb in ("lime", 0, 255, 0), ("#369", 51, 102, 153), (tmp_path / "a.png", 0, 0, 255):
        image = np.asarray(data.finish_cutout(cut, data.read_background(text)))
        assert image.shape == (60, 100, 3) and image[0, 0].tolist() == rgb
        assert image[30, 50].tolist() == [200, 100, 0]
        assert np.allclose(image[15, 50], np.mean([(200, 100, 0), rgb], axis=0), atol=2)
    for background in None, Image.new("RGB", (1, 1)):  # a margin of a twentieth of the longer side
        assert data.finish_cutout(cut, background, crop=True).size == (20 + 2 * 2, 50 + 2)

def test_profiles_go_along_where_they_fit(tmp_path):
    for mode in ("RGB", "RGBA", "P", "CMYK", "L"):
        Image.new(mode, (9, 9)).save(tmp_path / "a.tif", icc_profile=b"profile")
        for path in (tmp_path / f"b.{kind}" for kind in ("png", "jpg", "webp")):
            data.save_image(data.to_photo(tmp_path / "a.tif"), path)
            assert Image.open(path).info.get("icc_profile", b"") == b"profile" * (mode[0] in "RP")
    photo = Image.new("RGB", (9, 9))
    for photo.info in {"alpha": "A", "icc_profile": "text"}, {"alpha": Image.new("L", (9, 8))}:
        assert data.to_photo(photo).info == {"icc_profile": b"", "alpha": None}  # a PNG's; cropped

def test_infer_is_stopped_and_does_the_rest(trained, toys, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    for i in range(4):
        shutil.copytree(toys / "images", photos / str(i), copy_function=os.link)
    words = ["infer", "--ckpt", trained["unet"], photos, "--out", out, "--save", "mask", "--no-tta"]
    assert "--skip-existing" in run(*words, code=130, before=partial(become, "Ctrl-C")).stderr
    first = {row["output"]: row for row in read_rows(out / "predictions.csv")}
    assert 0 < len(first) < 200 and not list(out.glob(".part-*"))
    removed, *others = [out / f"{name}_mask.png" for name in first]
    removed.unlink()
    times = [path.stat().st_mtime_ns for path in others]
    result = answer(*words, "--skip-existing")
    assert (result["images"], result["skipped"]) == (200, len(others))
    assert times == [path.stat().st_mtime_ns for path in others]
    rows = {row["output"]: row for row in read_rows(out / "predictions.csv")}
    assert len(rows) == len(list(out.glob("*_mask.png"))) == 200 and first.items() <= rows.items()
    run(*words, code=-signal.SIGKILL, before=partial(become, "kill"))
    assert 90 < answer(*words, "--skip-existing")["skipped"] < 151
    words[3] = shutil.copytree(photos, tmp_path / "others")  # other photos of the same names
    run(*words, "--skip-existing", code=-signal.SIGKILL, before=partial(become, "kill"))
    assert answer(*words[:3], photos, *words[4:], "--skip-existing")["skipped"] == 0

def test_a_cutout_has_soft_edges_without_the_colour_behind(trained):
    predictor, size = load(trained["unet"]), (200, 300)
    inside = np.hypot(*np.mgrid[-100:100, -150:150]) < 70
    photo = np.where(inside[..., None], (200, 150, 90), (20, 60, 200)).astype(np.uint8)
    photo = np.asarray(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(2)))  # a soft edge
    wide = Image.fromarray(np.hypot(*np.mgrid[-100:100, -150:150]) < 78)  # as trimaps are learned
    p = np.asarray(wide.convert("L").resize((64, 64))).astype(np.float32)[None] / 255
    several = np.concatenate((1 - p, p * 0.6, p * 0.4))
    for probs, border, names in (p, "foreground", TWO), (several, "class", [*TWO, "border"]):
        predictor.config |= {"border": border, "class_names": names}
        result = petseg.Segmentation(data.to_photo(photo), probs, inside.astype(np.uint8),
                                     data.without_islands(probs, 0.5))
        cut = np.asarray(predictor.cutout(result)).astype(int)
        alpha = cut[..., 3] / 255
        assert cut.shape == (*size, 4) and np.abs(alpha - inside).mean() < 0.02
        assert predictor(result).shape == (size if len(probs) == 1 else (len(probs), *size))
        tint = np.abs(np.int16(predictor.overlay(result)) - photo).max(axis=2)
        assert tint[95:105, 145:155].min() > 20 > 0 == tint[:15].max()  # the middle, the background
        soft = (alpha > 0.3) & (alpha < 0.7)
        assert soft.sum() > 50 and (cut[soft, 0] - photo[soft, 0]).mean() > 20  # more red
        assert np.array_equal(cut[alpha == 1, :3], photo[alpha == 1]) and not cut[alpha == 0].any()

def test_from_python(trained, toys, tmp_path):
    path, predictor = min((toys / "images").iterdir()), load(trained["unet"])
    run("infer", "--ckpt", trained["unet"], path, "--out", tmp_path, "--precision", "fp32")
    photo, p = Image.open(path), predictor(path)
    assert p.shape == photo.size[::-1] and p.dtype == np.float32 and 0 <= p.min() <= p.max() <= 1
    assert np.array_equal(p, predictor(photo)) and np.array_equal(p, predictor(np.asarray(photo)))
    assert np.array_equal(p >= 0.5, np.asarray(predictor.mask(photo)) == 255)
    for name in ("mask", "cutout"):
        written = Image.open(tmp_path / f"{path.stem}_{name}.png")
        assert np.array_equal(getattr(predictor, name)(photo), written)
    words = [sys.executable, "-c", "import petseg"]
    assert subprocess.check_output(words, stderr=subprocess.STDOUT, cwd=tmp_path) == b""

def test_every_python_block_of_readme_and_docs_runs(tmp_path, monkeypatch, capsys):
    for name in ("weights", "docs"):
        (tmp_path / name).symlink_to(PROGRAM.parent / name)
    run("export", "--out", tmp_path / "model.pt2")
    blocks = [block for path in (PROGRAM.with_name("README.md"), *PROGRAM.parent.glob("docs/*.md"))
              for block in re.findall(r"(?ms)^```python\n(.*?)^```", path.read_text())]
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
    assert capsys.readouterr() == ("", "")
    assert Image.open(tmp_path / "cat.png").mode == "RGBA"

def test_infer_leaves_out_its_own_outputs_and_holds_few_bytes_a_pixel(trained, tmp_path):
    words, peaks = ("infer", "--ckpt", trained["unet"], tmp_path, "--out"), []
    for name, size in ("photo.png", 40), ("a_mask.png", 4000):
        Image.linear_gradient("L").resize((size, size)).convert("RGB").save(tmp_path / name)
        peaks.append(int(run(*words, tmp_path / "out").peak))
    assert peaks[1] - peaks[0] < 30 * 4000 * 4000
    for out, images in ("out", 1), ("more", 4):  # elsewhere a name like that may be a photo's
        done = run(*words, tmp_path / out, "--max-pixels", 15_999_999, "--json", code=2)
        assert json.loads(done.stdout)["images"] == images
        assert re.search("a_mask.png has over 15,999,999 pixels.*--max-pixels", done.stderr)
    shutil.copy(tmp_path / "photo.png", tmp_path / "out" / "dog_mask.bmp")
    assert answer(*words[:3], tmp_path / "out", "--out", tmp_path / "out")["images"] == 1

@pytest.mark.parametrize("model, largest", [("unet", 8e6), ("resnet34_unet", 16e6)])
def test_the_weights_that_come_with_the_program(model, largest, tmp_path):
    path, photo = PROGRAM.with_name("weights") / f"{model}.pt", PROGRAM.parent / "docs/chelsea.jpg"
    config, _, metrics = torch.load(path, weights_only=True).values()
    assert path.stat().st_size <= largest and f"train {model} --data pets" in config["command"]
    assert metrics["val_dice"] > 0.938
    words = () if model == "unet" else ("--ckpt", path)  # unet.pt is the default
    run("infer", *words, photo, "--out", tmp_path)
    mask = Image.open(tmp_path / "chelsea_mask.png")
    assert mask.getpixel((225, 100)) == 255 and mask.getpixel((445, 150)) == 0  # the cat looks left

def test_compare_keeps_runs_apart(trained, tmp_path):
    folders = [shutil.copytree(trained["unet"], tmp_path / f"lr-0.0{i}") for i in (1, 2)]
    words = ("compare", *folders, trained["resnet34_unet"], "--out", tmp_path / "a")
    for row, folder in zip(answer(*words)["runs"], words[1:4], strict=True):
        assert row["test_dice"] == json.loads((folder / "test.json").read_text())["dice"]
        assert f"\n| {folder.name} " in (tmp_path / "a/table.md").read_text()
        assert row["run"] == folder.name and min(row["parameters"], row["multiply_adds"]) > 1000
        rows = read_rows(folder / "metrics.csv")
        assert row["best_val_dice"] == max(float(epoch["val_dice"]) for epoch in rows)

def test_without_the_pets_auto_takes_the_toys(toys, tmp_path):
    shutil.copytree(toys, tmp_path / data.TOYS)
    (tmp_path / "images.tar.gz").write_bytes(b"damaged")  # in the folder that is the mirror
    words = ("train", "unet", *TINY[2:], "--root", tmp_path, "--url", tmp_path.as_uri(), "--out",
             tmp_path, "--epochs", 1)
    assert "checksum" in refused(*words, "--data", "pets")
    assert "\n!!! What follows uses TOY PETS" in run(*words).stderr
    assert '"data": "toy"' in next(tmp_path.glob("toy-pets-unet-*/config.json")).read_text()

def test_summary_and_bench(root):
    for model, parameters, products in (  # half the FLOPs that torch's FlopCounterMode counts
            ("unet", 31_037_633, 48_167_387_136), ("resnet34_unet", 24_451_585, 9_467_592_704)):
        table = answer("summary", model, "--width", 64, "--size", 256)
        assert sum(row["parameters"] for row in table["layers"]) == parameters
        assert (table["parameters"], table["multiply_adds"]) == (parameters, products)
    for words in (), ("--baseline",):
        result = answer("bench", "unet", "--root", root, *TINY, "--batch-size", 2, *words)
        assert min(result.values()) > 0 and ("memory" in result or sys.platform == "darwin")

def test_an_exported_model_says_what_its_predictor_says(trained, tmp_path):
    folder, path, notes = trained["resnet34_unet"], tmp_path / "a/b.pt2", {"petseg.json": ""}
    done, predictor = run("export", "--ckpt", folder, "--out", path), load(folder, tta=False)
    assert not done.stderr and list(path.parent.iterdir()) == [path]
    model = torch.export.load(path, extra_files=notes).module()
    assert json.loads(notes["petseg.json"])["class_names"] == TWO
    for x in map(torch.rand, ((1, 3, 64, 64), (5, 3, 64, 160), (3, 3, 128, 96))):
        torch.testing.assert_close(model(x), predictor.logits(x).sigmoid(), rtol=0, atol=1e-5)

@pytest.mark.parametrize("words", ["--help", *(f"{name} --help" for name in petseg.COMMANDS), ""])
def test_help_comes_without_torch_and_ctrl_c_while_it_is_imported(words, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run([sys.executable, PROGRAM, *(words or "data").split()],
                          env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.stdout[:5], done.returncode) == ((b"usage", 0) if words else (b"", -signal.SIGINT))

def test_hostile_checkpoints_are_refused_at_once(trained, tmp_path):
    class Code:
        def __reduce__(self):  # reading it back would make a folder
            return os.mkdir, (str(tmp_path / "executed"),)
    best, name = (trained["unet"] / "best.pt").read_bytes(), "head.weight"
    good = torch.load(io.BytesIO(best), weights_only=True)
    weights, config = good["weights"], good["config"]
    contents = [{"config": 3}, {"weights": torch.zeros(3)}, {"weights": Code()},
                {"weights": {}}, {"weights": weights | {"more": torch.ones(3)}}]
    contents += [{"weights": weights | {name: value}} for value in (
        torch.zeros(1).expand(10**12), "text", weights[name] * math.nan, weights[name].long())]
    contents += [{"config": config | change} for change in (
        {"width": 2**40}, {"width": -1}, {"model": "vgg"}, {"size": (0, 0)}, {"size": (9**9, 32)},
        {"class_names": []}, {"class_names": [["a"], "b"]}, {"class_names": ["pet"] * 10**5})]
    for i, content in enumerate(contents):
        petseg.save_checkpoint(tmp_path / f"{i}.pt", good | content)
    for i, content in enumerate((b"text", b"", bytes(10**7), best[:-5000], best[5000:])):
        (tmp_path / f"{i}.bin").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        with zipfile.ZipFile(io.BytesIO(best)) as archive:
            for part in archive.namelist():  # 400 kB that unpack to 400 MB
                bomb.writestr(part, bytes(4 * 10**8) if part.endswith("/0") else archive.read(part))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(data.UserError, match=re.escape(str(path))):
            load(path)
    assert not (tmp_path / "executed").exists()
    for path in (tmp_path / "5.pt", tmp_path / "bomb.pt"):  # 10¹² numbers in the first
        assert int(run("infer", "--ckpt", path, tmp_path, code=2).peak) < 5 * 10**8
    petseg.save_checkpoint(tmp_path / "old.pt", {"petseg": 1, "weights": weights})
    assert "or of an older version" in refused("infer", "--ckpt", tmp_path / "old.pt", tmp_path)

def test_no_bit_of_a_checkpoint_flips_unseen(trained, tmp_path):
    content, good = (trained["unet"] / "best.pt").read_bytes(), load(trained["unet"])
    rng, end = np.random.default_rng(0), len(content)
    entry, last = (content.rindex(b"PK\x01\x02", 0, i) for i in (content.rindex(b"/data/9"), end))
    places = [(entry + 10, 3), (entry + 38, 4)]  # a tensor "is compressed", "is a folder"
    places += [(place, rng.integers(8)) for place in (  # anywhere, in its entry, in the last one
        *rng.integers(end, size=40), *range(entry, entry + 60), *range(last, end))]
    for place, bit in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        (tmp_path / "flipped.pt").write_bytes(flipped)
        with suppress(data.UserError):
            predictor = load(tmp_path / "flipped.pt")
            assert predictor.config == good.config
            weights = zip(predictor.model.parameters(), good.model.parameters(), strict=True)
            assert all(torch.equal(*pair) for pair in weights), (place, bit)

@pytest.mark.parametrize("words, expected", [
    ("train", "./run.sh train unet, or train resnet34_unet"),
    ("train unet --size 31", "31.*./run.sh train -h"), ("train unet --device cuda", "device cpu"),
    ("train unet {toys} --minutes 5 --epochs 3", "leave out --epochs"),
    ("train unet --augment swirl=1", "none, flip, full, strong.*rotate.*swirl"),
    ("train unet --data {folder}/own --root {folder}", "png holds(.|\n)*\n  64 0 128 class"),
    ("train unet --data {folder}/own --border class", "need the layout of the pets"),
    ("train unet {toys} --size 32 --width 3000000", "memory.*--width"),
    ("train unet {toys} --init-from {run} --width 9", "of another model"),
    ("data get --root {folder} --url pets", "pets/images.tar.gz cannot be used"),
    ("data check --root {folder}", "never fetched .*./run.sh data get"),
    ("eval --ckpt {run}/last.pt", "not the best.pt of a run.*last.pt: --resume its folder"),
    ("infer --ckpt {run} {folder} --save drawing", "mask, overlay, .*, not drawing"),
    ("data check {toys} --max-pixels 99", "cannot be used: 50:\n  .*--max-pixels"),
    ("export --ckpt {folder}/nowhere.pt", "out must end in .pt2"),
    ("infer --out {folder}/cat.gif {folder}/own/images/0.png", "as png, webp, jpg"),
    ("infer --out {folder}/own/images/0.jpg {folder}/own/images/../images/0.jpg", "not itself"),
    ("infer --out {folder}/cat.PNG {folder}/own", "one output of one image.*infer cat.jpg --out"),
    ("infer --background reddish {folder}/own", "reddish is no file, no colour")])
def test_what_a_user_gets_wrong(words, expected, trained, root, tmp_path):
    make_own_data(tmp_path / "own", "R G B", 3)
    (tmp_path / "own" / "classes.txt").unlink()
    words = words.format(folder=tmp_path, run=trained["unet"], toys=f"--data toy --root {root}")
    out = () if words.startswith("data") or "--out" in words else ("--out", tmp_path / "out")
    said = refused(*words.split(), *out, before=partial(become, PETSEG_PROGRAM="./run.sh"))
    assert re.search(expected, said) and not [*tmp_path.glob("out/*")]
