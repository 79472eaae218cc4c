"""test_petseg.py: what petseg promises, in the order of its rooms: layers, data, petseg.

Expected numbers come from the formula, written again here as slowly and plainly as possible, or
were worked out by hand. Nothing here needs a network, a GPU, or a fast machine.
"""
import copy
import csv
import ctypes
import errno
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from argparse import Namespace
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # else each copy below imports it anew, at 1.3 seconds
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import layers
import petseg

# networks this small gain nothing from a second thread, and lose much where the cores are shared
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")  # pytest resets what data.py sets
PROGRAM = Path(__file__).with_name("petseg.py")
NETWORKS = [layers.UNet, layers.ResNet34UNet]
TWO = ["background", "pet"]
TINY = ("--data", "toy", "--size", 32, "--width", 2)
# what a best.pt says beside its weights, and how it was made
ABOUT = {"petseg": "network", "model": "unet", "width": 2, "up": "transpose", "dropout": 0.0,
         "size": (32, 32), "classes": TWO, "border": "foreground", "mean": data.MEAN,
         "std": data.STD}
MADE = {"data": "toy", "root": "data", "command": "train", "classes": "pet",
        "cityscapes_classes": "19", "drawn": {}}


def quiet(*_):
    """Progress that nobody watches."""
    return quiet


# a process that has imported torch makes copies of itself: a command then starts two seconds sooner
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_petseg"])
os.environ["PYTHONPATH"] = str(PROGRAM.parent)


def be_program(words, before, peak, *streams):
    """What such a copy does: it becomes the program. Into three files go the most memory that it
    held, its stdout and its stderr."""
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    before()
    sys.argv = [str(PROGRAM), *words]
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    finally:
        peak.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


@contextmanager
def start(*words, before=quiet):
    """A command as a user types it, beside the test; at the end what it said, however it ended. In
    its process `before` is called first."""
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, name) for name in ("peak", "stdout", "stderr")]
        for path in files:
            path.touch()
        child = FORKS.Process(target=be_program, daemon=True,
                              args=([str(word) for word in words], before, *files))
        child.start()
        child.said = files[2].read_text  # so far
        yield child
        child.join()
        child.peak, child.stdout, child.stderr = (path.read_text() for path in files)
    assert "Traceback" not in child.stderr, child.stderr


def said_until(child, words):
    """Waits until a command has said `words`, or has ended; whether it has said them."""
    while child.is_alive() and words not in child.said():
        time.sleep(0.01)
    return words in child.said()


def run(*words, code=0, before=quiet):
    """One command that ends with this exit code."""
    with start(*words, before=before) as child:
        pass
    assert child.exitcode == code, child.stderr
    return child


def answer(*words):
    """The one JSON object that a command with --json ends with."""
    *before, last = run(*words, "--json").stdout.splitlines()
    assert not any(line.startswith("{") for line in before)
    return json.loads(last)


def refused(*words):
    """The one line that says what is wrong with a command."""
    lines = run(*words, code=2).stderr.splitlines()
    assert [line for line in lines if line.startswith("petseg: ")] == lines[-1:]
    return lines[-1]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A --root that holds 40 + 10 toy pets."""
    root = tmp_path_factory.mktemp("root")
    run("data", "toy", "--root", root, "--trainval", 40, "--test", 10)
    return root


@pytest.fixture(scope="session")
def toys(root):
    """The folder of the toy pets, to be read only."""
    return root / data.TOYS


@pytest.fixture
def pets(toys, tmp_path):
    """A copy of the toy pets, to be spoilt."""
    return shutil.copytree(toys, tmp_path / "pets")


def look(folder, cache=None, **options):
    """What data.look understands a folder as; without masks to be looked through there is no need
    of a cache."""
    return data.look(folder, cache, quiet, **options)


def files(folder):
    """Every file under a folder by its relative name, with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------- layers


def test_parameter_counts():
    with torch.device("meta"):
        assert sum(p.numel() for p in layers.UNet().parameters()) == 31_037_633
        assert sum(p.numel() for p in layers.ResNet34UNet().encoder.parameters()) == 21_284_672


@pytest.mark.parametrize("up", ["transpose", "bilinear"])
@pytest.mark.parametrize("model", NETWORKS)
def test_output_has_the_size_of_the_input(model, up):
    network = model(in_channels=2, classes=3, width=2, up=up).eval()
    for height, width in [(47, 63)] + [(side, 97 - side) for side in range(32, 66)]:
        assert network(torch.rand(2, 2, height, width)).shape == (2, 3, height, width)


def reference_resnet34(x, weights):
    """The outputs of the five stages of the paper's ResNet-34, from its weights in its order."""
    weights = iter(weights)

    def conv(x, stride=1):
        weight = next(weights)
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def norm(x):
        scale, shift, mean, variance, _ = (next(weights) for _ in range(5))
        return F.batch_norm(x, mean, variance, scale, shift, eps=1e-5)

    stages = [F.relu(norm(conv(x, stride=2)))]
    x = F.max_pool2d(stages[0], 3, stride=2, padding=1)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            y = F.relu(norm(conv(x, stride)))
            y = norm(conv(y))
            x = F.relu(y + (norm(conv(x, stride)) if stride == 2 else x))
        stages.append(x)
    assert next(weights, None) is None
    return stages


def test_encoder_computes_what_the_reference_resnet34_computes():
    torch.manual_seed(0)
    network = layers.ResNet34UNet().eval()
    for module in network.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(1, 3, 75, 102)
    stages = reference_resnet34(x, network.encoder.state_dict().values())
    for stage, expected in zip(network.encoder, stages, strict=True):
        x = stage(x)
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", NETWORKS)
def test_initialisation(model):
    torch.manual_seed(0)
    network, sums = model(width=16), {}
    for up in network.decoder:  # two convolutions add up to one output
        parts = [part for part in up.children() if isinstance(part, nn.Conv2d)]
        sums |= dict.fromkeys(parts, sum(part.in_channels for part in parts))
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight.numel() > 2000:
            # each output of a doubling by a 2×2 convolution sees one tap of each channel
            taps = 1 if isinstance(module, nn.ConvTranspose2d) else math.prod(module.kernel_size)
            expected = math.sqrt(2 / (sums.get(module, module.in_channels) * taps))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.08)
        if isinstance(module, layers.BasicBlock):  # starts as its shortcut
            x = torch.randn(2, module.conv1.conv.in_channels, 4, 4)
            assert torch.equal(module(x), F.relu(module.shortcut(x)))


def test_transposed_conv_is_torchs():
    layer, x = layers.TransposedConv(3, 5, 2, stride=2), torch.rand(2, 3, 4, 7)
    expected = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)


def test_upconcat_convolves_skip_and_enlarged_x_side_by_side():
    up = layers.UpConcat(2, 3, 5, up="bilinear")
    x, skip = torch.rand(4, 2, 4, 4), torch.rand(4, 3, 9, 7)
    large = F.interpolate(x, size=(8, 8), mode="bilinear")
    large = torch.cat((large, torch.zeros(4, 2, 1, 8)), dim=2)[..., :7]  # to the skip's size
    weights = torch.cat((up.of_skip.weight, up.of_x.weight), dim=1)
    joined = F.conv2d(torch.cat((skip, large), dim=1), weights, padding=1)
    normed = F.relu(F.batch_norm(joined, None, None, training=True))
    torch.testing.assert_close(up(x, skip), up.conv(normed))


