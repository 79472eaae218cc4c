"""test_petseg.py: what petseg promises, in the order of its rooms: layers, data, petseg.

Expected numbers come from the formula, written again here as slowly and plainly as possible, or
were worked out by hand. Nothing here needs a network, a GPU, or a fast machine.
"""
import csv
import hashlib
import http.server
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import layers
import petseg

# networks this small gain nothing from a second thread, and lose much where the cores are shared
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}

HERE = Path(__file__).parent
NETWORKS = [layers.UNet, layers.ResNet34UNet]
TINY = ("--data", "toy", "--size", 32, "--width", 2)


def quiet(done, total):
    """Progress that nobody watches."""


def run(*words, code=0):
    """One command as a user types it."""
    done = subprocess.run([sys.executable, HERE / "petseg.py", *map(str, words)],
                          capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def answer(*words):
    """The one JSON object that a command with --json ends with."""
    lines = run(*words, "--json").stdout.splitlines()
    assert not any(line.startswith("{") for line in lines[:-1])
    return json.loads(lines[-1])


def refused(*words):
    """The one line that says what is wrong with a command."""
    lines = run(*words, code=2).stderr.splitlines()
    [line] = [line for line in lines if line.startswith("petseg: ")]
    assert line == lines[-1]
    return line


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


def files(folder):
    """Every file under a folder by its relative name, with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------- layers


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        assert count(layers.UNet()) == 31_037_633
        assert count(layers.ResNet34UNet().encoder) == 21_284_672


@pytest.mark.parametrize("up", ["transpose", "bilinear"])
@pytest.mark.parametrize("model", NETWORKS)
def test_output_has_the_size_of_the_input_from_32_up(model, up):
    network = model(in_channels=2, classes=3, width=2, up=up).eval()
    for height in range(32, 66):
        x = torch.rand(1, 2, height, 97 - height)
        assert network(x).shape == (1, 3, height, 97 - height)
    assert network(torch.rand(2, 2, 47, 63)).shape == (2, 3, 47, 63)


def reference_resnet34(x, weights):
    """The outputs of the five stages of the paper's ResNet-34, from its weights in its order."""
    weights = iter(weights)

    def conv(x, stride=1):
        weight = next(weights)
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def norm(x):
        scale, shift, mean, variance, _ = (next(weights) for _ in range(5))
        return F.batch_norm(x, mean, variance, scale, shift, eps=1e-5)

    x = F.relu(norm(conv(x, stride=2)))
    stages = [x]
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            y = F.relu(norm(conv(x, stride)))
            y = norm(conv(y))
            shortcut = norm(conv(x, stride)) if stride == 2 else x
            x = F.relu(y + shortcut)
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
    weights = list(network.encoder.state_dict().values())
    assert [tuple(w.shape) for w in weights if w.dim() == 4][0] == (64, 3, 7, 7)
    x = torch.randn(1, 3, 75, 102)
    with torch.no_grad():
        for stage, expected in zip(network.encoder, reference_resnet34(x, weights), strict=True):
            x = stage(x)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", NETWORKS)
def test_convolutions_start_as_he_says(model):
    torch.manual_seed(0)
    checked = 0
    for module in model(width=16).modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            if module.bias is not None:
                assert not module.bias.any()
            # each output of a doubling by a 2×2 convolution sees one tap of each channel
            taps = 1 if isinstance(module, nn.ConvTranspose2d) else math.prod(module.kernel_size)
            if module.weight.numel() > 2000:
                checked += 1
                expected = math.sqrt(2 / (module.in_channels * taps))
                assert module.weight.std().item() == pytest.approx(expected, rel=0.08)
    assert checked > 10


def test_residual_blocks_start_as_their_shortcut():
    blocks = [m for m in layers.ResNet34UNet(width=2).modules()
              if isinstance(m, layers.BasicBlock)]
    assert len(blocks) == 3 + 4 + 6 + 3
    for block in blocks:
        x = torch.randn(2, block.conv1[0].in_channels, 8, 8)
        assert torch.equal(block(x), F.relu(block.shortcut(x)))


def test_upconcat_brings_x_to_the_size_of_the_skip():
    step = layers.UpConcat(2, 3, 5, up="bilinear")
    step.convs = nn.Identity()
    x, skip = torch.rand(1, 2, 4, 4), torch.rand(1, 3, 9, 7)
    joined = step(x, skip)
    large = F.interpolate(x, size=(8, 8), mode="bilinear")
    assert torch.equal(joined[:, :3], skip)
    assert torch.equal(joined[:, 3:, :8], large[..., :7])  # a column too many is cut off
    assert not joined[:, 3:, 8].any()  # a row too few is filled up


@pytest.mark.parametrize("model", NETWORKS)
def test_dropout_only_while_training(model):
    x = torch.rand(2, 3, 32, 32)
    for dropout, training in ((0.0, True), (0.5, True), (0.5, False)):
        network = model(width=4, dropout=dropout)
        with torch.no_grad():
            for _ in range(3):
                network.train()(x)  # gives the batch norms something to keep
            network.train(training)
            same = torch.equal(network(x), network(x))
        assert same == (not (dropout and training))


def slow_losses(logits, target, ignore=255):
    """BCE and Dice loss by their formulas, pixel by pixel; both from lists, (B, C, H, W)."""
    logs, dices = [], []
    for z, y in zip(logits, target):
        classes = range(1, 2) if len(z) == 1 else range(len(z))
        both, total = dict.fromkeys(classes, 0.0), dict.fromkeys(classes, 0.0)
        for i, row in enumerate(y):
            for j, label in enumerate(row):
                if label == ignore:
                    continue
                powers = [math.exp(channel[i][j]) for channel in z]
                if len(z) == 1:
                    powers = [1.0, *powers]  # σ(z) = e^z / (1 + e^z)
                p = [power / sum(powers) for power in powers]
                logs.append(-math.log(p[label]))
                for c in classes:
                    both[c] += p[c] * (label == c)
                    total[c] += p[c] + (label == c)
        dices += [(2 * both[c] + 1) / (total[c] + 1) for c in classes]
    return sum(logs) / max(1, len(logs)), 1 - sum(dices) / len(dices)


def random_pair(classes, seed=0):
    """Logits and a target with some pixels to be ignored."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, classes, 3, 4, generator=random)
    target = torch.randint(max(2, classes), (2, 3, 4), generator=random).to(torch.uint8)
    target[torch.rand(target.shape, generator=random) < 0.2] = 255
    return logits, target


def test_losses_by_hand():
    logits = torch.tensor([0.0, 0.0, math.log(3)]).view(1, 1, 1, 3)
    target = torch.tensor([[[1, 0, 1]]], dtype=torch.uint8)
    # p = ½, ½, ¾: −log p is log 2 twice and log 4/3; Dice is (2 (½ + ¾) + 1) / (1¾ + 2 + 1)
    assert layers.bce_loss(logits, target).item() == pytest.approx(math.log(16 / 3) / 3)
    assert layers.dice_loss(logits, target).item() == pytest.approx(1 - 3.5 / 4.75)


@pytest.mark.parametrize("classes", [1, 3])
def test_losses_against_slow_loops(classes):
    for seed in range(5):
        logits, target = random_pair(classes, seed)
        bce, dice = slow_losses(logits.tolist(), target.tolist())
        assert layers.bce_loss(logits, target).item() == pytest.approx(bce, rel=1e-5)
        assert layers.dice_loss(logits, target).item() == pytest.approx(dice, rel=1e-5)
        both = layers.bce_dice_loss(logits, target).item()
        assert both == pytest.approx(bce + dice, rel=1e-5)


@pytest.mark.parametrize("classes", [1, 3])
def test_gradients_against_finite_differences(classes):
    logits, target = random_pair(classes)
    for which, loss in enumerate((layers.bce_loss, layers.dice_loss)):
        leaf = logits.clone().requires_grad_()
        loss(leaf, target).backward()
        for place in np.ndindex(*logits.shape):
            lower, upper = logits.double(), logits.double()
            lower[place] -= 1e-5
            upper[place] += 1e-5
            change = (slow_losses(upper.tolist(), target.tolist())[which]
                      - slow_losses(lower.tolist(), target.tolist())[which])
            assert leaf.grad[place].item() == pytest.approx(change / 2e-5, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", layers.LOSSES)
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("large", [1e4, math.inf])
def test_losses_are_finite_at_any_logit(name, classes, large):
    logits = torch.full((2, classes, 4, 4), -large)
    logits[:, 0, :2] = large
    target = torch.randint(2, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    loss = layers.LOSSES[name](logits, target)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_bce_is_exact_at_large_logits():
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4]).view(1, 1, 2, 2)
    target = torch.tensor([[[1, 0], [0, 0]]])
    assert layers.bce_loss(logits, target).item() == 2500  # one of four is wrong, by 10,000
    both = torch.cat((torch.zeros_like(logits), logits), dim=1)  # the same as two classes
    assert layers.bce_loss(both, target).item() == 2500


@pytest.mark.parametrize("name", layers.LOSSES)
@pytest.mark.parametrize("classes", [1, 3])
def test_ignored_pixels_count_for_nothing(name, classes):
    logits, target = random_pair(classes)
    target[0] = 255
    leaf = logits.clone().requires_grad_()
    layers.LOSSES[name](leaf, target).backward()
    ignored = (target == 255).unsqueeze(1).expand_as(logits)
    assert not leaf.grad[ignored].any()
    assert leaf.grad[~ignored].all()
    changed = torch.where(ignored, 7.0, logits)
    assert layers.LOSSES[name](changed, target) == layers.LOSSES[name](logits, target)
    nothing = layers.LOSSES[name](logits, torch.full_like(target, 255))
    assert nothing.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("model", NETWORKS)
def test_networks_overfit_eight_images(model, toys, tmp_path):
    torch.manual_seed(0)
    split = data.open_split(toys, "train", (48, 48), tmp_path, quiet)
    images, labels = data.load(split, np.arange(8))
    images, target = data.normalise(images), data.targets(labels)
    network, steps = model(width=8), 160
    optimizer = torch.optim.Adam(network.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        optimizer.zero_grad()
        layers.bce_dice_loss(network(images), target).backward()
        optimizer.step()
    with torch.no_grad():
        mask = network.eval()(images)[:, 0] > 0
    assert petseg.scores(petseg.confusion(mask, target))["dice"] > 0.98


# ------------------------------------------------------------------------------------------ data


def test_generator_is_a_function_of_its_key():
    def draw(*key):
        return torch.rand(4, generator=data.generator(*key)).tolist()

    keys = [("a", 0, 1), ("a", 1, 0), ("b", 0, 1), ("a", 0, 1, 0), ("a", 0), ("a", 0, -1)]
    assert draw("a", 0, 1) == draw("a", 0, 1)
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_whole_file_and_folder_leave_the_old_when_writing_fails(tmp_path):
    file, folder = tmp_path / "deep" / "file", tmp_path / "folder"
    for content in (b"old", b"newer"):
        with data.whole_file(file, sync=True) as opened:
            opened.write(content)
        with data.whole_folder(folder) as filled:
            (filled / content.decode()).write_bytes(content)
    before = files(tmp_path)
    assert before == {"deep/file": b"newer", "folder/newer": b"newer"}
    with pytest.raises(ZeroDivisionError), data.whole_file(file) as opened:
        opened.write(b"half")
        1 / 0
    with pytest.raises(ZeroDivisionError), data.whole_folder(folder) as filled:
        (filled / "half").write_bytes(b"half")
        1 / 0
    assert files(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 2


RED_BLUE = Image.new("RGB", (40, 30), (200, 30, 30))
RED_BLUE.paste((30, 30, 200), (20, 0, 40, 30))
GREY = RED_BLUE.getchannel("R")  # 200 beside 30
HALF = Image.fromarray(np.repeat(np.uint8([[255] * 20 + [0] * 20]), 30, axis=0))
SIXTEEN = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
PALETTE = RED_BLUE.quantize(4)
WHITE, BLUE, RED = (255, 255, 255), (30, 30, 200), (200, 30, 30)


@pytest.mark.parametrize("name, image, options, left, right", [
    ("grey.jpg", GREY, {}, (200,) * 3, (30,) * 3),
    ("cmyk.jpg", RED_BLUE.convert("CMYK"), {}, RED, BLUE),
    ("palette.png", PALETTE, {}, RED, BLUE),
    ("see-through-palette.png", PALETTE, {"transparency": PALETTE.getpixel((30, 9))}, RED, WHITE),
    ("rgba.png", Image.merge("RGBA", (*RED_BLUE.split(), HALF)), {}, RED, WHITE),
    ("la.png", Image.merge("LA", (GREY, HALF)), {}, (200,) * 3, WHITE),
    ("sixteen.png", SIXTEEN, {}, (200,) * 3, (30,) * 3),
    ("sixteen.tif", SIXTEEN, {}, (200,) * 3, (30,) * 3),
    ("bits.png", GREY.point(lambda v: v > 99, "1"), {}, WHITE, (0, 0, 0)),
    ("gif.jpg", RED_BLUE, {"format": "GIF"}, RED, BLUE),
    ("png.jpg", RED_BLUE, {"format": "PNG"}, RED, BLUE),
])
def test_read_image_takes_every_kind_of_picture(tmp_path, name, image, options, left, right):
    image.save(tmp_path / name, **options)
    for size in (None, (15, 20)):
        read = data.read_image(tmp_path / name, size)
        assert (read.mode, read.size) == ("RGB", (20, 15) if size else (40, 30))
        pixels = np.asarray(read).astype(int)
        assert np.abs(pixels[5, 4] - left).max() <= 6
        assert np.abs(pixels[5, -4] - right).max() <= 6


TURNS = {  # EXIF's orientation, and how what is stored has to be turned to stand upright
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotation_and_the_mask_that_goes_with_it(tmp_path, orientation):
    stored = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, mask = tmp_path / "a.png", tmp_path / "mask.png"
    Image.fromarray(stored).save(image, exif=exif)
    upright = TURNS[orientation](stored)
    assert np.array_equal(data.read_image(image), upright)
    for drawn_on in (stored, upright):
        trimap = 1 + (drawn_on[..., 0] > 99).astype(np.uint8)
        Image.fromarray(trimap).save(mask)
        size = trimap.shape
        if size == upright.shape[:2] and drawn_on is stored and orientation < 5:
            continue  # nothing tells the two apart here: upright is what counts
        pixels, labels = data.read_pair(data.Sample("a", image, mask), size)
        assert np.array_equal(pixels[..., 0] > 99, labels == 0)


def test_reduced_decoding_loses_nothing(tmp_path):
    y, x = np.mgrid[:480, :640]
    photo = np.stack((x * 255 // 640, y * 255 // 480, 128 + 90 * np.sin(x * y / 4000)), axis=2)
    Image.fromarray(photo.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    whole = Image.open(tmp_path / "a.jpg").resize((64, 48), Image.Resampling.BILINEAR)
    read = data.read_image(tmp_path / "a.jpg", (48, 64))
    assert np.abs(np.asarray(read, float) - np.asarray(whole, float)).mean() < 1


def test_damaged_pictures_are_unreadable_by_name(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for ending in ("jpg", "png", "gif", "tif"):
        whole = io.BytesIO()
        Image.fromarray(noise).save(whole, Image.registered_extensions()["." + ending])
        for name, content in (("cut", whole.getvalue()[:len(whole.getvalue()) // 2]),
                              ("empty", b""), ("text", b"no picture at all")):
            path = tmp_path / f"{name}.{ending}"
            path.write_bytes(content)
            with pytest.raises(data.Unreadable, match=path.name):
                data.read_image(path)
            with pytest.raises(data.Unreadable, match=path.name):
                data.read_trimap(path)
    with pytest.raises(data.Unreadable, match="missing.jpg"):
        data.read_image(tmp_path / "missing.jpg")


def test_wrong_trimaps_say_what_was_found_and_what_expected(tmp_path):
    path = tmp_path / "mask.png"
    for values in ([[0, 1]], [[1, 38]], [[255, 3]]):
        Image.fromarray(np.uint8(values)).save(path)
        with pytest.raises(data.Problem, match="mask.png") as caught:
            data.read_trimap(path)
        for word in (*map(str, values[0]), "expected", "1 = pet", "2 = background", "3 = border"):
            assert word in str(caught.value)
    RED_BLUE.save(path)
    with pytest.raises(data.Problem, match="expected"):
        data.read_trimap(path)
    Image.fromarray(np.uint8([[1, 2, 3]])).save(path)
    assert data.read_trimap(path).tolist() == [[1, 0, 2]]


def test_mask_of_another_size_is_refused(tmp_path):
    RED_BLUE.save(tmp_path / "a.jpg")
    Image.fromarray(np.ones((31, 40), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(data.Problem, match="a.jpg.*30×40.*31×40"):
        data.read_pair(data.Sample("a", tmp_path / "a.jpg", tmp_path / "a.png"), (32, 32))


def test_split_rule(tmp_path):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    names = [f"Cat_{i}" for i in range(25)]
    lines = ["# a comment", *(f"{name} 1 1 1" for name in names[:12]), "", "#another"]
    (annotations / "trainval.txt").write_text("\n".join(lines + names[12:]))
    listed = {split: data.list_samples(tmp_path, split) for split in ("train", "valid")}
    assert [sample.name for sample in listed["valid"]] == ["Cat_0", "Cat_10", "Cat_20"]
    assert [sample.name for sample in listed["train"]] == [
        name for i, name in enumerate(names) if i % 10]
    assert listed["valid"][1].image == tmp_path / "images" / "Cat_10.jpg"
    assert listed["valid"][1].mask == annotations / "trimaps" / "Cat_10.png"
    with pytest.raises(data.Problem, match="test"):
        data.list_samples(tmp_path, "test")
    (annotations / "test.txt").write_text("Dog_1 1 1 1\nDog_2 1 1 1\n")
    assert [sample.name for sample in data.list_samples(tmp_path, "test")] == ["Dog_1", "Dog_2"]


def test_cache_holds_what_the_files_hold(toys, tmp_path):
    split = data.open_split(toys, "valid", (32, 48), tmp_path, quiet)
    assert split.images.shape == (4, 32, 48, 3) and split.labels.shape == (4, 32, 48)
    for name, pixels, labels in zip(split.names, split.images, split.labels):
        photo = Image.open(toys / "images" / f"{name}.jpg").resize((48, 32), Image.BILINEAR)
        assert np.abs(np.asarray(photo, float) - pixels).mean() < 3
        trimap = np.asarray(Image.open(toys / "annotations" / "trimaps" / f"{name}.png"))
        height, width = trimap.shape
        nearest = trimap[np.ix_([int((i + 0.5) * height / 32) for i in range(32)],
                                [int((j + 0.5) * width / 48) for j in range(48)])]
        assert np.array_equal(labels, np.array([255, 1, 0, 2])[nearest])


def test_cache_decodes_once_and_notices_changes(pets, tmp_path):
    def open_it():
        return data.open_split(pets, "valid", (32, 32), tmp_path / "cache", quiet)

    before = {path: path.stat().st_mtime_ns for path in pets.rglob("*")}
    first = open_it()
    assert {path: path.stat().st_mtime_ns for path in pets.rglob("*")} == before

    # spoil every picture behind the cache's back: who decodes again will notice
    for path in (pets / "images").iterdir():
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert np.array_equal(open_it().images, first.images)

    for path in (pets / "images").iterdir():
        Image.new("RGB", Image.open(pets / "annotations" / "trimaps" / f"{path.stem}.png").size,
                  (9, 99, 199)).save(path)
    changed = open_it()
    assert changed.names == first.names
    assert np.abs(changed.images.astype(int) - (9, 99, 199)).max() < 5
    assert np.array_equal(changed.labels, first.labels)


def test_missing_and_broken_pictures_are_left_out_and_named(pets, tmp_path):
    names = [sample.name for sample in data.list_samples(pets, "train")]
    (pets / "images" / f"{names[3]}.jpg").unlink()
    (pets / "images" / f"{names[5]}.jpg").write_bytes(b"spoilt")
    (pets / "annotations" / "trimaps" / f"{names[7]}.png").unlink()
    split = data.open_split(pets, "train", (32, 32), tmp_path / "cache", quiet)
    assert split.names == [name for i, name in enumerate(names) if i not in (3, 5, 7)]
    assert len(split.images) == len(split.labels) == 33
    for i, line in zip((3, 5, 7), split.skipped, strict=True):
        assert names[i] in line


def test_cache_that_fails_leaves_nothing(pets, tmp_path):
    name = data.list_samples(pets, "valid")[-1].name
    trimap = pets / "annotations" / "trimaps" / f"{name}.png"
    Image.fromarray(np.full_like(np.asarray(Image.open(trimap)), 7)).save(trimap)
    with pytest.raises(data.Problem, match=f"{name}.png.* 7"):
        data.open_split(pets, "valid", (32, 32), tmp_path / "cache", quiet)
    shutil.rmtree(pets / "images")
    with pytest.raises(data.Problem):
        data.open_split(pets, "valid", (32, 32), tmp_path / "cache", quiet)
    assert not list((tmp_path / "cache").rglob("*"))


def test_toys_come_from_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.make_toys(tmp_path / name, quiet, seed=seed, trainval=8, test=2)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a if name.endswith(".jpg"))


def test_toys_have_the_layout_of_the_pets(toys):
    listed = []
    for listing, number in (("trainval.txt", 40), ("test.txt", 10)):
        lines = (toys / "annotations" / listing).read_text().splitlines()
        rows = [line.split() for line in lines if not line.startswith("#")]
        assert len(rows) == number
        for name, *numbers in rows:
            assert len(numbers) == 3 and all(value.isdigit() for value in numbers)
            assert (name[0].isupper()) == (numbers[1] == "1")  # cats in capitals, as 1
            listed.append(name)
    assert len(set(listed)) == 50
    assert set(files(toys)) == {f"images/{name}.jpg" for name in listed} | {
        f"annotations/trimaps/{name}.png" for name in listed} | {
        "annotations/trainval.txt", "annotations/test.txt"}
    for name in listed:
        trimap = Image.open(toys / "annotations" / "trimaps" / f"{name}.png")
        assert set(np.unique(trimap)) == {1, 2, 3}
        assert Image.open(toys / "images" / f"{name}.jpg").size == trimap.size


def test_toys_are_not_told_by_colour(toys, tmp_path):
    split = data.open_split(toys, "train", (64, 64), tmp_path, quiet)
    truth = split.labels > 0
    photos = split.images.astype(float)
    best = 0.0
    for channel in (*np.moveaxis(photos, 3, 0), photos.mean(axis=3)):
        for threshold in range(-1, 256, 4):  # -1 takes everything
            for guess in (channel > threshold, channel <= threshold):
                both, sizes = guess & truth, guess.sum(axis=(1, 2)) + truth.sum(axis=(1, 2))
                best = max(best, (2 * both.sum(axis=(1, 2)) / sizes).mean())
    assert 0.2 < best < 0.75


def blocks(number=8, height=48, width=64):
    """Pictures of one large box each, whose red channel is their label."""
    labels = torch.zeros(number, height, width, dtype=torch.uint8)
    for i in range(number):
        labels[i, 8 + i:32, 10:30 + 3 * i] = 1
    images = torch.full((number, 3, height, width), 0.5)
    images[:, 0] = labels
    return images, labels


STRONG = dict(flip=0.5, vflip=0.5, rotate=40, zoom=1.5, shift=0.2, brightness=0.4, contrast=0.4,
              saturation=1.0)


@pytest.mark.parametrize("strengths", [{}, dict(share=0.0, **STRONG)])
def test_augment_of_no_strength_or_share_changes_nothing(strengths):
    images, labels = torch.rand(4, 3, 24, 40), torch.randint(3, (4, 24, 40)).to(torch.uint8)
    same = data.augment(images, labels, data.generator(0), **strengths)
    torch.testing.assert_close(same[0], images, rtol=0, atol=1e-4)
    assert torch.equal(same[1], labels)


@pytest.mark.parametrize("strength, axis", [("flip", 2), ("vflip", 1)])
def test_flip_mirrors_image_and_label(strength, axis):
    images, labels = torch.rand(4, 3, 24, 40), torch.randint(3, (4, 24, 40)).to(torch.uint8)
    turned = data.augment(images, labels, data.generator(0), **{strength: 1.0})
    torch.testing.assert_close(turned[0], images.flip(axis + 1), rtol=0, atol=1e-4)
    assert torch.equal(turned[1], labels.flip(axis))


@pytest.mark.parametrize("strengths", [dict(rotate=40), dict(zoom=1.5), dict(shift=0.2),
                                       dict(flip=0.5, rotate=40, zoom=1.5, shift=0.2)])
def test_image_and_label_stay_together(strengths):
    images, labels = blocks()
    moved, follows = data.augment(images, labels, data.generator(3), **strengths)
    assert ((moved[:, 0] > 0.5) == (follows == 1)).float().mean() > 0.99
    assert set(follows.unique().tolist()) == {0, 1}
    assert (follows != labels).flatten(1).any(dim=1).sum() >= 6


def test_rotation_keeps_shapes():
    images, labels = torch.zeros(8, 3, 32, 96), torch.zeros(8, 32, 96, dtype=torch.uint8)
    labels[:, 12:20, 38:58] = 1
    _, turned = data.augment(images, labels, data.generator(0), rotate=80)
    assert (turned.flatten(1).sum(dim=1) - 160).abs().max() < 16  # a box keeps its area
    assert (turned != labels).any()


def test_colours_change_by_their_strength():
    def change(colour, **strengths):
        images = torch.tensor(colour).view(1, 3, 1, 1).repeat(200, 1, 4, 4)
        images[:, :, :2] += 0.1
        labels = torch.ones(200, 4, 4, dtype=torch.uint8)
        changed, same = data.augment(images, labels, data.generator(1), **strengths)
        assert torch.equal(same, labels)
        return changed

    light = change([0.5, 0.5, 0.5], brightness=0.3)[:, 0, 3, 3]
    assert 0.349 < light.min() < 0.37 and 0.63 < light.max() < 0.651
    spread = change([0.5, 0.5, 0.5], contrast=0.5)
    assert (spread.mean(dim=(1, 2, 3)) - 0.55).abs().max() < 1e-4
    steps = spread[:, 0, 0, 0] - spread[:, 0, 3, 0]
    assert 0.049 < steps.min() < 0.06 and 0.14 < steps.max() < 0.151
    tint = change([0.6, 0.4, 0.4], saturation=1.0)[:, :, 3, 3]
    strength = tint[:, 0] - tint[:, 1]
    assert -1e-4 < strength.min() < 0.01 and 0.39 < strength.max() < 0.401
    grey = tint[strength.argmin()]
    assert grey.tolist() == pytest.approx([0.299 * 0.6 + 0.701 * 0.4] * 3, abs=0.01)


def test_augment_touches_its_share_and_follows_its_generator():
    images, labels = blocks(number=200)
    first, second, other = (data.augment(images, labels, data.generator(key), share=0.5, **STRONG)
                            for key in (1, 1, 2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    touched = (first[0] - images).abs().flatten(1).amax(dim=1) > 1e-3
    assert 70 < touched.sum() < 130
    assert 0 <= first[0].min() and first[0].max() <= 1


def test_border_as_foreground_background_or_ignored():
    labels = torch.tensor([[[0, 1, 2, 255]]], dtype=torch.uint8)
    for border, expected in (("foreground", 1), ("background", 0), ("ignore", 255)):
        assert data.targets(labels, border).tolist() == [[[0, 1, expected, 255]]]


def regions(labels):
    """The connected regions of label 2, each a list of places, by filling one after another."""
    left, found = {tuple(place) for place in (labels == 2).nonzero().tolist()}, []
    while left:
        region = [left.pop()]
        for b, y, x in region:  # grows while it is walked through
            near = {(b, y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            region += near
        found.append(region)
    return found


@pytest.mark.parametrize("edges", [0.1, 0.3, 0.5])
def test_random_border_draws_whole_regions(edges):
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (3, 31, 23), generator=random).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=random) < edges] = 2
    labels[0, 0, 0] = labels[0, 1, 1] = labels[2, 30, 22] = 2  # the very first and last pixel
    found, seen = regions(labels), {}
    for draw in range(20):
        target = data.targets(labels, "random", data.generator(draw))
        assert torch.equal(target[labels != 2], labels[labels != 2])
        for number, region in enumerate(found):
            values = {target[place].item() for place in region}
            assert len(values) == 1 and values <= {0, 1}
            seen.setdefault(number, []).append(values.pop())
    assert len({tuple(draws) for draws in seen.values()}) == len(found)  # each draws for itself
    assert all(0 < sum(draws) < 20 for draws in seen.values())


def test_an_epoch_shows_each_picture_as_often_as_told():
    order = data.shuffled(13, 3, seed=5, epoch=2)
    assert torch.bincount(order).tolist() == [3] * 13
    assert torch.equal(order, data.shuffled(13, 3, seed=5, epoch=2))
    assert not torch.equal(order, data.shuffled(13, 3, seed=5, epoch=3))
    assert not torch.equal(order, data.shuffled(13, 3, seed=6, epoch=2))


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves self.server.files; hostile in the ways that the server's attributes say."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        content = server.files.get(self.path.rpartition("/")[2])
        if content is None or server.status:
            return self.send_error(server.status or 404)
        start = int(asked.removeprefix("bytes=")[:-1]) if asked and server.ranges else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        end = len(content) // 2 if server.breaks else len(content)
        server.breaks = 0
        self.wfile.write(content[start:end])
        server.sent += end - start

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror():
    """A server on loopback, and its address in mirror.url."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.files, server.asked, server.sent = {}, [], 0
        server.ranges, server.breaks, server.status = True, 0, None
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


def test_download(mirror, toys, tmp_path):
    sums = offer(mirror, images=packed(toys / "images"), annotations=packed(toys / "annotations"))
    seen = []
    for _ in range(2):  # what is there is not fetched again
        folder = data.get_pets(tmp_path, mirror.url, lambda *both: seen.append(both), sums, ())
        assert files(folder) == files(toys)
        assert mirror.asked == [None, None]
    assert sorted(path.name for path in folder.iterdir()) == ["annotations", "images"]
    assert {total for _, total in seen} == {len(content) for content in mirror.files.values()}
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_after_a_break(mirror, toys, tmp_path, ranges):
    content = packed(toys / "images")
    sums = offer(mirror, images=content)
    mirror.breaks, mirror.ranges = 1, ranges
    folder = data.get_pets(tmp_path, mirror.url, quiet, sums, (0, 0))
    assert files(folder / "images") == files(toys / "images")
    assert mirror.asked == [None, f"bytes={len(content) // 2}-"]
    assert mirror.sent == len(content) + (0 if ranges else len(content) // 2)


def test_download_left_whole_but_unnamed_is_used(mirror, toys, tmp_path):
    content = packed(toys / "images")
    sums = offer(mirror, images=content)
    (tmp_path / data.PETS).mkdir()
    (tmp_path / data.PETS / "images.tar.gz.part").write_bytes(content)
    folder = data.get_pets(tmp_path, mirror.url, quiet, sums, ())
    assert files(folder / "images") == files(toys / "images")
    assert mirror.sent == 0


def test_wrong_checksum_leaves_nothing(mirror, toys, tmp_path):
    sums = offer(mirror, images=packed(toys / "images"))
    mirror.files["images.tar.gz"] += b"!"
    with pytest.raises(data.Problem, match="checksum"):
        data.get_pets(tmp_path, mirror.url, quiet, sums, (0,))
    assert files(tmp_path) == {}


@pytest.mark.parametrize("status, pauses, requests", [(404, (0, 0), 1), (503, (0, 0), 3)])
def test_download_gives_up(mirror, tmp_path, status, pauses, requests):
    sums = offer(mirror, images=b"anything")
    mirror.status = status
    with pytest.raises(data.Problem, match=f"images.tar.gz.*{status}.*--url"):
        data.get_pets(tmp_path, mirror.url, quiet, sums, pauses)
    assert len(mirror.asked) == requests
    assert files(tmp_path) == {}


@pytest.mark.parametrize("name, kind, link", [
    ("../evil", tarfile.REGTYPE, ""), ("images/../../evil", tarfile.REGTYPE, ""),
    ("{outside}/evil", tarfile.REGTYPE, ""), ("images/evil", tarfile.SYMTYPE, "{outside}"),
    ("images/evil", tarfile.LNKTYPE, "{outside}/secret"), ("other/evil", tarfile.REGTYPE, ""),
    ("images/evil", tarfile.FIFOTYPE, ""),
])
def test_archive_that_leaves_its_folder_is_refused(mirror, tmp_path, name, kind, link):
    (tmp_path / "secret").write_text("secret")
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("images/good.jpg"))
        member = tarfile.TarInfo(name.format(outside=tmp_path))
        member.type, member.linkname = kind, link.format(outside=tmp_path)
        tar.addfile(member)
        tar.addfile(tarfile.TarInfo("images/evil/inside.jpg"))
    sums = offer(mirror, images=memory.getvalue())
    with pytest.raises(data.Problem, match="evil"):
        data.get_pets(tmp_path / "root", mirror.url, quiet, sums, ())
    assert not (tmp_path / "root" / data.PETS / "images").exists()
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.rglob("*.jpg"))