def test_max_pool_of_a_large_tensor_keeps_no_places_of_maxima():
    x = torch.rand(1, 8, 1024, 1024, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        result = layers.MaxPool(2)(x)
    assert torch.int64 not in kept
    result.square().sum().backward()
    y = x.detach().requires_grad_()
    expected = F.max_pool2d(y, 2)
    expected.square().sum().backward()
    assert torch.equal(result, expected) and torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("model", NETWORKS)
def test_recomputing_changes_memory_and_nothing_else(model):
    images, results, kept = torch.rand(3, 3, 64, 64), [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = model(width=4, dropout=0.5)
        network.recompute = recompute
        sizes = []
        hooks = (lambda t: sizes.append(t.numel()) or t, lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = network(images).square().mean()
        loss.backward()
        kept.append(sum(sizes))
        results.append([*network.state_dict().values(), *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("model", NETWORKS)
def test_folded_network_says_the_same(model):
    torch.manual_seed(0)
    network, images = model(width=4), torch.rand(4, 3, 64, 64)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    network(images)
    before = copy.deepcopy(network.state_dict())
    folded = layers.folded(network)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values()))
    torch.testing.assert_close(folded(images), network.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("dropout, training", [(0.0, True), (0.5, True), (0.5, False)])
def test_dropout_only_while_training(model, dropout, training):
    network, x = model(width=4, dropout=dropout).train(training), torch.rand(2, 3, 32, 32)
    assert torch.equal(network(x), network(x)) == (dropout == 0 or not training)


def test_portable_network_normalises_and_says_probabilities():
    images, mean, std = torch.rand(2, 3, 4, 5), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    logits = torch.stack([(images[:, i] - mean[i]) / std[i] for i in range(3)], dim=1)
    several = layers.Portable(nn.Identity(), mean, std)(images)
    torch.testing.assert_close(several, logits.exp() / logits.exp().sum(dim=1, keepdim=True))
    one = layers.Portable(nn.Conv2d(3, 1, 1), mean, std)
    torch.testing.assert_close(one(images), 1 / (1 + torch.exp(-one.network(logits))))


def test_one_image_of_the_least_size_can_be_learned_from():
    network = layers.ResNet34UNet(width=2)  # its bottom is 1×1 here: a single value a channel
    network(torch.rand(1, 3, 32, 32)).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def slow_losses(logits, target):
    """BCE and Dice loss by their formulas, pixel by pixel; both from lists, (B, C, H, W)."""
    logs, dices = [], []
    for z, y in zip(logits, target):
        classes = range(1, 2) if len(z) == 1 else range(len(z))
        both, total = dict.fromkeys(classes, 0.0), dict.fromkeys(classes, 0.0)
        for i, j in np.ndindex(len(y), len(y[0])):
            if y[i][j] == 255:
                continue
            powers = [math.exp(channel[i][j]) for channel in z]
            powers = [1.0, *powers] if len(z) == 1 else powers  # σ(z) = e^z / (1 + e^z)
            p = [power / sum(powers) for power in powers]
            logs.append(-math.log(p[y[i][j]]))
            for c in classes:
                both[c] += p[c] * (y[i][j] == c)
                total[c] += p[c] + (y[i][j] == c)
        dices += [(2 * both[c] + 1) / (total[c] + 1) for c in classes]
    return sum(logs) / len(logs), 1 - sum(dices) / len(dices)


def random_pair(classes):
    """Logits and a target with pixels to be ignored, an image of nothing else among them."""
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, classes, 3, 4, generator=random)
    target = torch.randint(max(2, classes), (3, 3, 4), generator=random).to(torch.uint8)
    target[torch.rand(target.shape, generator=random) < 0.2] = target[2] = 255
    return logits, target


def test_losses_by_hand():
    logits = torch.tensor([0.0, 0.0, math.log(3)]).view(1, 1, 1, 3)
    target = torch.tensor([[[1, 0, 1]]], dtype=torch.uint8)
    # p = ½, ½, ¾: −log p is log 2 twice and log 4/3; Dice is (2 (½ + ¾) + 1) / (1¾ + 2 + 1)
    assert layers.bce_loss(logits, target).item() == pytest.approx(math.log(16 / 3) / 3)
    assert layers.dice_loss(logits, target).item() == pytest.approx(1 - 3.5 / 4.75)
    assert layers.bce_loss(logits * 0 + 1e4, target).item() == pytest.approx(1e4 / 3)
    assert layers.bce_dice_loss(logits, torch.full_like(target, 255)).item() == 0


@pytest.mark.parametrize("classes", [1, 3])
def test_losses_and_gradients_against_slow_loops(classes):
    logits, target = random_pair(classes)
    expected = slow_losses(logits.tolist(), target.tolist())
    both = layers.bce_dice_loss(logits, target).item()
    assert both == pytest.approx(sum(expected), rel=1e-5)
    for which, loss in enumerate((layers.bce_loss, layers.dice_loss)):
        leaf = logits.clone().requires_grad_()
        loss(leaf, target).backward()
        assert loss(logits, target).item() == pytest.approx(expected[which], rel=1e-5)
        for place in np.ndindex(*logits.shape):  # by finite differences of the slow loops
            lower, upper = logits.double(), logits.double()
            lower[place] -= 1e-5
            upper[place] += 1e-5
            low, high = (slow_losses(z.tolist(), target.tolist())[which] for z in (lower, upper))
            slope = (high - low) / 2e-5
            assert leaf.grad[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("logits", [[[-1.0, 2.0]], [[0.5, 0.0], [1.0, 1.0]]])
def test_a_pixel_counts_as_its_class_is_weighted(logits):
    logits, target = torch.tensor(logits).view(1, -1, 1, 2), torch.tensor([[[0, 1]]])
    each = [layers.bce_loss(logits[..., i:i + 1], target[..., i:i + 1]).item() for i in range(2)]
    weighted = layers.bce_loss(logits, target, torch.tensor([1.0, 3.0])).item()
    assert weighted == pytest.approx((each[0] + 3 * each[1]) / 4)


@pytest.mark.parametrize("name", layers.LOSSES)
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("large", [1e4, math.inf])
def test_losses_are_finite_at_any_logit(name, classes, large):
    logits = torch.full((2, classes, 4, 4), -large)
    logits[:, 0, :2] = large
    target = torch.randint(2, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    loss = layers.LOSSES[name](logits.requires_grad_(), target)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("model", NETWORKS)
def test_networks_overfit_eight_images(model, toys, tmp_path):
    torch.manual_seed(0)
    images, labels = data.load(data.open_split(look(toys), "train", (48, 48), tmp_path, quiet),
                               np.arange(8))
    images, target = data.normalise(images), data.targets(labels)
    network, steps = model(width=8), 160
    optimizer = torch.optim.Adam(network.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        optimizer.zero_grad()
        layers.bce_dice_loss(network(images), target).backward()
        optimizer.step()
    mask = network.eval()(images)[:, 0] > 0
    assert petseg.scores(petseg.confusion(mask.byte(), target), TWO)["dice"] > 0.98


# ------------------------------------------------------------------------------------------ data


def test_generator_is_a_function_of_its_key():
    keys = [("a", 0, 1), ("a", 1, 0), ("b", 0, 1), ("a", 0, 1, 0), ("a", 0), ("a", 0, -1)]
    drawn = [torch.rand(4, generator=data.generator(*key)).tolist() for key in keys * 2]
    assert drawn[:6] == drawn[6:] and len(set(map(tuple, drawn))) == 6


def test_what_is_written_appears_whole_or_leaves_the_old(tmp_path):
    file, folder = tmp_path / "deep" / "file", tmp_path / "folder"
    for content in ("old", "newer"):
        data.write(file, content.encode(), sync=True)
        with data.whole(folder) as new:
            new.mkdir()
            (new / content).write_text(content)
    for path in (file, folder / "newer", folder):
        with pytest.raises(ZeroDivisionError), data.whole(path) as new:
            new.write_text("half")
            1 / 0
    with pytest.raises(OSError):  # a file does not take a folder's place
        data.write(folder, b"file")
    assert files(tmp_path) == {"deep/file": b"newer", "folder/newer": b"newer"}
    assert len(list(tmp_path.iterdir())) == 2


RED, BLUE, WHITE = (200, 30, 30), (30, 30, 200), (255, 255, 255)
RED_BLUE = Image.new("RGB", (40, 30), RED)
RED_BLUE.paste(BLUE, (20, 0, 40, 30))
GREY = RED_BLUE.getchannel("R")  # 200 beside 30
HALF = GREY.point(lambda value: 255 * (value > 99))  # opaque beside transparent
SIXTEEN = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
PALETTE = RED_BLUE.quantize(4)
FLOATS = np.asarray(GREY, np.float32).copy()
FLOATS[0, :3] = np.nan, np.inf, -np.inf


@pytest.mark.parametrize("name, image, options, left, right", [
    ("grey.jpg", GREY, {}, (200,) * 3, (30,) * 3),
    ("cmyk.jpg", RED_BLUE.convert("CMYK"), {}, RED, BLUE),
    ("palette.png", PALETTE, {}, RED, BLUE),
    ("see-through-palette.png", PALETTE, {"transparency": PALETTE.getpixel((30, 9))}, RED, WHITE),
    ("rgba.png", Image.merge("RGBA", (*RED_BLUE.split(), HALF)), {}, RED, WHITE),
    ("la.png", Image.merge("LA", (GREY, HALF)), {}, (200,) * 3, WHITE),
    ("sixteen.png", SIXTEEN, {}, (200,) * 3, (30,) * 3),
    ("sixteen.tif", SIXTEEN, {}, (200,) * 3, (30,) * 3),
    ("float.tif", Image.fromarray(FLOATS), {}, WHITE, (38,) * 3),
    ("bits.png", HALF.convert("1"), {}, WHITE, (0, 0, 0)),
    ("gif.jpg", RED_BLUE, {"format": "GIF"}, RED, BLUE),
    ("png.jpg", RED_BLUE, {"format": "PNG"}, RED, BLUE),
])
def test_read_image_takes_every_kind_of_picture(tmp_path, name, image, options, left, right):
    image.save(tmp_path / name, **options)
    for size in (None, (15, 20)):
        read = data.read_image(tmp_path / name, size)
        assert (read.mode, read.size) == ("RGB", (20, 15) if size else (40, 30))
        pixels = np.asarray(read).astype(int)
        assert np.abs(pixels[5, [4, -4]] - (left, right)).max() <= 6


@pytest.mark.parametrize("orientation, turns", [(3, 2), (6, -1), (8, 1)])
def test_exif_rotation_and_the_mask_that_goes_with_it(tmp_path, orientation, turns):
    stored = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    upright, exif = np.rot90(stored, turns), Image.Exif()
    exif[0x0112] = orientation
    sample = data.Sample("a", tmp_path / "a.png", tmp_path / "mask.png", data.PET_CODES)
    Image.fromarray(stored).save(sample.image, exif=exif)
    assert np.array_equal(data.read_image(sample.image), upright)
    for drawn_on in (upright, stored) if orientation > 4 else (upright,):
        Image.fromarray(1 + (drawn_on[..., 0] > 99).astype(np.uint8)).save(sample.mask)
        pixels, labels = data.read_pair(sample, drawn_on.shape[:2])
        assert np.array_equal(pixels[..., 0] <= 99, labels == 1)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "tif"])
def test_damaged_pictures_are_unreadable_by_name(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"damaged.{ending}"
    Image.fromarray(noise).save(path)
    cut = path.read_bytes()[:path.stat().st_size // 2]
    for content in (cut, b"", b"no picture at all"):
        path.write_bytes(content)
        for read in (data.read_image, data.mask_numbers)[:1 if ending == "jpg" else 2]:
            with pytest.raises(data.Unreadable, match=path.name):
                read(path)


FUZZ = int(os.environ.get("PETSEG_FUZZ", 150))  # spoilt pictures; for all: PETSEG_FUZZ=2000 -k fuzz
SIDES = (0, 1, 255, 9999, 10_000, 32_767, 65_535, 2**31 - 1, 2**32 - 1)


def pictures_to_spoil():
    """Pictures of 83×59 in every format and many modes, as {ending: [bytes, ...]}."""
    exif, noise = Image.Exif(), np.random.default_rng(0).integers(0, 256, (59, 83, 4), np.uint8)
    exif[0x0112] = 6
    rgba = Image.fromarray(noise)
    rgb, found = rgba.convert("RGB"), {}
    grey, deep = rgb.convert("L"), Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    trimap, palette = Image.fromarray(noise[..., 0] % 3 + 1), rgb.quantize(16)
    for ending, image, options in (
            ("jpg", rgb, {"exif": exif}), ("jpg", rgb, {"progressive": True}),
            ("jpg", rgb.convert("CMYK"), {}), ("png", rgb, {"exif": exif}), ("png", rgba, {}),
            ("png", trimap, {}), ("png", deep, {}), ("png", palette, {"transparency": 3}),
            ("gif", palette, {"transparency": 3}),
            ("gif", palette, {"save_all": True, "append_images": [grey]}),
            ("tiff", rgb, {"exif": exif}), ("tiff", deep, {}), ("tiff", trimap, {}),
            ("tiff", rgb, {"compression": "tiff_lzw"}), ("tiff", rgb, {"compression": "jpeg"}),
            ("tiff", rgb, {"compression": "tiff_deflate"}), ("tiff", rgba, {}),
            ("tiff", Image.fromarray(noise[..., 0].astype(np.float32)), {}),
            ("bmp", rgb, {}), ("bmp", palette, {}), ("webp", rgb, {"exif": exif}),
            ("webp", rgba, {"lossless": True}), ("avif", rgb, {}), ("jp2", rgb, {}),
            ("ppm", rgb, {})):
        file = io.BytesIO()
        if (kind := Image.registered_extensions()[f".{ending}"]) in data.FORMATS:
            image.save(file, kind, **options)
            found.setdefault(ending, []).append(file.getvalue())
    return found


def spoilt(rng, pictures):
    """One of the pictures, spoilt once or more; and an ending, now and then a wrong one."""
    endings = list(pictures)

    def pick():
        ending = endings[rng.integers(len(endings))]
        return ending, bytearray(pictures[ending][rng.integers(len(pictures[ending]))])

    ending, content = pick()
    for _ in range(rng.integers(1, 3)):
        way = rng.integers(5)
        if way == 0:  # bits flipped, half of them in the head
            for _ in range(rng.integers(1, 12)):
                content[rng.integers(rng.choice((min(200, len(content)), len(content))))] ^= (
                    1 << rng.integers(8))
        elif way == 1:
            del content[rng.integers(1, len(content)):]
        elif way == 2:  # the head of another picture
            other, length = pick()[1], rng.integers(1, 120)
            content[:length] = other[:length]
        elif way == 3:  # an absurd width or height, wherever such a number stands
            side, kind = int(rng.choice((83, 59))), rng.choice(("<H", ">H", "<I", ">I"))
            at = content.find(struct.pack(kind, side))
            if at >= 0:
                size = struct.calcsize(kind)
                absurd = int(rng.choice(SIDES)) % 2**(8 * size)
                content[at:at + size] = struct.pack(kind, absurd)
        else:
            ending = endings[rng.integers(len(endings))]
        if content[12:16] == b"IHDR" and len(content) > 33:  # or else a PNG ends at its checksum
            content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return ending, bytes(content)


def test_fuzz_pictures(tmp_path):
    data.allow(10**8)
    pictures, seconds, read, refusals = pictures_to_spoil(), [], 0, 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(FUZZ):
        ending, content = spoilt(np.random.default_rng((2026, i)), pictures)
        path = tmp_path / f"{i}.{ending}"
        path.write_bytes(content)
        began = time.monotonic()
        for function in (data.read_image, lambda path: data.read_image(path, (32, 32)),
                         data.mask_numbers):
            try:
                read += np.asarray(function(path)).size > 0
            except data.Problem as problem:
                refusals += path.name in str(problem)
            except Exception as error:
                pytest.fail(f"number {i}, {ending}: {error!r}")
        seconds.append(time.monotonic() - began)
        path.unlink()
    assert read and refusals and read + refusals == 3 * FUZZ  # each is read, or named
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert max(seconds) < 10 and peak <= max(memory, 2e9 / 1024)
    print(f"{FUZZ} files: {read} times read, {refusals} refused; the longest took "
          f"{max(seconds):.2f} s, peak memory {peak * 1024 / 1e9:.2f} GB")


def test_pictures_are_refused_by_the_size_they_claim(tmp_path):
    path, head = tmp_path / "bomb.png", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    for allowed, taken in ((40 * 30 - 1, False), (40 * 30, True)):
        RED_BLUE.save(path)
        data.allow(allowed)
        with nullcontext() if taken else pytest.raises(data.Unreadable, match="1,199.*--max-pix"):
            data.read_image(path)
    data.allow(10**8)
    content = bytearray(path.read_bytes())
    content[16:29], content[29:33] = head, struct.pack(">I", zlib.crc32(b"IHDR" + head))
    path.write_bytes(content)
    for read in (data.read_image, data.mask_numbers):
        with pytest.raises(data.Unreadable, match="bomb.png.*100,000,000.*--max-pixels"):
            read(path)
    Image.new("1", (1, 10**6 + 1)).save(path)
    with pytest.raises(data.Unreadable, match="a million"):
        data.read_image(path)
    os.remove(path)
    os.mkfifo(path)  # reading it would never end
    with pytest.raises(data.Unreadable, match="no such file"):
        data.read_image(path)


def test_of_large_pictures_one_is_in_memory_at_a_time(tmp_path, monkeypatch):
    paths, inside, most = [tmp_path / f"{i}.png" for i in range(8)], [], []
    for path in paths:
        RED_BLUE.save(path)

    def look(path):
        with data.opened(path):
            inside.append(path)
            time.sleep(0.02)
            most.append(len(inside))
            inside.remove(path)

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for limit, together in ((40 * 30 - 1, {1}), (40 * 30, {2, 3, 4})):
        monkeypatch.setattr(data, "LARGE", limit)
        most.clear()
        assert len(list(data.ahead(look, paths, quiet))) == 8 and max(most) in together


def test_enlarged_by_bands_is_as_in_one_piece():
    small = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    for size in ((2000, 1500), (3, 2_000_000), (7, 5)):
        bands = list(data.enlarged(np.stack((small, 1 - small)), size))
        assert len(bands) == {2000: 6, 3: 3, 7: 1}[size[0]]
        parts = np.concatenate([band for _, band in bands], axis=1)
        for part, whole in zip(parts, (small, 1 - small), strict=True):
            assert np.abs(part - data.resized(whole, size)).max() < 1e-4
        assert [row for rows, _ in bands for row in range(size[0])[rows]] == list(range(size[0]))


def test_wrong_masks_say_what_was_found_and_what_expected(tmp_path):
    sample = data.Sample("a", tmp_path / "a.jpg", tmp_path / "a.png", data.PET_CODES)
    RED_BLUE.save(sample.image)
    for mask, found in (([[0, 1]], "0, 1"), ([[1, 38]], "1, 38"), (np.zeros((2, 2, 3)), "#000000")):
        Image.fromarray(np.uint8(mask)).save(sample.mask)
        with pytest.raises(data.Problem, match=f"a.png.*{found}.*expected 1 = class 1, 2 = backgr"
                                               "ound, 3 = border"):
            data.read_mask(sample.mask, sample.codes)
    Image.fromarray(np.ones((31, 40), np.uint8)).save(sample.mask)
    with pytest.raises(data.Problem, match="a.jpg.*30×40.*31×40"):
        data.read_pair(sample, (32, 32))


def test_split_rule(tmp_path):
    annotations, names = tmp_path / "annotations", [f"Cat_{i}" for i in range(25)]
    annotations.mkdir()
    lines = ["# a comment", *(f"{name} 1 1 1" for name in names[:12]), "", "#another", *names[12:]]
    (annotations / "trainval.txt").write_text("\n".join(lines))
    train, valid = (look(tmp_path).splits[split] for split in ("train", "valid"))
    assert [sample.name for sample in valid] == ["Cat_0", "Cat_10", "Cat_20"]
    assert [sample.name for sample in train] == [name for i, name in enumerate(names) if i % 10]
    assert valid[1][1:3] == (tmp_path / "images" / "Cat_10.jpg",
                            annotations / "trimaps" / "Cat_10.png")
    for content in ("# nothing else\n", "\n\n", "one"):
        (annotations / "trainval.txt").write_text(content)
        with pytest.raises(data.Problem, match="the train split.*is empty.*trainval.txt"):
            look(tmp_path)


GREEN, BLACK = data.COLOUR + 0x00FF00, data.COLOUR


@pytest.mark.parametrize("numbers, listed, codes, names", [
    ([0, 1], [], {0: 0, 1: 1, 255: 255}, ["background", "foreground"]),
    ([0, 255], [], {0: 0, 255: 1}, ["background", "foreground"]),
    ([0, 255], ["floor", "cat"], {0: 0, 255: 1}, ["floor", "cat"]),
    ([0, 1, 255], [], {0: 0, 1: 1, 255: 255}, ["background", "foreground"]),
    ([0, 7, 9, 255], [], {0: 0, 7: 1, 9: 2, 255: 255}, ["class 0", "class 7", "class 9"]),
    ([0, 2, 3], ["a", "b", "c d", "void"], {0: 0, 1: 1, 2: 2, 3: 255, 255: 255}, ["a", "b", "c d"]),
    ([0, 3], ["a", "b", "c"], None, "hold 3, which its classes.txt does not name.* 0, 1, 2"),
    ([BLACK, GREEN], [], {BLACK: 0, GREEN: 1, 255: 255}, ["#000000", "#00ff00"]),
    ([BLACK, GREEN], ["my car 0 255 0", "road 0 0 0"], {GREEN: 0, BLACK: 1, 255: 255},
     ["my car", "road"]),
    ([BLACK, GREEN], ["road 0 0 0", "car 1 1 1"], None, "hold #00ff00, which"),
    ([BLACK, GREEN], ["car,0,255,0", "Void, 0, 0, 0"], None, "1 classes"),
    ([BLACK, GREEN], ["a new car", "b 0 0 0"], None, "none for a new car;.*car 64 0 128"),
    ([BLACK, GREEN], ["0 0 0 a", "b #00ff00"], None, "none for 0 0 0 a, b #00ff00"),
    ([0, 1, 2], ["a 0 0 0", "b 0 255 0", "Void 9 9 9"], {0: 0, 1: 1, 2: 255, 255: 255}, ["a", "b"]),
    ([0, 1], ["a", "a"], None, "classes.txt has a name twice"),
    ([1, GREEN], [], None, "some masks.*numbers, others colours"),
    ([7], [], None, "all masks.* hold 7"), ([], [], None, "all masks.* hold nothing"),
    (list(range(200)), [], None, "200 numbers or colours.*swapped"),
    ([0, 255], ["a", "void"], None, "1 classes")])
def test_what_numbers_in_masks_mean(numbers, listed, codes, names):
    if codes is None:
        with pytest.raises(data.Problem, match=names):
            data.meaning(Path("folder"), numbers, listed, [])
    else:
        assert data.meaning(Path("folder"), numbers, listed, []) == (codes, names)


def lay_out(folder, kind, number=12):
    """A folder of `number` labelled pictures of 40×32 in some layout: a bright box on the left, of
    which the right half is another class where there are three; returns the labels expected."""
    labels = np.zeros((32, 40), np.uint8)
    labels[8:24, 4:28] = 1
    if kind not in ("numbers", "black and white", "bits"):
        labels[8:24, 16:28] = 2
    photo = Image.fromarray(np.stack((labels * 100, 200 - labels * 50, labels * 9), axis=2))
    indices, ending, suffix = Image.fromarray(labels), "jpg", ""
    if kind == "black and white":
        indices = Image.fromarray(labels * 255)
    elif kind == "bits":
        indices = Image.fromarray(labels * 255).convert("1")
        photo, ending = photo.convert("L"), "png"
    elif kind == "palette":
        indices.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200])
        photo, ending, suffix = photo.convert("RGBA"), "png", "_mask"
    elif kind == "colours":
        indices = Image.fromarray(np.array([(0, 0, 0), (64, 0, 128), (0, 9, 0)], np.uint8)[labels])
        (folder / "classes.txt").write_text("ground 0 0 0\ncar 64 0 128\n\ntree 0 9 0\n")
        suffix = "_label"
    elif kind == "splits":
        (folder / "classes.txt").write_text("ground\ncar\nvoid\n")
        labels[labels == 2] = 255
    for i in range(number):
        split = ("train", "val", "test")[max(0, i - number + 3)]
        part, name = folder / (split if kind == "splits" else "."), f"street {i}"
        photos, masks, place = part / "images", part / "masks", Path(name)
        if kind == "Cityscapes":
            photos, masks = folder / "leftImg8bit" / split, folder / "gtFine" / split
            place, ending, suffix = Path("town") / name, "png", "_gtFine_labelIds"
            indices = Image.fromarray(np.array((7, 26, 5), np.uint8)[labels])
        for path in (photos / place, masks / place):
            path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(f"{photos / place}{'_leftImg8bit' * (kind == 'Cityscapes')}.{ending}")
        indices.save(f"{masks / place}{suffix}.png")
    if kind == "Cityscapes":
        labels = np.array((0, 13, 255), np.uint8)[labels]
    return labels


LAYOUTS = {"numbers": ["background", "foreground"], "black and white": ["background", "foreground"],
           "bits": ["background", "foreground"], "palette": ["class 0", "class 1", "class 2"],
           "colours": ["ground", "car", "tree"], "splits": ["ground", "car"],
           "Cityscapes": [data.CITYSCAPES[i - 4] for i in data.BENCHMARK]}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_layout_is_understood(kind, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    expected = lay_out(folder, kind)
    source = look(folder, tmp_path / "cache")
    assert source.classes == LAYOUTS[kind]
    sizes = {split: len(samples) for split, samples in source.splits.items()}
    assert sizes == {"train": 10, "valid": 1, **({"test": 1} if kind != "Cityscapes" else {})}
    names = [sample.name for samples in source.splits.values() for sample in samples]
    assert len(set(names)) == len(names)
    split = data.open_split(source, "train", (32, 40), tmp_path / "cache", quiet)
    assert all(np.array_equal(labels, expected) for labels in split.labels)
    assert (split.images[0][..., 0] > 50)[12:20, 8:12].all()
    assert not [*folder.rglob("*.json"), *folder.rglob("*.npy")]


def test_the_lot_divides_once_and_for_all(tmp_path):
    lay_out(tmp_path, "numbers", 40)
    first, again = (look(tmp_path, tmp_path / name) for name in "ab")
    assert first.drawn == again.drawn and [*map(len, first.splits.values())] == [32, 4, 4]
    for part in ("images", "masks"):  # what comes later is for training
        path = next((tmp_path / part).iterdir())
        shutil.copy(path, path.with_stem("later"))
    later = look(tmp_path, tmp_path / "a", drawn=first.drawn)
    assert [*map(len, later.splits.values())] == [33, 4, 4]
    assert later.splits["test"] == first.splits["test"]
    for sample in first.splits["test"]:
        sample.image.unlink()
    gone = look(tmp_path, tmp_path / "a", drawn=first.drawn)
    with pytest.raises(data.Problem, match="no test split.*--split valid"):
        data.open_split(gone, "test", (32, 32), tmp_path / "cache", quiet)


def test_class_names_as_windows_writes_them_and_masks_of_two_bytes(tmp_path):
    lay_out(tmp_path, "colours")
    names = "ground 0 0 0\r\nMütze 64 0 128\r\ntree 0 9 0\r\n"
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "classes.txt").write_bytes(names.encode(encoding))
        assert look(tmp_path, tmp_path / "cache").classes == ["ground", "Mütze", "tree"]
    wide = np.array([[0, 700], [700, 3]], np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.array_equal(data.mask_numbers(tmp_path / "wide.png"), wide)


def test_thirty_classes_of_cityscapes(tmp_path):
    lay_out(tmp_path, "Cityscapes")
    source = look(tmp_path, cityscapes="30")
    assert len(source.classes) == 30 and source.classes[7 - 4] == "road"
    labels = data.read_mask(source.splits["train"][0].mask, source.splits["train"][0].codes)
    assert sorted(np.unique(labels)) == [1, 3, 22]  # dynamic, road, car


@pytest.mark.parametrize("harm, expected", [
    ("swap", "JPEG.*swapped"), ("lonely", "left out.*odd"),
    ("twin", "street 0.png is left out.* name of .*street 0.jpg"),
    ("none", "no picture in .*images has a mask in .*_mask"), ("few", "2 labelled.*at least 3"),
    ("no val", "no val/"), ("blank", "all masks .* hold 0"), ("no masks", "no folder .*masks")])
def test_what_trips_people_over(harm, expected, tmp_path):
    lay_out(tmp_path, "splits" if harm == "no val" else "numbers", 2 if harm == "few" else 12)
    images, masks = tmp_path / "images", tmp_path / "masks"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 40, 3), dtype=np.uint8))
    if harm == "swap":
        for path in images.iterdir():
            noise.save(path)
        images.rename(tmp_path / "x")
        masks.rename(images)
        (tmp_path / "x").rename(masks)
    elif harm == "lonely":
        noise.save(images / "odd.jpg")
    elif harm == "twin":
        noise.save(images / "street 0.png")
    elif harm == "none":
        for path in masks.iterdir():
            path.rename(path.with_stem(path.stem + "x"))
    elif harm == "no val":
        shutil.rmtree(tmp_path / "val")
    elif harm == "blank":
        for path in masks.iterdir():
            Image.new("L", (40, 32)).save(path)
    elif harm == "no masks":
        shutil.rmtree(masks)
    if harm in ("lonely", "twin"):
        [note] = look(tmp_path, tmp_path / "cache").notes
        assert re.search(expected, note)
    else:
        with pytest.raises(data.Problem, match=expected):
            source = look(tmp_path, tmp_path / "cache")
            for split in source.splits:
                data.open_split(source, split, (32, 32), tmp_path / "cache", quiet)


def test_names_of_any_kind_give_short_plain_names_of_their_own(tmp_path):
    long, links = "é" * 125 + ".jpg", tmp_path / "links"  # of 254 bytes
    stems = ["a b", "two\nlines", "-dash", "Cat", "cat", "ü", "\udcff", "x" * 251, "x" * 250]
    links.mkdir()
    for name in [f"{stem}.png" for stem in stems] + [long]:
        (tmp_path / name).write_bytes(b"")
    (links / "loop").symlink_to(tmp_path)
    (links / "self.png").symlink_to(links / "self.png")
    found = data.find_pictures([tmp_path])
    assert len(found) == len(set(found)) == len(stems) + 1
    names = dict(zip([path.name for path in found], data.unique_names(found)))
    assert len({name.casefold() for name in names.values()}) == len(found)
    assert names["two\nlines.png"] == r"two\nlines" and names["\udcff.png"] == r"\udcff"
    assert (names["Cat.png"], names["cat.png"], names["-dash.png"]) == ("Cat", "cat-2", "-dash")
    assert names[long] == "é" * 100 and names["x" * 251 + ".png"] == "x" * 200 + "-2"
    assert [str(data.Problem(text)) for text in ("a\n\x1b[2J\u202e", "é\\n")] == [
        r"a\n\x1b[2J\u202e", "é\\n"]  # nothing that a terminal would obey
    assert data.find_truth(tmp_path / ("y" * 255)) is None


def test_cache_holds_what_the_files_hold(toys, tmp_path):
    split = data.open_split(look(toys), "valid", (32, 48), tmp_path, quiet)
    assert split.images.shape == (4, 32, 48, 3) and split.labels.shape == (4, 32, 48)
    for name, pixels, labels in zip(split.names, split.images, split.labels):
        photo = Image.open(toys / "images" / f"{name}.jpg").resize((48, 32), Image.BILINEAR)
        assert np.abs(np.asarray(photo, float) - pixels).mean() < 3
        trimap = np.asarray(Image.open(toys / "annotations" / "trimaps" / f"{name}.png"))
        rows = [int((i + 0.5) * trimap.shape[0] / 32) for i in range(32)]
        columns = [int((j + 0.5) * trimap.shape[1] / 48) for j in range(48)]
        assert np.array_equal(labels, np.array([255, 1, 0, 129])[trimap[np.ix_(rows, columns)]])


def test_cache_decodes_once_and_notices_changes(pets, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in pets.rglob("*")}
    first = data.open_split(look(pets), "valid", (32, 32), tmp_path / "cache", quiet)
    assert {path: path.stat().st_mtime_ns for path in pets.rglob("*")} == before

    # spoil every picture behind the cache's back: who decodes again will notice
    for path in (pets / "images").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=(before[path], before[path]))
    again = data.open_split(look(pets), "valid", (32, 32), tmp_path / "cache", quiet)
    assert np.array_equal(again.images, first.images)

    for sample in look(pets).splits["valid"]:
        Image.new("RGB", Image.open(sample.mask).size, (9, 99, 199)).save(sample.image)
    changed = data.open_split(look(pets), "valid", (32, 32), tmp_path / "cache", quiet)
    assert np.abs(changed.images.astype(int) - (9, 99, 199)).max() < 5
    assert np.array_equal(changed.labels, first.labels)


def test_cache_leaves_out_what_is_broken_and_leaves_nothing_when_it_fails(pets, tmp_path):
    samples = look(pets).splits["train"]
    samples[3].image.unlink()
    samples[5].image.write_bytes(b"spoilt")
    samples[7].mask.unlink()
    split = data.open_split(look(pets), "train", (32, 32), tmp_path / "cache", quiet)
    assert split.names == [s.name for i, s in enumerate(samples) if i not in (3, 5, 7)]
    assert len(split.images) == len(split.labels) == 33
    assert all(samples[i].name in line for i, line in zip((3, 5, 7), split.skipped, strict=True))

    before = files(tmp_path / "cache")
    Image.new("L", Image.open(samples[-1].mask).size, 7).save(samples[-1].mask)
    with pytest.raises(data.Problem, match=f"{samples[-1].name}.png.* 7"):
        data.open_split(look(pets), "train", (32, 32), tmp_path / "cache", quiet)
    shutil.rmtree(pets / "images")
    with pytest.raises(data.Problem, match="none of"):
        data.open_split(look(pets), "valid", (32, 32), tmp_path / "cache", quiet)
    assert files(tmp_path / "cache") == before


def test_cache_leaves_out_what_is_too_large_until_it_is_allowed(pets, tmp_path):
    samples = look(pets).splits["valid"]
    for path in samples[1][1:3]:
        Image.open(path).resize((300, 300)).save(path)
    for most, number in ((300 * 300 - 1, 3), (300 * 300, 4)):
        data.allow(most)
        split = data.open_split(look(pets), "valid", (32, 32), tmp_path / "cache", quiet)
        assert len(split.names) == number and len(split.skipped) == 4 - number
    data.allow(10**8)


def test_toys_come_from_the_seed_in_the_layout_of_the_pets(tmp_path):
    a, b, c = (files(data.make_toys(tmp_path / name, quiet, seed=seed, trainval=12, test=3))
               for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert a == b and a.keys() == c.keys()
    lists = {f"annotations/{name}.txt": number for name, number in (("trainval", 12), ("test", 3))}
    rows = {name: re.findall(r"(?m)^(\w+) \d+ [12] \d+$", a[name].decode()) for name in lists}
    assert {name: len(found) for name, found in rows.items()} == lists
    pairs = [(f"images/{name}.jpg", f"annotations/trimaps/{name}.png")
             for found in rows.values() for name in found]
    assert a.keys() == {*lists, *(name for pair in pairs for name in pair)}
    for image, trimap in pairs:
        assert a[image] != c[image]
        trimap = Image.open(io.BytesIO(a[trimap]))
        assert set(np.unique(trimap)) == {1, 2, 3}
        assert Image.open(io.BytesIO(a[image])).size == trimap.size


def test_toys_are_not_told_by_colour(toys, tmp_path):
    split = data.open_split(look(toys), "train", (64, 64), tmp_path, quiet)
    truth, photos, best = split.labels > 0, split.images.astype(float), 0.0
    for channel in (*np.moveaxis(photos, 3, 0), photos.mean(axis=3)):
        for threshold in range(-1, 256, 4):  # -1 takes everything
            for guess in (channel > threshold, channel <= threshold):
                both, sizes = (guess & truth).sum(axis=(1, 2)), (guess * 1 + truth).sum(axis=(1, 2))
                best = max(best, (2 * both / sizes).mean())
    assert 0.2 < best < 0.75


MOVED = dict(flip=0.5, vflip=0.5, rotate=40, zoom=1.5, aspect=1.3, shift=0.2)
STRONG = dict(brightness=0.4, contrast=0.4, saturation=1.0, mix=0.5, **MOVED)


@pytest.mark.parametrize("strengths, mirrored", [
    ({}, ()), (dict(share=0.0, **STRONG), ()), ({"flip": 1.0}, (-1,)), ({"vflip": 1.0}, (-2,))])
def test_augment_leaves_or_mirrors_every_pixel(strengths, mirrored):
    images, labels = torch.rand(4, 3, 24, 40), torch.randint(3, (4, 24, 40)).to(torch.uint8)
    found = data.augment(images, labels, data.generator(0), **strengths)
    torch.testing.assert_close(found[0], images.flip(mirrored), rtol=0, atol=1e-4)
    assert torch.equal(found[1], labels.flip(mirrored))


@pytest.mark.parametrize("strengths", [
    dict(rotate=40), dict(zoom=1.5), dict(aspect=1.5), dict(shift=0.2), MOVED])
def test_image_and_label_move_together(strengths):
    labels = torch.zeros(8, 48, 64, dtype=torch.uint8)
    labels[:, 8:32, 10:40] = 1
    images = labels.unsqueeze(1).expand(8, 3, 48, 64).float()
    moved, follows = data.augment(images, labels, data.generator(3), **strengths)
    assert ((moved[:, 0] > 0.5) == (follows == 1)).float().mean() > 0.99
    assert set(follows.unique().tolist()) == {0, 1}
    assert (follows != labels).flatten(1).any(dim=1).sum() >= 6


def test_mix_puts_a_box_of_another_picture_into_each():
    values = torch.arange(60) / 60
    images = values.view(-1, 1, 1, 1).expand(60, 3, 40, 30)
    labels = torch.arange(60).view(-1, 1, 1).repeat(1, 40, 30).to(torch.uint8)
    mixed, follows = data.augment(images, labels, data.generator(5), mix=1.0)
    torch.testing.assert_close(mixed, values[follows.long()].unsqueeze(1).expand_as(mixed))
    heights, widths = [], []
    for i, foreign in enumerate(follows != labels):
        assert set(follows[i].unique().tolist()) <= {i, (i - 1) % 60}
        rows, columns = foreign.any(dim=1), foreign.any(dim=0)
        assert torch.equal(foreign, rows[:, None] & columns)  # a box, wherever it is
        heights.append(rows.sum().item() / 40)
        widths.append(columns.sum().item() / 30)
    assert min(heights) < 0.3 and max(heights) < 0.95 and max(widths) > 0.7
    some = data.augment(images, labels, data.generator(5), mix=0.5)[1]
    assert 15 < (some != labels).flatten(1).any(dim=1).sum() < 45


@pytest.mark.parametrize("strength, means, spreads", [
    ("brightness", (0.4, 0.6), (0.16, 0.24)), ("contrast", (0.5, 0.5), (0.16, 0.24)),
    ("saturation", (0.4963, 0.5037), (0.16, 0.24))])
def test_colours_change_by_their_strength(strength, means, spreads):
    images = torch.tensor([0.6, 0.5, 0.4]).view(1, 3, 1, 1).repeat(300, 1, 4, 4)
    labels = torch.zeros(300, 4, 4, dtype=torch.uint8)
    found = data.augment(images, labels, data.generator(1), **{strength: 0.2})[0][..., 0, 0]
    for values, limits in ((found.mean(dim=1), means), (found[:, 0] - found[:, 2], spreads)):
        assert (values.min().item(), values.max().item()) == pytest.approx(limits, abs=0.003)
    grey = data.augment(images, labels, data.generator(1), saturation=1.0)[0][..., 0, 0]
    assert (grey.amax(dim=1) - grey.amin(dim=1)).min() < 0.01  # down to no colour at all


def test_augment_touches_its_share_and_follows_its_generator():
    images, labels = torch.rand(200, 3, 24, 40), torch.randint(3, (200, 24, 40)).to(torch.uint8)
    first, second, other = (data.augment(images, labels, data.generator(key), share=0.5, **STRONG)
                            for key in (1, 1, 2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert 70 < ((first[0] - images).abs().flatten(1).amax(dim=1) > 1e-3).sum() < 130
    assert 0 <= first[0].min() and first[0].max() <= 1


def test_border_as_one_or_the_other_or_drawn_by_whole_regions():
    one = np.array([list(row) for row in ("a..bbbb", ".a....b", "..a.b.b", ".....b.", "cc.....",
                                          ".c.d..e")])  # touching at corners is touching
    regions = np.stack((one, np.char.upper(one)))
    labels = torch.from_numpy(np.where(regions == ".", 1, 129).astype(np.uint8))
    labels[0, 0, 1] = 0
    for border, value in (("foreground", 1), ("background", 0), ("ignore", 255), ("class", 4)):
        expected = torch.where(labels == 129, value, labels)
        assert torch.equal(data.targets(labels, border, classes=5), expected)
    others = torch.tensor([[[2, 130, 255]]], dtype=torch.uint8)
    assert data.targets(others).tolist() == [[[2, 2, 255]]]
    targets = [data.targets(labels, "random", data.generator(draw)).numpy() for draw in range(20)]
    assert all((target == labels.numpy())[regions == "."].all() for target in targets)
    draws = set()
    for region in set("abcdeABCDE"):
        values = np.stack([target[regions == region] for target in targets])
        assert (values == values[:, :1]).all() and set(values.flat) == {0, 1}
        draws.add(tuple(values[:, 0]))
    assert len(draws) == 10  # each region draws for itself


def test_an_epoch_shows_each_picture_as_often_as_told():
    orders = [data.shuffled(13, 3, seed, epoch) for seed, epoch in ((5, 2), (5, 2), (5, 3), (6, 2))]
    assert all(torch.bincount(order).tolist() == [3] * 13 for order in orders)
    assert [torch.equal(orders[0], order) for order in orders] == [True, True, False, False]


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves self.server.files; hostile in the ways that the server's attributes say."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            return self.send_error(server.status)
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            return self.end_headers()
        content = server.files[self.path.rpartition("/")[2]]
        if server.endless:  # (bytes, seconds between them, the length that is claimed)
            return self.go_on(*server.endless)
        start = int(asked.removeprefix("bytes=")[:-1]) if asked and server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        end = len(content) // 2 if server.breaks else len(content)
        server.breaks = False
        self.wfile.write(content[start:end])
        server.sent += end - start

    def go_on(self, content, pause, length):
        self.send_response(206 if self.headers.get("Range") else 200)
        if length:
            self.send_header("Content-Length", length)
        self.end_headers()
        with suppress(OSError):  # until the other side hangs up
            while True:
                self.wfile.write(content)
                time.sleep(pause)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror():
    """A server on loopback, and its address in mirror.url."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.files, server.asked, server.sent = {}, [], 0
        server.ranges, server.breaks, server.status = True, False, None
        server.redirect = server.endless = None
        server.url = f"http://127.0.0.1:{server.server_port}/pets/"
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def packed(folder):
    """A folder as the bytes of a .tar.gz."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as tar:
        tar.add(folder, folder.name)
    return memory.getvalue()


def offer(server, **contents):
    """Puts NAME.tar.gz on a server; returns the checksums as get_pets takes them."""
    server.files = {f"{name}.tar.gz": content for name, content in contents.items()}
    return {name: hashlib.md5(content).hexdigest() for name, content in server.files.items()}


@pytest.mark.parametrize("breaks, ranges", [(False, True), (True, True), (True, False)])
def test_download(mirror, toys, tmp_path, breaks, ranges):
    sums = offer(mirror, images=packed(toys / "images"), annotations=packed(toys / "annotations"))
    mirror.breaks, mirror.ranges = breaks, ranges
    half = len(mirror.files["images.tar.gz"]) // 2
    for _ in range(2):  # what is there is not fetched again
        folder = data.get_pets(tmp_path, mirror.url, quiet, sums, (0, 0))
        assert files(folder) == files(toys)
        assert mirror.asked == [None, f"bytes={half}-", None] if breaks else [None, None]
    assert mirror.sent == sum(map(len, mirror.files.values())) + (0 if ranges else half)


@pytest.mark.parametrize("status, md5, requests, expected", [
    (404, "", 1, "404.*--url"), (503, "", 3, "503.*--url"), (None, "0", 1, "checksum"),
    (None, "", 1, "cannot be unpacked")])
def test_download_that_fails_says_so_and_leaves_no_pictures(mirror, toys, tmp_path, status, md5,
                                                            requests, expected):
    sums = offer(mirror, images=packed(toys / "images")[:-3000])
    mirror.status = status
    with pytest.raises(data.Problem, match=f"images.tar.gz.*{expected}"):
        data.get_pets(tmp_path, mirror.url, quiet, {"images.tar.gz": md5 or sums["images.tar.gz"]},
                      (0, 0))
    assert len(mirror.asked) == requests
    assert set(files(tmp_path)) <= {f"{data.PETS}/images.tar.gz"}


@pytest.mark.parametrize("content, pause, length, requests, expected", [
    (bytes(20_000), 0, None, 1, "more than 0.001 GB"),
    (b"x", 1, 2_000_000, 1, "more than 0.001 GB"),
    (b"x", 0.01, 90_000, 3, "fewer than 1000 bytes a second"),
    (b"x", 0.01, None, 3, "fewer than 1000 bytes a second"), (b"", 1, 90_000, 3, "timed out")])
def test_download_that_does_not_end_is_given_up(mirror, tmp_path, monkeypatch, content, pause,
                                                length, requests, expected):
    monkeypatch.setattr(data, "MOST_BYTES", 10**6)
    mirror.endless = content, pause, length
    sums = offer(mirror, images=b"")
    with pytest.raises(data.DownloadFailed, match=f"images.tar.gz.*{expected}"):
        data.get_pets(tmp_path, mirror.url, quiet, sums, (0, 0), patience=0.3)
    assert len(mirror.asked) == requests
    assert set(files(tmp_path)) <= {f"{data.PETS}/images.tar.gz.part"}


@pytest.mark.parametrize("address", ["file://{folder}/", "ftp://127.0.0.1/", "data:text/plain,a"])
def test_only_http_is_followed(mirror, tmp_path, address):
    sums, address = offer(mirror, images=b"secret"), address.format(folder=tmp_path)
    (tmp_path / "images.tar.gz").write_bytes(b"secret")  # of the right checksum
    mirror.redirect = address + "images.tar.gz"
    for url in (mirror.url, address):
        with pytest.raises(data.Problem, match="images.tar.gz.*(not allowed|only http and https)"):
            data.get_pets(tmp_path / "root", url, quiet, sums, (0, 0))
    assert len(mirror.asked) == 1 and not files(tmp_path / "root")


@pytest.mark.parametrize("name, kind, link", [
    ("../evil", tarfile.REGTYPE, ""), ("images/../../evil", tarfile.REGTYPE, ""),
    ("{outside}/evil", tarfile.REGTYPE, ""), ("other/evil", tarfile.REGTYPE, ""),
    ("images/evil", tarfile.SYMTYPE, "{outside}"), ("images/evil", tarfile.FIFOTYPE, ""),
    ("images/evil", tarfile.LNKTYPE, "{outside}/secret"),
])
def test_archive_that_leaves_its_folder_is_refused(mirror, tmp_path, name, kind, link):
    memory, member = io.BytesIO(), tarfile.TarInfo(name.format(outside=tmp_path))
    member.type, member.linkname = kind, link.format(outside=tmp_path)
    with tarfile.open(fileobj=memory, mode="w:gz") as tar:
        for each in (tarfile.TarInfo("images/a.jpg"), member, tarfile.TarInfo("images/evil/b.jpg")):
            tar.addfile(each)
    with pytest.raises(data.Problem, match="evil"):
        sums = offer(mirror, images=memory.getvalue())
        data.get_pets(tmp_path / "root", mirror.url, quiet, sums, ())
    assert not (tmp_path / "root" / data.PETS / "images").exists()
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.rglob("*.jpg"))


@pytest.mark.parametrize("members, expected", [
    ([("images/a", 9, 9)] * 2, "File exists"),
    ([("images/a/b", 1, 1), ("images/a", 1, 1)], "exists"),
    ([("images/a", 1, 1), ("images/a/b/c", 1, 1)], "Not a dir"),
    ([("images/a", 5000, 9)], "unexpected end|not end"), ([("images/a", 9, 5000)], "not end"),
    ([("images/a", -512, 0)], "images/a|negative|invalid"),
    ([("images/a", 900_000, 900_000), ("images/b", 200_000, 200_000)], "more than 0.001 GB"),
    ([(f"images/{i}", 0, 0) for i in range(51)], "or 50 files")])
def test_archive_that_lies_or_is_a_bomb_is_refused(tmp_path, monkeypatch, members, expected):
    monkeypatch.setattr(data, "MOST_BYTES", 10**6)
    monkeypatch.setattr(data, "MOST_MEMBERS", 50)
    with gzip.open(tmp_path / "images.tar.gz", "wb") as file:
        for name, said, size in members:
            member = tarfile.TarInfo(name)
            member.size = said
            file.write(member.tobuf(tarfile.GNU_FORMAT) + b"x" * size + bytes(-size % 512))
        file.write(bytes(1024))
    with pytest.raises(data.Problem, match=f"images.tar.gz.*({expected})"):
        data.unpack(tmp_path / "images.tar.gz", tmp_path / "root")
    assert not files(tmp_path / "root")


@pytest.mark.parametrize("mode, shape", [("L", (7, 5)), ("RGB", (1, 9, 3)), ("RGBA", (6, 1, 4)),
                                         ("RGB", (1100, 1000, 3)), ("P", (4, 6))])
def test_png_is_read_back_as_it_was(tmp_path, mode, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture.putpalette(range(30))
    data.save_picture(picture, tmp_path / "any.png")
    with Image.open(tmp_path / "any.png") as image:
        image.verify()
    with Image.open(tmp_path / "any.png") as image:
        assert image.format == "PNG" and image.mode == mode
        assert np.array_equal(np.asarray(image), pixels)


def test_mask_overlay_cutout_and_panel():
    photo, mask = Image.new("RGB", (120, 90), (90, 90, 90)), np.zeros((90, 120), np.uint8)
    mask[20:70, 30:90] = 1
    shown = np.asarray(data.overlay(photo, mask)).astype(int)
    assert (shown[:15] == 90).all() and (shown[45, 60] != 90).any()
    assert np.abs(shown[20, 60] - shown[45, 60]).max() > 50  # the contour is seen on either side
    assert np.abs(shown[19, 60] - shown[10, 60]).max() > 50
    alone = np.asarray(data.cutout(photo, mask))
    assert np.array_equal(alone[..., 3], mask * 255) and (alone[mask > 0][:, :3] == 90).all()
    three, two = (data.panel(photo, truth, mask, "caption", TWO, side=60)
                  for truth in (mask, None))
    assert three.height == two.height >= 60 and three.width >= 240 > two.width >= 160


def test_masks_of_many_classes_have_their_numbers_and_colours_and_a_legend(tmp_path):
    classes = ["ground", *(f"a long name {i}" for i in range(1, 30))]
    mask = np.zeros((40, 300), np.uint8)
    mask[10:30] = np.repeat(np.arange(30), 10)
    data.save_picture(data.mask_picture(mask, classes), tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), mask)
        colours = np.asarray(image.convert("RGB"))[20, ::10]
    assert len({tuple(colour) for colour in colours.tolist()}) == 25  # then they come again
    photo = Image.new("RGB", (300, 40), (90, 90, 90))
    plain, many = (data.panel(photo, None, mask, "caption", names) for names in (TWO, classes))
    below = np.asarray(many)[plain.height:].reshape(-1, 3)
    assert {tuple(colour) for colour in colours[1:].tolist()} <= {*map(tuple, below.tolist())}


def test_curves_run_where_the_numbers_say(tmp_path):
    names, path = ("train_dice", "valid_dice", "train_loss", "valid_loss"), tmp_path / "curves.png"
    rows = [{"epoch": 1 + i, **dict(zip(names, (i / 40, 0.75, 1 - i / 40, 0.25)))}
            for i in range(41)]
    for runs in ({"one epoch": rows[:1]}, {f"a long name {i}" * 5: rows for i in range(7)},
                 {"the run": rows}):
        data.draw_curves(path, runs)
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert image.shape[1] == 1200
    for half, rises in ((image[:, :600], False), (image[:, 600:], True)):
        # the lowest pixel of a colour in a column is the curve's: the legend stands above it
        train, valid = ({x: np.flatnonzero(column)[-1] for x, column in enumerate(near.T)
                         if column.any()}
                        for near in (np.abs(half - c).sum(axis=2) < 60 for c in data.LINES[:2]))
        first, last = min(train), max(train)
        # the right 40 % are clear of the note of the best epoch, which is the first
        right = sorted(x for x in train if x in valid and x > first + 0.6 * (last - first))
        assert (train[right[-1]] < train[right[0]]) == rises
        meeting = min(right, key=lambda x: abs(train[x] - valid[x]))
        assert (meeting - first) / (last - first) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.94), (1, 300), (-2.5, 7), (0.9301, 0.9317)])