def test_archive_that_is_cut_off_is_refused(mirror, toys, tmp_path):
    sums = offer(mirror, images=packed(toys / "images")[:-3000])
    with pytest.raises(data.Problem, match="images.tar.gz"):
        data.get_pets(tmp_path, mirror.url, quiet, sums, ())
    assert not (tmp_path / data.PETS / "images").exists()


def test_mask_overlay_cutout_and_panel(tmp_path):
    photo = Image.fromarray(np.full((90, 120, 3), 90, np.uint8))
    mask = np.zeros((90, 120), bool)
    mask[20:70, 30:90] = True
    data.save_picture(data.picture(mask), tmp_path / "mask.png")
    opened = Image.open(tmp_path / "mask.png")
    assert opened.size == photo.size and np.array_equal(np.asarray(opened), mask * np.uint8(255))

    shown = np.asarray(data.overlay(photo, mask)).astype(int)
    assert shown.shape == (90, 120, 3)
    assert (shown[:15] == 90).all() and (shown[45, 60] != 90).any()
    assert np.abs(shown[20, 60] - shown[45, 60]).max() > 50  # the contour is seen on either side
    assert np.abs(shown[19, 60] - shown[10, 60]).max() > 50

    alone = np.asarray(data.cutout(photo, mask))
    assert np.array_equal(alone[..., 3], mask * 255)
    assert (alone[mask][:, :3] == 90).all()

    three = data.panel(photo, mask, ~mask, "caption", side=60)
    two = data.panel(photo, None, mask, "caption", side=60)
    assert three.height == two.height >= 60
    assert three.width >= 240 > two.width >= 160
    assert data.gallery([three] * 5).width > 2 * three.width
    assert data.bounding_box(mask) == (30, 20, 90, 70)
    assert data.bounding_box(mask & ~mask) == (None,) * 4


def history(epochs, **columns):
    """Rows of metrics; each column is a function of how far the run is, 0 to 1."""
    return [{"epoch": i + 1, **{name: curve(i / max(1, epochs - 1))
                                for name, curve in columns.items()}} for i in range(epochs)]


def near(pixels, colour):
    return np.abs(pixels.astype(int) - colour).sum(axis=2) < 60


def test_curves_run_where_the_numbers_say(tmp_path):
    rows = history(41, train_dice=lambda t: t, valid_dice=lambda t: 0.75,
                   train_loss=lambda t: 1 - t, valid_loss=lambda t: 0.25)
    data.draw_curves(tmp_path / "curves.png", {"run": rows})
    image = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert image.shape[1] == 1200
    for half, rising in ((image[:, :600], False), (image[:, 600:], True)):
        # the lowest pixel of a colour in a column is the curve's: the legend stands above it
        lowest = [{x: np.flatnonzero(column)[-1] for x, column in enumerate(near(half, colour).T)
                   if column.any()} for colour in data.LINES[:2]]
        train, valid = lowest
        first, last = min(train), max(train)
        assert last - first > 400
        assert (train[last - 5] < train[first + 5]) == rising
        # in the last 40 %, where no note of the best epoch is, they meet at 75 % of the way
        right = [x for x in train if x in valid and x > first + 0.6 * (last - first)]
        meeting = min(right, key=lambda x: abs(train[x] - valid[x]))
        assert (meeting - first) / (last - first) == pytest.approx(0.75, abs=0.02)