def test_ticks_are_round_and_cover(low, high):
    found = data.ticks(low, high)
    step = found[1] - found[0]
    assert len(found) <= 9
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    assert np.diff(found) == pytest.approx([step] * (len(found) - 1), rel=1e-6)
    assert f"{step:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")


# ---------------------------------------------------------------------------------------- petseg


def test_scores_against_slow_loops():
    random = torch.Generator().manual_seed(0)
    mask, target = (torch.randint(2, (5, 6, 7), generator=random) for _ in range(2))
    target[torch.rand(target.shape, generator=random) < 0.2] = 255
    mask[3] = target[3] = target[4] = 0  # nothing to be found: 1 if nothing was, else 0
    expected, dices, ious = [], [], []
    for b in range(5):
        pairs = list(zip(mask[b].flatten().tolist(), target[b].flatten().tolist()))
        tp, fp, fn, tn = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
        expected.append([[tn, fp], [fn, tp]])
        dices.append(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1)
        ious.append(tp / (tp + fp + fn) if tp + fp + fn else 1)
    (tn, fp), (fn, tp) = np.sum(expected, axis=0)
    counts = petseg.confusion(mask.byte(), target.to(torch.uint8))
    assert counts.tolist() == expected and dices[3:] == [1, 0]
    assert petseg.scores(counts, TWO) == pytest.approx({
        "dice": sum(dices) / 5, "iou": sum(ious) / 5, "images": 5,
        "dataset_dice": 2 * tp / (2 * tp + fp + fn), "dataset_iou": tp / (tp + fp + fn),
        "precision": tp / (tp + fp), "recall": tp / (tp + fn),
        "accuracy": (tp + tn) / (tp + fp + fn + tn)})


def test_scores_of_several_classes_against_slow_loops():
    random = torch.Generator().manual_seed(0)
    mask, target = (torch.randint(4, (3, 6, 7), generator=random) for _ in range(2))
    target[torch.rand(target.shape, generator=random) < 0.2] = 255
    mask[mask == 3], target[target == 3] = 1, 2  # so the last class does not occur
    names = ["sky", "tree", "car", "nowhere"]
    pairs = [(t, m) for t, m in zip(target.flatten().tolist(), mask.flatten().tolist()) if t < 255]
    found = petseg.scores(petseg.confusion(mask.byte(), target.to(torch.uint8), 4), names)
    assert petseg.scores(torch.zeros(1, 4, 4), names)["iou"] == 0  # of an image that is all void
    dices, ious = [], []
    for row, c in zip(found["classes"], range(3), strict=True):
        tp, all_true = pairs.count((c, c)), sum(t == c for t, _ in pairs)
        both = all_true + sum(m == c for _, m in pairs)
        dices.append(2 * tp / both)
        ious.append(tp / (both - tp))
        assert row == {"class": names[c], "dice": pytest.approx(dices[-1]),
                       "iou": pytest.approx(ious[-1]),
                       "share": pytest.approx(all_true / len(pairs))}
    del found["classes"]
    assert found == pytest.approx({
        "dice": np.mean(dices), "iou": np.mean(ious), "foreground_dice": np.mean(dices[1:]),
        "foreground_iou": np.mean(ious[1:]), "images": 3,
        "accuracy": sum(t == m for t, m in pairs) / len(pairs)})