def test_curves_of_any_run_can_be_drawn(tmp_path):
    names = ("train_dice", "valid_dice", "train_loss", "valid_loss")
    one = history(1, **dict.fromkeys(names, lambda t: 0.5))
    many = history(300, **dict.fromkeys(names, lambda t: 1000 * t))
    for runs in ({"one": one}, {"many": many}, {"a long name " * 5 + str(i): many
                                                for i in range(7)}):
        data.draw_curves(tmp_path / "curves.png", runs)
        image = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
        for colour in data.LINES[:2 if len(runs) == 1 else 6]:
            assert near(image, colour).sum() > 30


def test_ticks_are_round_and_cover():
    for low, high in ((0, 1), (0.31, 0.94), (1, 20), (1, 300), (-2.5, 7), (0.9301, 0.9317)):
        found = data.ticks(low, high)
        steps = np.diff(found)
        assert 2 <= len(found) <= 9
        assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
        assert steps == pytest.approx(np.full(len(steps), steps[0]), rel=1e-6)
        assert f"{steps[0]:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")


# ---------------------------------------------------------------------------------------- petseg


def test_scores_against_slow_loops():
    random = torch.Generator().manual_seed(0)
    mask = torch.randint(2, (5, 6, 7), generator=random).bool()
    target = torch.randint(2, (5, 6, 7), generator=random).to(torch.uint8)
    target[torch.rand(target.shape, generator=random) < 0.2] = 255
    mask[3], target[3] = False, 0  # nothing to be found, nothing found: 1
    target[4] = 0  # nothing to be found, something found: 0
    counts, expected, dices, ious = petseg.confusion(mask, target), [], [], []
    for b in range(5):
        tally = {pair: 0 for pair in ((True, 1), (True, 0), (False, 1), (False, 0))}
        for y in range(6):
            for x in range(7):
                if target[b, y, x] != 255:
                    tally[mask[b, y, x].item(), target[b, y, x].item()] += 1
        expected.append(list(tally.values()))
        tp, fp, fn, tn = expected[-1]
        dices.append(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1)
        ious.append(tp / (tp + fp + fn) if tp + fp + fn else 1)
    tp, fp, fn, tn = map(sum, zip(*expected))
    assert counts.tolist() == expected
    assert dices[3:] == [1, 0]
    assert petseg.scores(counts) == pytest.approx({
        "dice": sum(dices) / 5, "iou": sum(ious) / 5, "images": 5,
        "dataset_dice": 2 * tp / (2 * tp + fp + fn), "dataset_iou": tp / (tp + fp + fn),
        "precision": tp / (tp + fp), "recall": tp / (tp + fn),
        "accuracy": (tp + tn) / (tp + fp + fn + tn)})


def test_score_of_a_split_counts_each_image_once(toys, tmp_path):
    torch.manual_seed(0)
    split = data.open_split(toys, "test", (32, 32), tmp_path, quiet)
    network = layers.UNet(width=2).eval()
    about = {"mean": data.MEAN, "std": data.STD}
    segmenter = petseg.Segmenter(network, about, torch.device("cpu"), "fp32")
    total, dices = 0.0, []
    for i in range(10):
        images, labels = data.load(split, np.array([i]))
        logits, target = petseg.predict(segmenter, images), data.targets(labels)
        total += layers.bce_dice_loss(logits, target).item()
        both = ((logits[0, 0] >= 0) & (target[0] == 1)).sum().item()
        dices.append(2 * both / ((logits >= 0).sum() + target.sum()).item())
    for batch in (4, 10):
        loss, counts = petseg.score_split(segmenter, split, batch)
        assert loss == pytest.approx(total / 10, rel=1e-4)
        assert petseg.scores(counts)["dice"] == pytest.approx(sum(dices) / 10, abs=1e-3)
    both_ways = segmenter._replace(tta=True)
    torch.testing.assert_close(petseg.predict(both_ways, images.flip(3)),
                               petseg.predict(both_ways, images).flip(3))


def test_schedules_at_their_corners():
    run = Namespace(lr=0.5, warmup=2, epochs=10, gamma=0.9)  # of 5 steps an epoch

    def rates(name, **changes):
        changed = Namespace(**{**vars(run), **changes})
        return [petseg.SCHEDULES[name](changed, step, 5, []) for step in range(50)]

    assert rates("constant") == [0.5] * 50
    assert rates("exponential") == pytest.approx([0.5 * 0.9 ** (step // 5) for step in range(50)])
    cosine = rates("cosine")
    assert cosine == sorted(cosine[:10]) + sorted(cosine[10:], reverse=True)
    assert 0 < cosine[0] <= 0.05 and 0 < cosine[49] < 0.001
    assert (cosine[10], cosine[30]) == pytest.approx((0.5, 0.25))
    assert rates("cosine", warmup=0)[0] == 0.5
    root = rates("inverse_sqrt")
    assert (root[4], root[9], root[39]) == pytest.approx((0.125, 0.5, 0.25))
    assert max(root) == root[9] and rates("inverse_sqrt", warmup=0)[0] == 0.5


def test_plateau_halves_after_three_epochs_without_improvement():
    def rate(dices, lr=0.5):
        return petseg.plateau(Namespace(lr=lr), 0, 5, dices)

    assert rate([]) == rate([0.5, 0.5, 0.4]) == rate([0.1, 0, 0, 0.2, 0.2, 0.2]) == 0.5
    assert rate([0.5, 0.5, 0.4, 0.3]) == rate([0.5, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6]) == 0.25
    assert rate([0.5] * 7) == 0.125
    assert rate([0.5] * 300) == 1e-6
    assert rate([0.5] * 300, lr=1e-7) == 1e-7


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    """All that a run has learned: each tensor of both checkpoints, by name."""
    last = torch.load(folder / "last.pt", weights_only=True)
    best = torch.load(folder / "best.pt", weights_only=True)
    found = {f"{part} {name}": tensor for part, tensors in (
        ("network", last["network"]), ("average", last["average"]), ("best", best["weights"]))
        for name, tensor in tensors.items()}
    return found | {f"moment {number} {name}": tensor
                    for number, state in last["optimizer"]["state"].items()
                    for name, tensor in state.items()}


def assert_same_run(one, other):
    """Bit-identical weights, and the same metrics but for the times."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    one, other = read_rows(one / "metrics.csv"), read_rows(other / "metrics.csv")
    for row in one + other:
        del row["seconds"], row["images_per_second"]
    assert one == other


@pytest.fixture(scope="session")
def trained(root):
    """For each network what train --json answered, of a run to be read only."""
    return {model: answer("train", model, "--root", root, "--out", root / "runs", *TINY,
                          "--epochs", 2, "--schedule", "constant") for model in petseg.MODELS}


@pytest.fixture(scope="session")
def best(trained):
    """The best.pt of a U-Net."""
    return Path(trained["unet"]["run"]) / "best.pt"


@pytest.mark.parametrize("model", petseg.MODELS)
def test_train_and_eval(model, trained, root, tmp_path):
    result, folder = trained[model], Path(trained[model]["run"])
    assert folder.parent == root / "runs" and folder.name.startswith(f"toy-{model}-")
    assert {"config.json", "metrics.csv", "last.pt", "best.pt", "curves.png", "samples.png",
            "test.json", "worst.png"} == {path.name for path in folder.iterdir()}
    rows = read_rows(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_loss", "train_dice", "train_iou", "valid_loss", "valid_dice", "valid_iou", "lr",
            "seconds", "images_per_second"} <= rows[0].keys()
    assert result["valid_dice"] == max(float(row["valid_dice"]) for row in rows)
    assert json.loads((folder / "config.json").read_text())["width"] == 2
    assert (result["split"], result["images"]) == ("test", 10)
    assert json.loads((folder / "test.json").read_text()) == result
    assert Image.open(folder / "curves.png").width == 1200

    again = answer("eval", "--ckpt", folder / "best.pt", "--root", root, "--out", tmp_path)
    for measure in ("dice", "iou", "dataset_dice", "precision", "recall", "accuracy"):
        assert again[measure] == pytest.approx(result[measure], abs=1e-6)
    assert sum(breed["images"] for breed in again["breeds"].values()) == 10


def test_resume_with_more_epochs_equals_one_long_run(trained, root, tmp_path):
    result = answer("train", "unet", "--root", root, "--out", tmp_path, *TINY, "--epochs", 1,
                    "--schedule", "constant", "--save-every", 1)
    folder = Path(result["run"])
    assert (folder / "epoch-1.pt").is_file()
    for _ in range(2):  # the second time nothing is left to do, and that is no fault
        answer("train", "--resume", folder, "--epochs", 2)
    assert_same_run(folder, Path(trained["unet"]["run"]))
    said = refused("train", "--resume", folder, "--lr", 0.1)
    assert "lr" in said and "0.1" in said and "0.002" in said


LONG = ("--epochs", 5, "--batch", 2, "--repeat", 3, "--dropout", 0.3, "--border", "random",
        "--schedule", "plateau", "--accumulate", 2)


@pytest.fixture(scope="session")
def undisturbed(root):
    """The folder of a run that was never stopped."""
    return Path(answer("train", "unet", "--root", root, "--out", root / "long", *TINY, *LONG)["run"])


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_resumed_equals_undisturbed(how, undisturbed, root, tmp_path):
    words = ["train", "unet", "--root", root, "--out", tmp_path, *TINY, *LONG]
    with subprocess.Popen([sys.executable, HERE / "petseg.py", *map(str, words)],
                          stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("*/samples.png")):  # the first epoch's last file
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
        said = process.communicate()[1]
    [folder] = tmp_path.iterdir()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert f"train --resume {folder}" in said.splitlines()[-1]
        assert "Traceback" not in said
    assert len(read_rows(folder / "metrics.csv")) < 5
    run("train", "--resume", folder)
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize("batch", [8, 64])
def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(batch, root, tmp_path):
    # the first epoch is sound, then the learning rate is 10^27
    said = refused("train", "unet", "--root", root, "--out", tmp_path, *TINY, "--epochs", 4,
                   "--batch", batch, "--schedule", "exponential", "--gamma", 1e30, "--clip", 0)
    assert "nan" in said or "inf" in said
    assert "--lr" in said
    [folder] = tmp_path.iterdir()
    assert len(read_rows(folder / "metrics.csv")) == 1
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_infer_takes_any_pictures(best, toys, tmp_path):
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "out"
    a.mkdir()
    b.mkdir()
    RED_BLUE.save(a / "cat.jpg")
    GREY.resize((300, 7)).save(b / "cat.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    RED_BLUE.save(b / "turned.jpg", exif=exif)
    (b / "broken.jpg").write_bytes(b"no picture")
    known = sorted((toys / "images").iterdir())[0]
    said = run("infer", "--ckpt", best, a / "cat.jpg", b, known, "--out", out, "--json", code=2)
    assert "broken.jpg" in said.stderr.splitlines()[-1]
    assert json.loads(said.stdout.splitlines()[-1])["images"] == 4
    sizes = {"cat": (40, 30), "cat-2": (300, 7), "turned": (30, 40),
             known.stem: Image.open(known).size}
    kinds = {"mask": "L", "overlay": "RGB", "cutout": "RGBA"}
    for name, size in sizes.items():
        for kind, mode in kinds.items():
            picture = Image.open(out / f"{name}_{kind}.png")
            assert (picture.size, picture.mode) == (size, mode)
    assert len(list(out.iterdir())) == 4 * 3 + 1
    rows = read_rows(out / "predictions.csv")
    assert [Path(row["file"]).name for row in rows] == ["cat.jpg", "cat.png", "turned.jpg",
                                                       known.name]
    for row, name in zip(rows, sizes):
        mask = np.asarray(Image.open(out / f"{name}_mask.png")) > 0
        assert float(row["pet_share"]) == pytest.approx(mask.mean())
        assert bool(row["dice"]) == (name == known.stem)


def test_infer_without_pictures_shows_the_test_split(best, root, tmp_path):
    result = answer("infer", "--ckpt", best, "--root", root, "--out", tmp_path, "--tta",
                    "--threshold", 0)
    rows = read_rows(tmp_path / "predictions.csv")
    assert result["images"] == len(rows) == len(list(tmp_path.glob("*_panel.png"))) == 10
    assert all(float(row["pet_share"]) == 1 for row in rows)  # as the threshold is 0
    assert result["dice"] == pytest.approx(sum(float(row["dice"]) for row in rows) / 10)


def test_compare(trained, tmp_path):
    runs = [result["run"] for result in trained.values()]
    result = answer("compare", *runs, "--out", tmp_path / "both.png")
    assert Image.open(tmp_path / "both.png").width == 1200
    assert [row["test_dice"] for row in result["runs"]] == [t["dice"] for t in trained.values()]
    table = run("compare", *runs, "--out", tmp_path / "both.png").stdout
    assert all(Path(folder).name in table for folder in runs)


def test_data_check(root, pets):
    result = answer("data", "check", "--data", "toy", "--root", root)
    assert result["pictures"] == {"train": 36, "valid": 4, "test": 10}
    name = data.list_samples(pets, "test")[2].name
    (pets / "images" / f"{name}.jpg").write_bytes(b"spoilt")
    assert f"{name}.jpg" in refused("data", "check", "--data", pets)


def test_without_network_auto_takes_the_toys(toys, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    assert url in refused("data", "get", "--root", tmp_path, "--url", url)
    refused("train", "unet", "--data", "pets", "--root", tmp_path, "--url", url)
    shutil.copytree(toys, tmp_path / data.TOYS)
    done = run("train", "unet", "--root", tmp_path, "--url", url, "--size", 32, "--width", 2,
               "--epochs", 1, "--out", tmp_path / "runs", "--json")
    assert Path(json.loads(done.stdout)["run"]).name.startswith("toy-unet-")
    assert [line[:4] for line in done.stderr.splitlines()[:3]] == ["!!! "] * 3


@pytest.mark.parametrize("model", petseg.MODELS)
def test_summary(model):
    result = answer("summary", model)
    assert result["parameters"] == count(layers.MODELS[model]())
    assert sum(layer["parameters"] for layer in result["layers"]) == result["parameters"]
    sums = {"unet": 64 * 3 * 9 * 256 * 256, "resnet34_unet": 64 * 3 * 49 * 128 * 128}
    assert result["layers"][0]["multiply_adds"] == sums[model]


def test_bench(root):
    result = answer("bench", "unet", "--root", root, "--size", 32, "--width", 2, "--batch", 2,
                    "--rounds", 1)
    for way in ("plain", "petseg"):
        assert min(result[way][key] for key in ("train", "infer", "memory")) > 0


def test_help_comes_without_torch():
    for words in (["--help"], *([command, "--help"] for command in petseg.COMMANDS)):
        done = subprocess.run([sys.executable, "-X", "importtime", HERE / "petseg.py", *words],
                              capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("usage:")
        assert "torch" not in done.stderr and "argparse" in done.stderr


class Code:
    """Pickled, this is code that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_no_checkpoint_is_refused(best, tmp_path):
    contents = {"text": b"hello", "empty": b"", "random": np.random.default_rng(0).bytes(5000)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"petseg": "network", "weights": Code(tmp_path / "executed")}, tmp_path / "code")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "alien")
    for name in (*contents, "code", "alien", "missing"):
        assert str(tmp_path / name) in refused("infer", "--ckpt", tmp_path / name, tmp_path)
    assert not (tmp_path / "executed").exists()
    assert "best.pt" in refused("eval", "--ckpt", best.with_name("last.pt"))
    shutil.copy(best, tmp_path / "last.pt")
    assert "last.pt" in refused("train", "--resume", tmp_path)


@pytest.mark.parametrize("words, expected", [
    ("train vgg", "vgg"),
    ("train", "unet"),
    ("train unet --size 31", "31"),
    ("train unet --epochs 0", "epochs"),
    ("train unet --data {folder}/nowhere", "nowhere"),
    ("train unet --data {folder}/empty", "trainval.txt"),
    ("train unet --data {folder}/wrong --root {folder}", "expected .*1 = pet"),
    ("eval --ckpt {best} --data {folder}/no-test", "--split valid"),
    ("eval --ckpt {best} --threshold 2", "threshold"),
    ("infer --ckpt {best} {folder}/nowhere", "nowhere"),
    ("infer --ckpt {best} {folder}/empty", "empty"),
    ("infer --ckpt {best} {folder} --save drawing", "drawing"),
    ("compare {folder}/empty", "empty"),
])
def test_what_a_user_gets_wrong(words, expected, best, pets, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(pets, tmp_path / "no-test")
    (tmp_path / "no-test" / "annotations" / "test.txt").unlink()
    for trimap in (pets / "annotations" / "trimaps").iterdir():
        Image.fromarray(np.asarray(Image.open(trimap)) * 50).save(trimap)
    pets.rename(tmp_path / "wrong")
    words = words.format(folder=tmp_path, best=best).split()
    where = {"train": tmp_path / "runs", "eval": tmp_path, "infer": tmp_path}.get(words[0])
    said = refused(*words, *(["--out", where] if where else []))
    assert re.search(expected, said)
    assert not (tmp_path / "runs").exists()