def test_score_of_a_split_counts_each_image_once(toys, tmp_path):
    split = data.open_split(look(toys), "test", (32, 32), tmp_path, quiet)
    segmenter = petseg.Segmenter(layers.UNet(width=2), ABOUT, "fp32")
    losses, dices = [], []
    for i in range(10):
        images, labels = data.load(split, torch.tensor([i]))
        logits, target = petseg.predict(segmenter, images), data.targets(labels)
        losses.append(layers.bce_dice_loss(logits, target).item())
        both = ((logits[:, 0] >= 0) & (target == 1)).sum()
        dices.append((2 * both / ((logits >= 0).sum() + target.sum())).item())
    for batch in (4, 10):
        loss, counts = petseg.score_split(segmenter, split, batch)
        assert loss == pytest.approx(sum(losses) / 10, rel=1e-4)
        assert petseg.scores(counts, TWO)["dice"] == pytest.approx(sum(dices) / 10, abs=1e-3)


def test_a_picture_is_also_seen_mirrored_and_in_other_sizes():
    network, images = layers.UNet(width=2).eval(), torch.rand(2, 3, 64, 64)

    @torch.no_grad()
    def seen(side, mirrored):
        view = F.interpolate(data.normalise(images), (side, side), mode="bilinear", antialias=True)
        logits = network(view.flip(3)).flip(3) if mirrored else network(view)
        return F.interpolate(logits.sigmoid(), (64, 64), mode="bilinear")

    plain = seen(64, False)
    mean = (plain + seen(64, True) + seen(48, False) + seen(80, True)) / 4
    assert (mean - plain).abs().max() > 0.01
    for tta, expected in ((True, mean), (False, plain)):
        segmenter = petseg.Segmenter(network, ABOUT, "fp32", tta=tta)
        torch.testing.assert_close(petseg.predict(segmenter, images).sigmoid(), expected,
                                   rtol=0, atol=1e-5)


def test_a_prediction_does_not_depend_on_its_neighbours():
    segmenter = petseg.Segmenter(petseg.build(ABOUT | {"width": 4}), ABOUT, "fp32")
    images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last)
    logits = petseg.predict(segmenter, images)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    assert torch.equal(petseg.predict(segmenter, images[order]), logits[order])
    others = torch.cat([images[2:3], torch.rand(6, 3, 32, 32)])
    others = others.to(memory_format=torch.channels_last)
    assert torch.equal(petseg.predict(segmenter, others)[0], logits[2])
    # a batch of another size is summed in another order
    torch.testing.assert_close(petseg.predict(segmenter, images[2:3])[0], logits[2], rtol=0,
                               atol=1e-4)


def test_a_saved_network_predicts_as_before_its_saving(tmp_path):
    torch.manual_seed(0)
    network = layers.UNet(width=2)
    first = network.encoder[0][0]
    with torch.no_grad():  # large numbers, as after a long run, that amount to the same
        first.conv.weight *= 300
        first.bn.running_var *= 300**2
    petseg.save_network(tmp_path / "best.pt", network, ABOUT, MADE)
    images = torch.rand(2, 3, 32, 32)
    before, after = (petseg.predict(segmenter, images) for segmenter in (
        petseg.Segmenter(network, ABOUT, "fp32"),
        petseg.load_segmenter(tmp_path / "best.pt", "cpu", "fp32")))
    torch.testing.assert_close(after, before, rtol=0.01, atol=0.01 * before.std().item())
    assert before.std() > 0


def test_schedules_at_their_corners():
    def rates(name, warmup=0.2):
        settings = Namespace(lr=0.5, warmup=warmup, gamma=0.9)
        return [petseg.SCHEDULES[name](settings, done / 40, []) for done in range(1, 41)]

    assert rates("constant") == [0.5] * 40
    cosine, root = rates("cosine"), rates("inverse_sqrt")
    assert cosine == sorted(cosine[:8]) + sorted(cosine[8:], reverse=True)
    assert (cosine[3], cosine[7], cosine[23]) == pytest.approx((0.25, 0.5, 0.25))
    assert cosine[39] == pytest.approx(0)
    assert (root[3], root[7], root[31]) == pytest.approx((0.125, 0.5, 0.25))
    assert max(root) == root[7] and rates("cosine", 0)[0] > 0.49 and rates("cosine", 1)[19] == 0.25
    for dices, rate in (([], 0.5), ([0.5, 0.5, 0.4], 0.5), ([0.1, 0, 0, 0.2, 0.2, 0.2], 0.5),
                        ([0.5, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6], 0.25), ([0.5] * 7, 0.125),
                        ([0.5] * 300, 1e-6)):
        assert petseg.plateau(Namespace(lr=0.5), 0.5, dices) == rate
        falling = petseg.exponential(Namespace(lr=0.5, gamma=0.9), 0.5, dices)
        assert falling == pytest.approx(0.5 * 0.9 ** len(dices))


@pytest.mark.parametrize("epochs, grow, sides", [
    (1, 0.85, [128]), (2, 1.0, [64, 128]), (3, 0.0, [128] * 3),
    (12, 0.75, [64] * 6 + [96] * 3 + [128] * 3)])
def test_pictures_grow_to_their_full_side(epochs, grow, sides):
    run = Namespace(size=(128, 256), epochs=epochs, grow=grow)
    assert [petseg.size_of_epoch(run, epoch) for epoch in range(1, epochs + 1)] == [
        (side, 2 * side) for side in sides]
    # what is done is told in pixels: half of an epoch of half the side is an eighth of a large one
    total = sum(side**2 for side in sides)
    assert petseg.share_done(run, 1, 0.5) == pytest.approx(sides[0]**2 / 2 / total)
    assert petseg.share_done(run, epochs, 0) == pytest.approx(1 - 128**2 / total)
    assert petseg.share_done(run, epochs, 1) == pytest.approx(1)
    run.size = 33, 33  # of which half would be too small
    assert {petseg.size_of_epoch(run, epoch)[0] for epoch in range(1, epochs + 1)} <= {32, 33}


@pytest.mark.parametrize("toy, epochs, kind", [
    (True, 300, "flip"), (False, 99, "full"), (False, 100, "strong")])
def test_longer_runs_vary_their_pictures_more(toy, epochs, kind):
    for words, augment in (([], petseg.AUGMENT[kind]), (["--augment", "rotate=3"], {"rotate": 3})):
        words = ["train", "unet", "--epochs", str(epochs), *words]
        args = petseg.command_line().parse_args(words)
        assert petseg.settings(args, torch.device("cpu"), toy).augment == augment


@pytest.mark.parametrize("rows, columns", [(5, 5), (3, 40), (40, 3)])
def test_orthogonal_keeps_directions_and_evens_their_strengths(rows, columns):
    random = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(2, n, 3, generator=random)).Q
                   for n in (rows, columns))
    strengths = torch.tensor([3.0, 1.0, 0.3])
    found = petseg.orthogonal(left * strengths @ right.mT)
    inside = left.mT @ found @ right  # what of it lies along the three pairs of directions
    torch.testing.assert_close(left @ inside @ right.mT, found, rtol=0, atol=0.05)
    evened = inside.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(torch.diag_embed(evened), inside, rtol=0, atol=0.05)
    assert 0.6 < evened.min() and evened.max() < 1.3


def test_muon_goes_by_momentum_that_looks_ahead_and_by_turns():
    first = nn.Parameter(torch.zeros(2, 2, 1, 1).to(memory_format=torch.channels_last))
    second = nn.Parameter(torch.zeros(2, 2, 1, 1))
    third = nn.Parameter(torch.zeros(2, 2, 1, 1))  # of the shape of the first: each its own way
    tall = nn.Parameter(torch.zeros(8, 2, 1, 1))
    muon = petseg.Muon([first, second, third, tall])
    muon.param_groups[0]["lr"] = 0.1
    turn, memory = torch.tensor([[0.0, -3.0], [3.0, 0.0]]), torch.zeros(2, 2)
    for step, gradient in enumerate((torch.eye(2), turn, turn, torch.eye(2))):
        first.grad = gradient.view(2, 2, 1, 1).to(memory_format=torch.channels_last)
        second.grad = first.grad.clone()
        third.grad, tall.grad = -first.grad, gradient.repeat(4, 1).view(8, 2, 1, 1)
        muon.step()
        # a turn and a scale, as the momentum is: made orthogonal, only the turn is left
        memory = 0.95 * memory + gradient
        expected = F.normalize(gradient + 0.95 * memory, dim=0)
        moving, still = ((second, tall), (first, third)) if step % 2 == 0 else (
            (first, third), (second, tall))
        moved = -moving[0].detach().view(2, 2) / 0.2
        assert F.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.99
        assert 0.6 < moved.norm() / math.sqrt(2) < 1.3
        other = -third.view(2, 2) if moving[0] is first else tall.view(4, 2, 2)[0]
        torch.testing.assert_close(other, moving[0].view(2, 2), rtol=0.1, atol=0.02)
        assert not any(weight.any() for weight in still)
        for weight in moving:
            weight.data.zero_()


def test_muon_shrinks_weights_by_their_decay():
    weights = [nn.Parameter(torch.ones(2, 3, 1, 1)) for _ in range(2)]
    muon = petseg.Muon(weights, decay=0.5)
    muon.param_groups[0]["lr"] = 0.1
    for _ in range(2):  # each has its turn once, for a step of twice the size
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        muon.step()
    for weight in weights:
        torch.testing.assert_close(weight.detach(), torch.full((2, 3, 1, 1), 1 - 2 * 0.1 * 0.5))


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def learned(folder):
    """All that a run has learned: each tensor of both checkpoints, and the metrics but times."""
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt"))
    parts = [last["network"], last["average"], best["weights"]]
    parts += [each for memory in last["optimizers"] for each in memory["state"].values()]
    parts.append({"pictures": torch.tensor(list(b"".join(
        (folder / f"{name}.png").read_bytes() for name in ("curves", "samples", "worst"))))})
    rows = read_rows(folder / "metrics.csv")
    for row in rows:
        del row["seconds"], row["images_per_second"]
    return [(name, tensor) for part in parts for name, tensor in part.items()], rows


def assert_same_run(one, other):
    """Bit-identical weights, and the same metrics."""
    (tensors, rows), (others, other_rows) = learned(one), learned(other)
    assert rows == other_rows
    for (name, tensor), (other_name, other_tensor) in zip(tensors, others, strict=True):
        assert name == other_name and torch.equal(tensor, other_tensor)


@pytest.fixture(scope="session")
def trained(root):
    """For each network the folder of a run, to be read only."""
    return {model: Path(answer("train", model, "--root", root, "--out", root / "runs", *TINY,
                               "--epochs", 2, "--schedule", "constant")["run"])
            for model in petseg.MODELS}


@pytest.mark.parametrize("model", petseg.MODELS)
def test_train_and_eval(model, trained, root, tmp_path):
    folder = trained[model]
    assert folder.parent == root / "runs" and folder.name.startswith(f"toy-{model}-")
    assert {"config.json", "metrics.csv", "last.pt", "previous.pt", "best.pt", "curves.png",
            "samples.png", "test.json", "worst.png"} == {path.name for path in folder.iterdir()}
    rows, result = read_rows(folder / "metrics.csv"), json.loads((folder / "test.json").read_text())
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert result["valid_dice"] == max(float(row["valid_dice"]) for row in rows)
    again = answer("eval", "--ckpt", folder / "best.pt", "--root", root, "--out", tmp_path)
    for measure in ("split", "images", "dice", "iou", "dataset_dice", "precision", "recall"):
        assert again[measure] == result[measure]
    assert result["images"] == sum(breed["images"] for breed in again["breeds"].values()) == 10


@pytest.mark.parametrize("kind, options", [
    ("splits", "unet --loss dice"),
    ("colours", "unet --size 32x48 --loss bce --class-weights inverse"),
    ("Cityscapes", "unet --schedule plateau --epochs 24")])
def test_own_data_from_training_to_masks(kind, options, tmp_path):
    folder, root = tmp_path / "own", ("--root", tmp_path / "root")
    folder.mkdir()
    labels, words = lay_out(folder, kind, 30), options.split()
    result = answer("train", words[0], "--data", folder, *root, "--out", tmp_path / "runs",
                    "--size", "32x32", "--width", 4, "--batch", 4, "--epochs", 12, "--augment",
                    "none", *words[1:])
    run_folder, score = Path(result["run"]), "dice" if len(LAYOUTS[kind]) == 2 else "iou"
    rows = read_rows(run_folder / "metrics.csv")
    assert result[f"valid_{score}"] == max(float(row[f"valid_{score}"]) for row in rows) > 0.4
    config = json.loads((run_folder / "config.json").read_text())
    assert config["labels"] == LAYOUTS[kind]
    ckpt, split = ("--ckpt", run_folder / "best.pt"), result["split"]
    again = answer("eval", *ckpt, *root, "--split", split, "--out", tmp_path / "eval")
    assert again[score] == result[score] and again["images"] == result["images"] > 0
    if kind != "Cityscapes":  # its test part has no truth
        there = answer("infer", *ckpt, *root, "--out", tmp_path / "out")
        assert there["images"] == result["images"] and there["dice"] > 0.4
    picture = next(path for path in folder.rglob("street*")
                   if not {"masks", "gtFine"} & {*path.parts})
    answer("infer", *ckpt, picture, "--save", "mask,overlay,cutout,panel", "--out",
           tmp_path / "one")
    [row] = read_rows(tmp_path / "one" / "predictions.csv")
    with Image.open(tmp_path / "one" / f"{row['output']}_mask.png") as mask:
        assert mask.size == (40, 32) and mask.mode == ("L" if score == "dice" else "P")
        found = np.asarray(mask) // (255 if score == "dice" else 1)
    assert (found == labels)[labels < 255].mean() > 0.6
    if score == "iou":
        shares = [float(row[f"share of {name}"]) for name in LAYOUTS[kind]]
        assert shares == pytest.approx([(found == i).mean() for i in range(len(shares))])


def test_shares_of_classes_and_the_weights_by_them(tmp_path, capsys):
    labels = np.array([[[0] * 6 + [1] * 3 + [129] + [255] * 2]], np.uint8)
    split = data.Split(["a"], None, labels, [])
    source = data.Source(tmp_path, "a heap", ["sky", "car", "moon"], {"train": ["a"]}, {}, [])
    about = {"classes": source.classes, "border": "foreground"}
    shares = petseg.class_shares(source, split, about)
    assert shares.tolist() == pytest.approx([0.6, 0.4, 0])
    said = capsys.readouterr().err
    assert "a heap; 1 train; sky 60.0%, car 40.0%, moon 0.0%; void 16.7% of the pixels" in said
    assert "the class moon never occurs" in said
    total = 0.6**-0.5 + 0.4**-0.5
    root = [2 * 0.6**-0.5 / total, 2 * 0.4**-0.5 / total]
    for how, number, expected in (("none", 3, [1, 1]), ("inverse", 3, [0.8, 1.2]),
                                  ("sqrt", 2, root), ("auto", 3, root), ("auto", 2, [1, 1])):
        weights = petseg.class_weights(Namespace(class_weights=how), shares[:number])
        assert weights[:2].tolist() == pytest.approx(expected)
        assert len(weights) == number and not weights[2:].any()


@pytest.mark.parametrize("options, names", [
    ("--border class", ["background", "pet", "border"]),
    ("--classes species --border ignore", ["background", "cat", "dog"])])
def test_the_pets_as_several_classes(options, names, trained, root, tmp_path):
    result = answer("train", "unet", "--root", root, "--out", tmp_path, *TINY, *options.split(),
                    "--epochs", 2)
    assert {row["class"] for row in result["classes"]} <= set(names)
    shares = {row["class"]: row["share"] for row in result["classes"]}
    pixels = dict.fromkeys(names, 0)
    source = look(root / data.TOYS, classes="species")
    for labels in data.open_split(source, "test", (32, 32), tmp_path / "cache", quiet).labels:
        for name, numbers in {"background": [0], "cat": [1, 129], "dog": [2, 130]}.items():
            if "border class" in options:
                name, numbers = {"background": "background"}.get(name, "pet"), numbers[:1]
            pixels[name] += np.isin(labels, numbers).sum()
        if "border class" in options:
            pixels["border"] += (labels > 128).sum()
    total = sum(pixels.values())
    assert shares == pytest.approx({name: pixels[name] / total for name in shares})
    config = json.loads((Path(result["run"]) / "config.json").read_text())
    assert config["labels"] == names
    again = answer("eval", "--ckpt", Path(result["run"]) / "best.pt", "--root", root, "--out",
                   tmp_path / "eval")
    assert again["classes"] == result["classes"] and "breeds" not in again
    assert "other scores" in refused("compare", result["run"], trained["unet"])


def test_resume_with_more_epochs_equals_one_long_run(halfway, root, tmp_path):
    folder, whole = halfway
    assert (folder / "epoch-1.pt").is_file()
    for _ in range(2):  # the second time nothing is left to do, and that is no fault
        answer("train", "--resume", folder, "--epochs", 2)
    assert_same_run(folder, whole)
    command = json.loads((folder / "config.json").read_text())["command"]
    assert command.split(", ")[1:] == ["resumed with --epochs 2"]
    assert re.search("lr .*0.1", refused("train", "--resume", folder, "--lr", 0.1))
    shutil.copytree(root, tmp_path / "less")
    look(tmp_path / "less" / data.TOYS).splits["train"][0].image.unlink()
    said = refused("train", "--resume", folder, "--epochs", 3, "--root", tmp_path / "less")
    assert f"{tmp_path / 'less' / data.TOYS} are not those" in said and "make them so again" in said


def test_a_run_begins_with_the_weights_it_is_given(trained, root, tmp_path):
    best = shutil.copy(trained["unet"] / "best.pt", tmp_path)
    folder = Path(answer("train", "unet", "--init", best, "--root", root, "--out", tmp_path,
                         "--lr", 0, "--ema", 0, "--epochs", 1)["run"])  # nothing is learned
    given, last = (torch.load(path, weights_only=True) for path in (best, folder / "last.pt"))
    for name, weight in given["weights"].items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(last["network"][name], weight.float(), rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert (config["width"], config["size"]) == (given["width"], [*given["size"]])
    assert config["command"].endswith(f"begun with the weights of {given['trained']['command']}")
    os.remove(best)  # a resumed run has no need of it
    answer("train", "--resume", folder, "--epochs", 2)


KILLS = int(os.environ.get("PETSEG_KILLS", 0))  # of the long soak; pytest -k kill runs it
KILLED = [
    "unet --dropout 0.3 --border random --schedule plateau --accumulate 2 --repeat 2 "
    "--classes species --class-weights inverse",
    "resnet34_unet --precision bf16 --grow 0.8",
    "unet --precision bf16 --optimizer adamw --dropout 0.2 --accumulate 3 --schedule exponential",
    "resnet34_unet --optimizer adam --ema 0 --border random --schedule inverse_sqrt",
    "unet --grow 0.8 --augment strong --ema 0.9 --loss dice",
    "resnet34_unet --dropout 0.5 --border ignore --accumulate 2 --schedule plateau",
    "unet --up bilinear --ema 0 --repeat 2 --augment-prob 0.5 --save-every 2",
    "resnet34_unet --precision bf16 --border random --clip 0 --schedule constant",
]


@pytest.mark.parametrize("options", KILLED if KILLS else KILLED[:1])
def test_killed_at_random_moments_and_resumed_equals_undisturbed(options, root, tmp_path):
    words = ["train", *options.split(), "--root", root, *TINY, "--size", 48, "--epochs", 4,
             "--batch", 4, "--checkpoint-minutes", 0.001]
    undisturbed = Path(answer(*words, "--out", tmp_path / "undisturbed")["run"])
    words += ["--resume", "auto", "--out", tmp_path / "killed"]
    random = np.random.default_rng(KILLED.index(options))
    kills = 0
    while kills < (math.ceil(KILLS / len(KILLED)) or 3):
        with start(*words) as process:
            if random.random() < 0.8:  # else while it starts
                assert said_until(process, f"toy-{words[1]}-")
            time.sleep(random.uniform(0, 1.5))
            process.kill()
        kills += process.exitcode == -signal.SIGKILL
        if list((tmp_path / "killed").glob("*/test.json")):
            shutil.rmtree(tmp_path / "killed")  # it came to its end: from the start again
    run(*words)
    [folder] = [path.parent for path in (tmp_path / "killed").glob("*/test.json")]
    assert_same_run(folder, undisturbed)


def test_stopped_saves_says_how_to_go_on_and_equals_undisturbed(root, tmp_path):
    words = ["train", "unet", "--root", root, *TINY, "--epochs", 3, "--batch", 2]
    undisturbed = Path(answer(*words, "--out", tmp_path / "undisturbed")["run"])
    for how, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with start(*words, "--out", tmp_path / how.name) as process:
            assert said_until(process, "epoch 1/3  train loss")
            os.kill(process.pid, how)
        [folder] = (tmp_path / how.name).iterdir()
        assert process.exitcode == code
        assert f"train --resume {folder}" in process.stderr.splitlines()[-1]
        assert len(read_rows(folder / "metrics.csv")) < 3
        run("train", "--resume", folder)
        assert_same_run(folder, undisturbed)


def test_two_runs_never_share_a_folder_and_a_crash_leaves_no_lock(root, tmp_path):
    with start("train", "unet", "--root", root, *TINY, "--epochs", 1000, "--out",
               tmp_path) as process:
        assert said_until(process, "training")
        [folder] = tmp_path.iterdir()
        assert "another process" in refused("train", "--resume", folder)
        process.kill()
    (folder / ".part-left").mkdir()  # what a kill while writing leaves
    last = torch.load(folder / "last.pt", weights_only=True)
    run("train", "--resume", folder, "--epochs", last["epoch"])
    assert (folder / "test.json").exists() and not list(folder.glob(".part-*"))


def test_resume_auto_takes_the_newest_unfinished_run_of_the_same_options(trained, root,
                                                                         tmp_path):
    words = ["train", "unet", "--root", root, *TINY, "--out", tmp_path, "--epochs", 2,
             "--schedule", "constant", "--resume", "auto"]
    _, first, other, newest = (shutil.copytree(trained["unet"], tmp_path / name) for name in "abcd")
    for place, folder in enumerate((first, newest, other)):
        (folder / "test.json").unlink()
        os.utime(folder / "config.json", (place, place))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"lr": 0.5}))
    assert answer(*words)["run"] == str(newest)
    os.utime(newest / "test.json", (1, 1))  # as if the run had been resumed since, and killed
    assert answer(*words)["run"] == str(newest)
    shutil.rmtree(first)
    done = run(*words)  # the other has another rate, and the rest has come to its end
    assert "a new one starts" in done.stderr and len(list(tmp_path.iterdir())) == 4


@pytest.fixture(scope="session")
def half(root):
    """The folder of a run that has done one epoch and could go on; to be read only."""
    return answer("train", "unet", "--root", root, "--out", root / "half", *TINY, "--epochs", 1,
                  "--schedule", "constant", "--save-every", 1)["run"]


@pytest.fixture
def halfway(half, trained, tmp_path):
    """A copy of a run of one epoch, to be spoilt, and the folder of what two would make of it."""
    return shutil.copytree(half, tmp_path / "half"), trained["unet"]


def flip(path, places):
    """Changes one bit of a file in each of some places."""
    content = bytearray(path.read_bytes())
    for place in places:
        content[int(place * len(content))] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: path.unlink()])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, halfway):
    folder, whole = halfway
    damage(folder / "last.pt")
    said = run("train", "--resume", folder, "--epochs", 2).stderr
    assert re.search(r"warning: .*last\.pt.*previous\.pt", said)
    assert_same_run(folder, whole)
    for name in ("last.pt", "previous.pt"):
        damage(folder / name)
    assert "--init" in refused("train", "--resume", folder, "--epochs", 3)


def test_a_full_disk_leaves_the_checkpoint_before(halfway):
    folder, whole = halfway
    before = (folder / "last.pt").read_bytes()
    shrink = partial(resource.setrlimit, resource.RLIMIT_FSIZE,  # as on a full disk
                     (len(before) // 2, resource.RLIM_INFINITY))
    done = run("train", "--resume", folder, "--epochs", 2, code=2, before=shrink)
    assert "make room" in done.stderr.splitlines()[-1]
    assert (folder / "last.pt").read_bytes() == before
    run("train", "--resume", folder, "--epochs", 2)
    assert_same_run(folder, whole)


def test_a_read_only_folder_is_named_and_left_as_it_was(halfway):
    folder, _ = halfway
    before = files(folder)

    def no_override():  # for root too, who may otherwise write anywhere
        if sys.platform == "linux":
            drop_from_bounds, cap_dac_override = 24, 1  # as prctl.h and capability.h number them
            ctypes.CDLL(None).prctl(drop_from_bounds, cap_dac_override, 0, 0, 0)

    folder.chmod(0o555)
    done = subprocess.run([sys.executable, PROGRAM, "train", "--resume", folder, "--epochs", "2"],
                          preexec_fn=no_override, capture_output=True, text=True)
    folder.chmod(0o755)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and re.search(f"^petseg: Permission denied: {folder}.*--out", last)
    assert files(folder) == before


def test_a_run_folder_that_vanishes_is_made_again(root, tmp_path):
    with start("train", "unet", "--root", root, *TINY, "--epochs", 6, "--out", tmp_path) as process:
        assert said_until(process, "epoch 1/6  train loss")
        [folder] = tmp_path.iterdir()
        os.kill(process.pid, signal.SIGSTOP)
        # not in the midst of writing a file, or of giving it its name
        while list(folder.glob(".part-*")) or (folder / "next.pt").exists():
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.01)
            os.kill(process.pid, signal.SIGSTOP)
        shutil.rmtree(folder)
        os.kill(process.pid, signal.SIGCONT)
    assert process.exitcode == 0 and (folder / "test.json").exists(), process.stderr
    assert len(read_rows(folder / "metrics.csv")) == 6
    assert answer("train", "--resume", folder)["run"] == str(folder)


@pytest.mark.parametrize("options", [
    "--lr 1e9 --clip 0", "--width 1 --batch 1 --grow 1 --accumulate 50", "--size 33 --batch 7"])
def test_extreme_numbers_train_or_stop_with_advice(options, root, tmp_path):
    with start("train", "resnet34_unet", "--root", root, *TINY, *options.split(), "--epochs", 2,
               "--out", tmp_path) as done:
        pass
    if done.exitcode:
        assert done.exitcode == 2 and "lower --lr" in done.stderr.splitlines()[-1]
        assert "1e9" in options
    [folder] = tmp_path.iterdir()
    state = torch.load(folder / "last.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["network"].values())


def test_steps_whose_gradients_are_not_finite_are_left_out_and_counted(toys, tmp_path, capsys,
                                                                      monkeypatch):
    calls, real = [], layers.bce_dice_loss

    def sometimes_infinite(logits, target, weights):
        calls.append(len(calls))
        return real(logits, target, weights) * (math.inf if calls[-1] in bad else 1)

    monkeypatch.setitem(layers.LOSSES, "bce_dice", sometimes_infinite)
    words = ["train", "unet", "--root", toys.parent, *TINY, "--batch", 2, "--epochs", 1, "--out",
             tmp_path]
    monkeypatch.setattr(petseg, "ARGS", petseg.command_line().parse_args([*map(str, words)]))
    bad = {0, 7, 8}
    petseg.main()
    [folder] = tmp_path.iterdir()
    [row] = read_rows(folder / "metrics.csv")
    assert row["skipped"] == "3" and math.isfinite(float(row["train_loss"]))
    assert "3 steps left out" in capsys.readouterr().err
    calls, bad = [], set(range(18))
    with pytest.raises(SystemExit):
        petseg.main()
    assert re.search("steps had gradients that were not finite.*--lr", capsys.readouterr().err)


@pytest.mark.parametrize("batch", [8, 64])
def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(batch, halfway):
    folder, _ = halfway
    state = torch.load(folder / "last.pt", weights_only=True)
    state["settings"] |= {"lr": 1e30, "batch": batch, "clip": 0.0}
    petseg.write_checkpoint(state, folder / "last.pt")
    said = refused("train", "--resume", folder, "--epochs", 4)
    assert re.search("nan|inf", said) and "--lr" in said
    tensors, rows = learned(folder)
    assert len(rows) == 1 and all(tensor.isfinite().all() for _, tensor in tensors)


def be_one_of_two(number, place, work):
    """What a copy does as one of two that work together: it saves what it found."""
    store = dist.FileStore(str(place / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    torch.save(work(), place / f"{number}.pt")


def found_by_two(work, place):
    """What a function of this file returns in each of two processes."""
    children = [FORKS.Process(target=be_one_of_two, args=(i, place, work)) for i in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [torch.load(place / f"{number}.pt") for number in range(2)]


def step_without_batch_norm():
    """The gradients of a step, what it returns, and the batch norms' statistics."""
    torch.manual_seed(0)
    network, device = layers.UNet(width=2), torch.device("cpu")
    for module in network.modules():
        if hasattr(module, "bn"):
            module.bn = nn.Identity()
    gradients = {}

    class Watch:
        def step(self):
            gradients.update({name: p.grad for name, p in network.named_parameters()})

        def zero_grad(self):
            pass

    run = Namespace(batch=3, size=(32, 32), epochs=1, grow=0, seed=0, augment={}, clip=0.0,
                    border="foreground", precision="fp32", loss="bce_dice")
    found = petseg.train_step(run, petseg.shared(network, device), [Watch()],
                              petseg.noise_split(9, (32, 32)), torch.tensor([8, 1, 7, 2, 6, 3, 5]),
                              1, 0)
    return gradients, *found


def test_two_processes_find_the_gradients_of_one(tmp_path):
    one = step_without_batch_norm()  # in batches of 3, 3 and 1: the last has none for the second
    for gradients, sums, counts in found_by_two(step_without_batch_norm, tmp_path):
        torch.testing.assert_close(gradients, one[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(sums, one[1])
        assert sums[1] == 7 and torch.equal(counts, one[2])


def ten_steps():
    """A network after ten steps as `train` takes them."""
    args = petseg.command_line().parse_args(
        "bench unet --size 32 --width 2 --batch 3 --device cpu".split())
    run = petseg.settings(args, torch.device("cpu"), toy=False)
    run.dropout, run.border = 0.5, "random"
    torch.manual_seed(0)
    step, network, _ = petseg.this_way(run, petseg.noise_split(9, run.size), torch.device("cpu"))
    for number in range(10):
        step(list(range(number % 3, 9 - number % 2, 2)))
    return network.state_dict()


def test_all_processes_have_the_same_network_after_ten_steps(tmp_path):
    first, second = found_by_two(ten_steps, tmp_path)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]) and weight.isfinite().all()
    assert not torch.equal(first["head.weight"], ten_steps()["head.weight"])  # other draws


def be_worker(rank, port):
    """What torchrun tells one of two processes."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
                   "RANK": rank, "LOCAL_RANK": rank}


def run_by_two(*words, between=quiet, codes=(0, 0)):
    """One command in two processes, which `between` is called with in the meantime; returns the
    first. The second says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    first, second = (start(*words, before=partial(be_worker, rank, port)) for rank in "01")
    with first as first, second as second:
        between(first, second)
    assert (first.exitcode, second.exitcode) == codes, (first.stderr, second.stderr)
    assert second.stdout == second.stderr == ""
    return first


def test_two_processes_score_and_predict_as_one(trained, pets, tmp_path):
    network = ("--ckpt", trained["unet"] / "best.pt", "--out")
    (pets / "images" / "Broken.jpg").write_bytes(b"no picture")
    run("eval", *network, tmp_path / "one")
    run_by_two("eval", *network, tmp_path / "two")
    run("infer", pets / "images", *network, tmp_path / "one", code=2)
    said = run_by_two("infer", pets / "images", *network, tmp_path / "two", codes=(2, 0))
    assert "50 pictures" in said.stdout and "Broken.jpg" in said.stderr.splitlines()[-1]
    assert files(tmp_path / "one") == files(tmp_path / "two")


SHARED = ["train", "unet", *TINY, "--epochs", 4, "--batch", 5, "--border", "random",
          "--checkpoint-minutes", 0.001]  # of 36 pictures the last is alone in its batch


@pytest.fixture(scope="session")
def by_two(root):
    """The folder of a run of two processes, to be read only."""
    said = run_by_two(*SHARED, "--root", root, "--out", root / "two", "--json")
    assert "2 processes: together batch 5 × 1, rate 0.02" in said.stderr
    return Path(json.loads(said.stdout.splitlines()[-1])["run"])


def test_a_signal_to_one_process_stops_all_at_the_same_step(by_two, root, tmp_path):
    def stop(first, second):
        assert said_until(first, "epoch 1/4  train loss")
        os.kill(second.pid, signal.SIGTERM)

    words = [*SHARED, "--root", root, "--out", tmp_path]
    assert "--resume" in run_by_two(*words, between=stop, codes=(143, 143)).stderr.splitlines()[-1]
    [folder] = tmp_path.iterdir()
    assert len(read_rows(folder / "metrics.csv")) < 4
    run_by_two(*words, "--resume", "auto")
    assert_same_run(folder, by_two)


@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's workers in /proc")
def test_torchrun_brings_back_a_run_whose_worker_was_killed(by_two, root, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
             "--max-restarts", 3, PROGRAM, *SHARED, "--root", root, "--out", tmp_path]
    with subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.PIPE,
                          stdout=subprocess.DEVNULL, text=True) as process:
        assert any("epoch 2/4  train loss" in line for line in process.stderr)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[1]), signal.SIGKILL)
        said = process.stderr.read()
    assert process.returncode == 0 and "resuming" in said and "Traceback" not in said
    [folder] = tmp_path.iterdir()
    assert_same_run(folder, by_two)


def test_infer_takes_any_pictures(trained, toys, tmp_path):
    best = trained["unet"] / "best.pt"
    (tmp_path / "b").mkdir()
    RED_BLUE.save(tmp_path / "cat.jpg")
    GREY.resize((300, 7)).save(tmp_path / "b" / "cat.png")
    (tmp_path / "b" / "broken.jpg").write_bytes(b"no picture")
    known, out = min((toys / "images").iterdir()), tmp_path / "out"
    pictures = [tmp_path / "cat.jpg", tmp_path / "b", known]
    assert "broken.jpg" in refused("infer", "--ckpt", best, *pictures, "--out", out)
    sizes = {"cat": (40, 30), "cat-2": (300, 7), known.stem: Image.open(known).size}
    rows = read_rows(out / "predictions.csv")
    assert [Path(row["file"]).name for row in rows] == ["cat.jpg", "cat.png", known.name]
    for row, (name, size) in zip(rows, sizes.items()):
        for kind, mode in {"mask": "L", "overlay": "RGB", "cutout": "RGBA"}.items():
            picture = Image.open(out / f"{name}_{kind}.png")
            assert (picture.size, picture.mode) == (size, mode)
        mask = np.asarray(Image.open(out / f"{name}_mask.png")) > 0
        assert float(row["share"]) == pytest.approx(mask.mean())
        assert bool(row["dice"]) == (name == known.stem)
    assert len(list(out.iterdir())) == 3 * 3 + 1


def test_infer_takes_names_of_any_kind_and_names_what_is_spoilt(trained, tmp_path):
    spoilt_ones, rng = pictures_to_spoil(), np.random.default_rng(5)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "loop").symlink_to(tmp_path / "in")
    for i in range(20):
        ending, content = spoilt(rng, spoilt_ones)
        (tmp_path / "in" / f"spoilt\n{i}.{ending}").write_bytes(content)
    good = [b"a b.png", b"two\nlines.png", b"-dash.png", b"Cat.png", b"cat.png", b"\xff.png",
            b"x" * 251 + b".png", b"x" * 250 + b"y.png"]
    for name in good:
        RED_BLUE.save(tmp_path / "in" / os.fsdecode(name))
    out = tmp_path / os.fsdecode(b"out \xff")
    done = run("infer", "--ckpt", trained["unet"] / "best.pt", "--json", "--save",
               "panel,mask,overlay", "--out", out, "--", "-dash.png", ".", code=2,
               before=partial(os.chdir, tmp_path / "in"))
    result, rows = json.loads(done.stdout), read_rows(out / "predictions.csv")
    [said] = [line for line in done.stderr.split("\n") if line.startswith("petseg: ")]
    assert f"{len(result['failed'])} of 29 pictures" in said and r"spoilt\n" in said
    assert len(rows) == result["images"] == 29 - len(result["failed"]) >= 9
    assert not any("\n" in value for row in rows for value in row.values())
    assert len((out / "predictions.csv").read_text().splitlines()) == 1 + len(rows)
    assert {"-dash", "-dash-2", "Cat", "cat-2", r"two\nlines", r"\udcff", "x" * 200,
            "x" * 200 + "-2"} < {row["output"] for row in rows}
    assert {path.name for path in out.iterdir()} == {"predictions.csv"} | {
        f"{row['output']}_{kind}.png" for row in rows for kind in ("panel", "mask", "overlay")}


def test_a_mask_does_not_depend_on_neighbours_or_order(trained, toys, tmp_path):
    photos, masks = sorted((toys / "images").iterdir())[:9], []
    for number, pictures in enumerate((photos, photos[::-1], photos[4:5])):
        out = tmp_path / str(number)
        run("infer", "--ckpt", trained["unet"] / "best.pt", *pictures, "--save", "mask",
            "--out", out)
        masks.append({name: content for name, content in files(out).items() if "mask" in name})
    assert masks[0] == masks[1] and len(set(masks[0].values())) > 1
    assert masks[2].items() <= masks[0].items() and len(masks[2]) == 1


def test_infer_is_stopped_and_does_the_rest(trained, toys, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for i in range(4):
        for photo in (toys / "images").iterdir():
            os.link(photo, photos / f"{photo.stem}-{i}.jpg")
    words = ["infer", "--ckpt", trained["unet"] / "best.pt", photos, "--out", out,
             "--save", "mask,overlay", "--no-tta"]
    with start(*words) as process:
        while len(list(out.glob("*_overlay.png"))) < 9:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
    assert process.exitcode == 130
    assert "--skip-existing" in process.stderr.splitlines()[-1]
    first = {row["output"]: row for row in read_rows(out / "predictions.csv")}
    assert 0 < len(first) < 200 and not list(out.glob(".part-*"))
    for path in out.glob("*.png"):
        Image.open(path).load()  # whole
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.png")
             if path.name.rpartition("_")[0] in first}
    assert len(there) == 2 * len(first)

    removed = out / f"{list(first)[0]}_mask.png"
    removed.unlink()
    result = answer(*words, "--skip-existing")
    assert (result["images"], result["skipped"]) == (200, len(first) - 1)
    rows = {row["output"]: row for row in read_rows(out / "predictions.csv")}
    assert len(rows) == 200 == len(list(out.glob("*_mask.png"))) and first.items() <= rows.items()
    assert [path for path in there if path.stat().st_mtime_ns != there[path]] in (
        [removed, removed.with_name(removed.name.replace("mask", "overlay"))],
        [removed.with_name(removed.name.replace("mask", "overlay")), removed])

    # a picture of another folder is not taken for the one whose name it has
    other = shutil.copy(next(photos.iterdir()), tmp_path)
    words[3] = other
    assert answer(*words, "--skip-existing")["skipped"] == 0
    assert str(other) in [row["file"] for row in read_rows(out / "predictions.csv")]
    (out / "predictions.csv").write_text("file,output\n1,2\n")
    assert "predictions.csv" in refused(*words, "--skip-existing")


def test_infer_holds_fifteen_bytes_for_a_pixel(trained, tmp_path):
    peaks = []
    for side in (40, 4000):
        RED_BLUE.resize((side, side)).save(tmp_path / "a.jpg")
        words = ["infer", "--ckpt", trained["unet"] / "best.pt", tmp_path / "a.jpg",
                 "--out", tmp_path / "out"]
        peaks.append(int(run(*words).peak) * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 15 * 4000 * 4000 + 3e7
    said = refused(*words, "--max-pixels", 15_999_999)
    assert re.search("a.jpg has more than 15,999,999 pixels.*--max-pixels", said)


def test_training_goes_on_from_the_cache(root, tmp_path):
    """A batch larger than the data, masks of nothing but background, and pictures that vanish."""
    pets = shutil.copytree(root / data.TOYS, tmp_path / "pets")
    samples = look(pets).splits["train"] + look(pets).splits["valid"]
    for sample in samples:
        Image.new("L", Image.open(sample.mask).size, 2).save(sample.mask)
    words = ["train", "unet", "--data", pets, "--root", tmp_path, "--out", tmp_path / "runs",
             "--size", 32, "--width", 2, "--epochs", 9, "--batch", 64, "--json"]
    with start(*words) as process:
        assert said_until(process, "epoch 1/9  train loss")
        for sample in samples:
            sample.image.unlink()
            sample.mask.write_bytes(b"changed")
    result = json.loads(process.stdout)
    assert process.exitcode == 0 and result["images"] == 10


def test_a_network_of_two_classes_is_scored_on_others_of_more_on_its_own(trained, tmp_path):
    lay_out(tmp_path, "numbers")
    words = ("eval", "--data", tmp_path, "--root", tmp_path / "root", "--out", tmp_path / "out")
    assert 0 <= answer(*words, "--ckpt", trained["unet"] / "best.pt")["dice"] <= 1
    save_random(tmp_path / "three.pt", "unet", ["ground", "car", "tree"])
    assert "has the classes background, foreground" in refused(*words, "--ckpt",
                                                               tmp_path / "three.pt")
    assert "likeliest" in refused(*words, "--ckpt", tmp_path / "three.pt", "--threshold", 0.3)


def test_infer_leaves_out_what_it_has_written(trained, tmp_path):
    RED_BLUE.save(tmp_path / "photo.png")
    RED_BLUE.save(tmp_path / "a_mask.png")
    for out in (tmp_path / "out", tmp_path / "out", tmp_path / "more"):
        words = ("infer", "--ckpt", trained["unet"], tmp_path, "--save", "mask,panel", "--out")
        found = answer(*words, out)["images"]
        assert found == {"out": 2, "more": 6}[out.name]  # elsewhere such a name may be a photo's


def test_infer_without_pictures_shows_the_test_split(trained, root, tmp_path):
    result = answer("infer", "--ckpt", trained["unet"] / "best.pt", "--root", root, "--no-tta",
                    "--threshold", 0, "--out", tmp_path)
    rows = read_rows(tmp_path / "predictions.csv")
    assert result["images"] == len(rows) == len(list(tmp_path.glob("*_panel.png"))) == 10
    assert all(float(row["share"]) == 1 for row in rows)  # as the threshold is 0
    assert result["dice"] == pytest.approx(sum(float(row["dice"]) for row in rows) / 10)


@pytest.mark.parametrize("model, largest", [("unet", 8e6), ("resnet34_unet", 16e6)])
def test_the_weights_that_come_with_the_program(model, largest, toys, tmp_path):
    path = PROGRAM.parent / "weights" / f"{model}.pt"
    assert path.stat().st_size <= largest
    made = torch.load(path, weights_only=True)["trained"]
    assert made["command"].startswith(f"petseg.py train {model} --data pets")
    assert len(made["commit"]) == 40 and made["machine"] and made["seed"] >= 0
    assert 0 < made["epoch"] <= made["epochs"] and made["seconds"] > 0
    assert made["valid_dice"] > 0.93 and made["valid_iou"] > 0.88
    photo = min((toys / "images").iterdir())
    words = () if model == "unet" else ("--ckpt", path)  # unet.pt is taken where none is named
    result = answer("infer", *words, photo, "--out", tmp_path)
    assert result["images"] == 1 and result["dice"] > 0.5  # though it has only seen photos
    assert Image.open(tmp_path / f"{photo.stem}_mask.png").size == Image.open(photo).size


def test_compare(trained, tmp_path):
    words = ["compare", *trained.values(), "--out", tmp_path / "a.png"]
    said = run(*words).stdout
    for row, folder in zip(answer(*words)["runs"], trained.values(), strict=True):
        assert row["test_dice"] == json.loads((folder / "test.json").read_text())["dice"]
        assert folder.name in said
    assert Image.open(tmp_path / "a.png").width == 1200


def test_data_check(root, pets):
    result = answer("data", "check", "--data", "toy", "--root", root)
    assert [(row["split"], row["pictures"]) for row in result["splits"]] == [
        ("train", 36), ("valid", 4), ("test", 10)]
    split = data.open_split(look(root / data.TOYS), "valid", (32, 32), root / "cache", quiet)
    pet = (split.labels % 128 == 1).mean()
    assert [row["valid"] for row in result["shares"]] == pytest.approx([1 - pet, pet])
    path = look(pets).splits["test"][2].image
    path.write_bytes(b"spoilt")
    assert path.name in refused("data", "check", "--data", pets)
    said = refused("data", "check", "--data", pets, "--max-pixels", 99)
    assert re.search("50 pictures.*--max-pixels", said)


def test_without_network_auto_takes_the_toys(toys, tmp_path, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    common = ["--root", tmp_path, "--url", url]
    assert url in refused("data", "get", *common)
    assert url in refused("train", "unet", "--data", "pets", *common)
    shutil.copytree(toys, tmp_path / data.TOYS)
    assert petseg.find_data("auto", tmp_path, url) == ("toy", tmp_path / data.TOYS)
    assert [line[:4] for line in capsys.readouterr().err.splitlines()] == ["!!! "] * 3


@pytest.mark.parametrize("model", petseg.MODELS)
def test_summary(model):
    result = answer("summary", model)
    with torch.device("meta"):
        network = layers.MODELS[model]()
    assert result["parameters"] == sum(p.numel() for p in network.parameters())
    assert sum(layer["parameters"] for layer in result["layers"]) == result["parameters"]
    macs = {"unet": 64 * 3 * 9 * 256 * 256, "resnet34_unet": 64 * 3 * 49 * 128 * 128}
    assert result["layers"][0]["multiply_adds"] == macs[model]


def save_random(path, model, classes=TWO):
    """A best.pt of a tiny network whose batch norms are as after some training; the network."""
    about = ABOUT | {"model": model, "size": (64, 64), "classes": classes,
                     "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    torch.manual_seed(0)
    network = petseg.build(about)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 1.0)
            nn.init.normal_(module.bias)
    network(torch.randn(4, 3, 64, 64))
    with torch.no_grad():  # what the file will hold
        for weight in network.parameters():
            weight.copy_(weight.half() if weight.dim() > 1 else weight)
    petseg.save_network(path, network, about, MADE | {"command": f"train {model}"})
    return layers.Portable(network, about["mean"], about["std"]).eval()


ELSEWHERE = """import sys, torch
notes = {"petseg.json": ""}
network = torch.export.load("model.pt2", extra_files=notes).module()
torch.save([network(images) for images in torch.load("images.pt")], "found.pt")
print(*{"petseg", "layers", "data"} & set(sys.modules), notes["petseg.json"])"""


def test_an_exported_network_says_the_same_without_petseg(tmp_path):
    path, classes = tmp_path / "there" / "model.pt2", ["sky", "tree", "car"]
    network = save_random(tmp_path / "best.pt", "resnet34_unet", classes)
    result = run("export", "--ckpt", tmp_path / "best.pt", "--out", path, "--json")
    assert json.loads(result.stdout) == {"out": str(path), "model": "resnet34_unet",
                                         "size": [64, 64], "classes": classes}
    assert not result.stderr and list(path.parent.iterdir()) == [path]
    shapes = [(1, 3, 64, 64), (5, 3, 64, 160), (3, 3, 128, 96)]  # 2×64×96 was it traced with
    images = [torch.rand(shape) for shape in shapes]
    images.append(images[1].to(memory_format=torch.channels_last))
    torch.save(images, path.with_name("images.pt"))
    done = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE], cwd=path.parent, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    notes = json.loads(done.stdout)  # and no module of petseg was named before it
    assert notes["classes"] == classes and notes["mean"] == [0.1, 0.2, 0.3]
    assert notes["size"] == [64, 64] and notes["trained"]["command"] == "train resnet34_unet"
    for x, found in zip(images, torch.load(path.with_name("found.pt")), strict=True):
        with torch.no_grad():
            expected = network(x)
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_export_to_onnx(tmp_path):
    network, path = save_random(tmp_path / "best.pt", "unet"), tmp_path / "model.onnx"
    words = ("export", "--ckpt", tmp_path / "best.pt", "--out", path)
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        assert "pip install onnx onnxscript" in refused(*words)
        assert not path.exists()
        return
    assert answer(*words)["out"] == str(path)
    runtime, images = pytest.importorskip("onnxruntime"), torch.rand(3, 3, 128, 96)
    found, = runtime.InferenceSession(path).run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = network(images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_export_names_the_endings_it_knows_before_it_reads(tmp_path):
    said = refused("export", "--ckpt", tmp_path / "missing.pt", "--out", tmp_path / "model.pth")
    assert re.search("model.pth.*pt2.*onnx", said) and not list(tmp_path.iterdir())
    assert "missing.pt" in refused("export", "--ckpt", tmp_path / "missing.pt")


def test_bench(root):
    result = answer("bench", "unet", "--root", root, *TINY, "--batch", 2, "--rounds", 1)
    assert all(result[way][key] > 0 for way in ("plain", "petseg")
               for key in ("train", "infer", "memory"))
    petseg_way, macs = result["petseg"], result["multiply_adds"]
    assert result["share"]["train"] == pytest.approx(
        3 * macs * petseg_way["train"] / petseg_way["matrix_rate"])
    network = sum(petseg_way[part] for part in ("forward", "backward", "optimizer"))
    others = sum(petseg_way[part] for part in ("reading", "augmentation", "metrics and the rest"))
    assert network > 0 and result["overhead"] == pytest.approx(others / (network + others))


def bench_here(capsys, model, *words):
    """What bench answers in this process."""
    words = ["bench", model, *TINY, "--batch", 2, "--rounds", 1, "--json", *words]
    petseg.bench(petseg.command_line().parse_args([*map(str, words)]))
    return json.loads(capsys.readouterr().out)


def test_bench_layers_names_each_layer_once(monkeypatch, capsys):
    monkeypatch.setattr(petseg, "matrix_rate", lambda *_: 1e10)
    result = bench_here(capsys, "resnet34_unet", "--layers")
    names = [name for name, layer in layers.ResNet34UNet(width=4).named_modules()
             if not list(layer.children())]
    assert sorted(row["layer"] for row in result["layers"]) == sorted(names)
    assert sum(row["share_of_time"] for row in result["layers"]) == pytest.approx(1)


@pytest.mark.parametrize("each, bend", [(0.1, 1.0), (0.1, 1.02), (0.03, 0.97), (0.7, 1.0)])
def test_bench_memory_finds_the_largest_batch(monkeypatch, each, bend):
    def peak(batch):  # not quite a line, and over 4 GB there is no more
        memory = 0.5 + each * batch**bend
        if memory > 4:
            raise data.Problem("not enough memory")
        return memory

    monkeypatch.setattr(petseg, "in_fresh_process",
                        lambda only, batch: {"memory": peak(batch)})
    _, result = petseg.bench_memory(Namespace(memory=2.0), None, None)
    largest = max(batch for batch in range(1, 60) if 0.5 + each * batch**bend <= 2)
    assert result["largest_batch"] == largest
    with pytest.raises(data.Problem, match=r"a single picture takes \d.*--recompute"):
        petseg.bench_memory(Namespace(memory=0.5), None, None)


def test_bench_grows(monkeypatch, capsys, tmp_path):
    words = (capsys, "unet", "--root", tmp_path / "new")
    monkeypatch.setattr(petseg, "in_fresh_process",
                        lambda only: bench_here(*words, "--only", only // 100))
    result = bench_here(*words, "--growth")
    assert [row["pictures"] for row in result["growth"]] == [3312, 33120]
    assert result["growth"][1]["MB"] == pytest.approx(33120 * 32 * 32 * 4 / 1e6)
    assert all(row["train, images/s"] > 0 for row in result["growth"])


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in petseg.COMMANDS)])
def test_help_comes_without_torch(words):
    done = subprocess.run([sys.executable, "-X", "importtime", PROGRAM, *words],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:")
    assert "torch" not in done.stderr and "argparse" in done.stderr


def test_what_is_no_checkpoint_is_refused(trained, tmp_path):
    assert str(tmp_path / "missing") in refused("infer", "--ckpt", tmp_path / "missing", tmp_path)
    assert "best.pt" in refused("eval", "--ckpt", trained["unet"] / "last.pt")
    assert "last.pt" in refused("train", "--resume", tmp_path)


def test_hostile_checkpoints_are_refused_at_once(trained, tmp_path):
    class Code:
        def __reduce__(self):  # reading it back would make a folder
            return os.mkdir, (str(tmp_path / "executed"),)

    good = torch.load(trained["unet"] / "best.pt", weights_only=True)
    weights = good["weights"]
    name = next(iter(weights))
    contents = {
        "code": good | {"weights": Code()}, "alien": {"weights": torch.zeros(3)},
        "shape": good | {"weights": weights | {name: torch.zeros(3)}},
        "extra": good | {"weights": weights | {"more": torch.zeros(3)}},
        "missing": good | {"weights": {n: w for n, w in weights.items() if n != name}},
        "no-tensor": good | {"weights": weights | {name: "text"}},
        "nan": good | {"weights": weights | {name: weights[name] * math.nan}},
        "wide": good | {"width": 10**6}, "wider": good | {"width": 2**40},
        "negative": good | {"width": -1}, "model": good | {"model": "vgg"},
        "mean": good | {"mean": (0.5,)}, "small": good | {"size": (0, 0)},
        "untrained": good | {"trained": {}}, "nothing": good | {"classes": []},
        "numbers": good | {"classes": [0, 1]},
        "many": good | {"classes": ["pet"] * 10**5},
        "kind": good | {"petseg": []},
        "drawn": good | {"trained": good["trained"] | {"drawn": {"valid": [1]}}},
        # a tensor that says it has 10¹² numbers, all of them the same
        "vast": good | {"weights": weights | {name: torch.zeros(1).expand(10**12)}},
    }
    for each, content in contents.items():
        petseg.write_checkpoint(content, tmp_path / each)
    torch.save(good, tmp_path / "unsealed")
    best, memory = (trained["unet"] / "best.pt").read_bytes(), io.BytesIO()
    random = np.random.default_rng(0).bytes(5000)
    for each, content in {"text": b"hello", "empty": b"", "zeros": bytes(10**7),
                          "cut": best[:-5000], "random": random}.items():
        (tmp_path / each).write_bytes(content)
    # 400 kB that are in order but for what they unpack to
    torch.save(good | {"weights": torch.zeros(4 * 10**8, dtype=torch.uint8)}, tmp_path / "large")
    with zipfile.ZipFile(tmp_path / "large") as large, zipfile.ZipFile(
            memory, "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in large.namelist():
            bomb.writestr(part, large.read(part))
    archive = memory.getvalue()[:-2]
    (tmp_path / "bomb").write_bytes(archive + petseg.SEAL + hashlib.sha256(archive).digest())
    (tmp_path / "large").unlink()
    (tmp_path / "folder").mkdir()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(data.Problem, match=re.escape(str(path))):
            petseg.load_segmenter(path, "cpu", "fp32")
    assert not (tmp_path / "executed").exists()
    for each in ("vast", "bomb"):
        done = run("infer", "--ckpt", tmp_path / each, tmp_path, code=2)
        assert int(done.peak) < 5 * 10**5


def test_no_bit_of_a_checkpoint_flips_unseen(trained, tmp_path):
    good, random = trained["unet"] / "best.pt", np.random.default_rng(0)
    petseg.read_checkpoint(good, "network", "cpu")
    for place in random.random(300):
        path = Path(shutil.copy(good, tmp_path / "flipped.pt"))
        flip(path, [place])
        with pytest.raises(data.Problem, match="damaged"):
            petseg.read_checkpoint(path, "network", "cpu")


@pytest.mark.parametrize("error, advice", [
    (MemoryError(), "--batch"), (torch.OutOfMemoryError("CUDA out of memory."), "--batch"),
    (RuntimeError("[..] DefaultCPUAllocator: can't allocate memory: you tried ..."), "--batch"),
    (OSError(errno.ENOSPC, "No space left on device", "last.pt"), "last.pt; make room.*--resume"),
    (PermissionError(errno.EACCES, "Permission denied", "runs"), "Permission denied: runs")])
def test_a_machine_at_its_limits(error, advice, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(petseg, "ARGS", Namespace(command="fail"))
    monkeypatch.setitem(petseg.COMMANDS, "fail", fail)
    with pytest.raises(SystemExit) as stop:
        petseg.main()
    assert stop.value.code == 2 and re.search(f"^petseg: .*{advice}", capsys.readouterr().err)


def test_a_cache_that_the_disk_cannot_hold(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=4 * 32 * 32 * 4 - 1))
    with pytest.raises(data.Problem, match="needs.*disk has.*--root"):
        data.open_split(look(toys), "valid", (32, 32), tmp_path, quiet)
    assert not files(tmp_path)


@pytest.mark.parametrize("words, expected", [
    ("train vgg", "vgg"),
    ("train", "unet"),
    ("train unet --size 31", "31"),
    ("train unet --size 64x64x3", "64x64x3"),
    ("train unet --epochs 0", "epochs"),
    ("train unet --augment swirl=1", "swirl.*|none, flip, full, strong.*rotate"),
    ("train unet --augment flip=1,rotate=999", "180.*999"),
    ("train unet --data {folder}/no-test --compile --recompute", "--compile and --recompute"),
    ("train unet --data {folder}/nowhere", "nowhere"),
    ("train unet --data {folder}/empty", "is not understood.*annotations"),
    ("train unet --data {folder}/no-test --root {folder} --width 99999", "memory.*--width"),
    ("train resnet34_unet --init {run}/best.pt --data {folder}/no-test --root {folder}",
     "best.pt are of another network"),
    ("eval --ckpt {run}/best.pt --data {folder}/no-test --split test", "--split valid"),
    ("eval --ckpt {run}/best.pt --threshold 2", "threshold"),
    ("eval --ckpt {run}/last.pt", "is the last.pt of a run.*best.pt"),
    ("train unet --size 64,96", "height and width as in 256x512, not '64,96'"),
    ("train unet --data {run} --classes species", "--classes species is for the pets"),
    ("infer --ckpt {run}/best.pt {folder}/nowhere", "nowhere"),
    ("infer --ckpt {run}/best.pt {folder}/empty", "empty"),
    ("infer --ckpt {run}/best.pt {folder} --save drawing", "drawing"),
    ("compare {folder}/empty", "empty"),
])
def test_what_a_user_gets_wrong(words, expected, trained, pets, tmp_path):
    (tmp_path / "empty").mkdir()
    (pets / "annotations" / "test.txt").unlink()
    pets.rename(tmp_path / "no-test")
    words = words.format(folder=tmp_path, run=trained["unet"]).split()
    said = refused(*words, "--out", tmp_path / "out")
    assert re.search(expected, said)
    assert not (tmp_path / "out").exists()
