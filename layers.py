"""layers.py: two networks for semantic segmentation and their losses, by hand in plain torch.

Read from top to bottom: the blocks, the two networks (each is an encoder that halves the picture
and a decoder that doubles it again), the initialisation, what is done for use, the losses.

Shapes in the comments are (batch, channels, height, width) for an input of (B, 3, H, W), width 64.
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------- blocks


class BatchNorm(nn.BatchNorm2d):
    """Batch norm; a single value a channel has no variance and goes by the running statistics."""

    def forward(self, x):
        by_batch = self.training and x.numel() > x.shape[1]
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            by_batch, self.momentum, self.eps)


class ConvBN(nn.Module):
    """A convolution that keeps the size (or divides it by `stride`), then batch norm."""

    def __init__(self, in_channels, out_channels, kernel=3, stride=1):
        super().__init__()
        # no bias: the batch norm that follows subtracts the mean and adds its own
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.bn = BatchNorm(out_channels)

    def forward(self, x):
        return self.bn(self.conv(x))


class ConvBNReLU(ConvBN):
    """Convolution, batch norm, ReLU."""

    def forward(self, x):
        return F.relu(super().forward(x), inplace=True)


class DoubleConv(nn.Sequential):
    """Two 3×3 ConvBNReLU in a row, the working part of every level of a U-Net."""

    def __init__(self, in_channels, out_channels):
        super().__init__(ConvBNReLU(in_channels, out_channels),
                         ConvBNReLU(out_channels, out_channels))


class BasicBlock(nn.Module):
    """ResNet's basic block: relu(F(x) + x) with F = conv-bn-relu-conv-bn (the paper's figure 2).

    Where stride or channels change the shape, a 1×1 convolution brings x to it (option B).
    """

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = ConvBNReLU(in_channels, out_channels, stride=stride)
        self.conv2 = ConvBN(out_channels, out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else ConvBN(in_channels, out_channels, 1, stride)

    def forward(self, x):
        residual = self.conv2(self.conv1(x))
        residual += self.shortcut(x)
        return F.relu(residual, inplace=True)


def recomputed(function, x):
    """function(x), of which only x is kept until the backward pass, which computes the rest again.
    Without gradients there is no such pass, and under eight million numbers too little to save for
    the time that it takes."""
    if not torch.is_grad_enabled() or x.numel() < 2**23:
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


class MaxPool(nn.MaxPool2d):
    """Max pooling that does not keep where its maxima were, at 8 bytes each."""

    def forward(self, x):
        # 0.5 GB less of 6.7 in a step of UNet of width 64 with 32 pictures of 256×256
        return recomputed(super().forward, x)


class TransposedConv(nn.ConvTranspose2d):
    """The 2×2 convolution backwards with stride 2: each pixel becomes four, each of which is a
    matrix product of its own with the pixel's channels. Written as that one product, a training
    step of UNet takes 5% less time on two cores than with torch's conv_transpose2d."""

    def forward(self, x):
        batch, channels, height, width = x.shape
        weight = self.weight.permute(2, 3, 1, 0).reshape(-1, channels)     # (2 · 2 · out, in)
        y = F.linear(x.permute(0, 2, 3, 1), weight, self.bias.repeat(4))   # (B, H, W, 2 · 2 · out)
        out = self.out_channels
        y = y.view(batch, height, width, 2, 2, out).transpose(2, 3)        # (B, H, 2, W, 2, out)
        return y.reshape(batch, 2 * height, 2 * width, out).permute(0, 3, 1, 2)


class UpConcat(nn.Module):
    """One step of a decoder: double the size, put the encoder's `skip` beside it, convolve twice.

    `up` is "transpose" (a learned 2×2 convolution backwards) or "bilinear" (no parameters).
    """

    def __init__(self, in_channels, skip_channels, out_channels, up="transpose"):
        super().__init__()
        if up == "transpose":
            self.enlarge = TransposedConv(in_channels, out_channels, 2, stride=2)
            in_channels = out_channels
        else:
            self.enlarge = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        # convolving the two side by side is convolving each by itself and adding up, without the
        # copy: a step on two cores takes 2% less time (ResNet34UNet 5%) and 7% less memory
        self.of_x = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        if skip_channels:
            self.of_skip = nn.Conv2d(skip_channels, out_channels, 3, padding=1, bias=False)
        self.bn = BatchNorm(out_channels)
        self.conv = ConvBNReLU(out_channels, out_channels)

    def forward(self, x, skip):
        def enlarge_and_convolve(x):
            x = self.enlarge(x)
            # where an odd side was halved, one row or column is over or missing
            rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            if rows or columns:
                x = F.pad(x, (0, columns, 0, rows))  # a negative number of rows cuts them off
            return self.of_x(x)

        x = recomputed(enlarge_and_convolve, x)
        if skip.shape[1]:
            x += self.of_skip(skip)
        return self.conv(F.relu(self.bn(x), inplace=True))


# -------------------------------------------------------------------------------------- networks


class EncoderDecoder(nn.Module):
    """What both networks do: go down the encoder, keep each level's output as the skip for the
    decoder's step at the same size, go up again, end in one score (logit) per class and pixel."""

    def __init__(self, encoder, decoder, channels, classes, dropout):
        super().__init__()
        self.encoder = nn.ModuleList(encoder)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.ModuleList(decoder)
        self.head = nn.Conv2d(channels, classes, 1)
        self.recompute = False  # set it to True to train with less memory, more slowly
        # shapes alone have nothing to draw, and torch would import 800 modules for it: to infer one
        # picture takes 3.0 s of CPU time instead of 5.1, start included
        if not self.head.weight.is_meta:
            initialise(self)

    def forward(self, x):
        # for a doubling without a skip: a tensor with no channels, (B, 0, H, W), only for its size
        skips = [x[:, :0]]
        for stage in self.encoder:
            x = self.run(stage, x)
            skips.append(x)
        x = self.dropout(skips.pop())
        for up in self.decoder:
            x = self.run(up, x, skips.pop())
        return self.head(x)  # (B, classes, H, W)

    def run(self, stage, *inputs):
        """The output of a stage. With `recompute` nothing inside it is kept: the backward pass runs
        it a second time, on a copy of the batch norms' statistics, so that they move only once."""
        if not (self.recompute and self.training):
            return stage(*inputs)
        statistics = [{name: each.clone() for name, each in stage.named_buffers()}, {}]
        return checkpoint(lambda *again: functional_call(stage, statistics.pop(), again), *inputs,
                          use_reentrant=False, preserve_rng_state=False)


class UNet(EncoderDecoder):
    """U-Net with five levels, 64-128-256-512-1024 channels at width 64: 31,037,633 parameters.

    Two changes to the paper (Ronneberger, Fischer, Brox 2015, https://arxiv.org/abs/1505.04597,
    figure 1): batch norm after each convolution, where it has none, and padding 1, where it crops,
    so that output and input are of one size.
    """

    def __init__(self, in_channels=3, classes=1, width=64, up="transpose", dropout=0.0):
        c1, c2, c3, c4, c5 = (width * 2**level for level in range(5))
        encoder = [
            DoubleConv(in_channels, c1),                             # (B,   64, H,    W)
            nn.Sequential(MaxPool(2), DoubleConv(c1, c2)),           # (B,  128, H/2,  W/2)
            nn.Sequential(MaxPool(2), DoubleConv(c2, c3)),           # (B,  256, H/4,  W/4)
            nn.Sequential(MaxPool(2), DoubleConv(c3, c4)),           # (B,  512, H/8,  W/8)
            nn.Sequential(MaxPool(2), DoubleConv(c4, c5)),           # (B, 1024, H/16, W/16)
        ]
        decoder = [
            UpConcat(c5, c4, c4, up),                                # (B,  512, H/8,  W/8)
            UpConcat(c4, c3, c3, up),                                # (B,  256, H/4,  W/4)
            UpConcat(c3, c2, c2, up),                                # (B,  128, H/2,  W/2)
            UpConcat(c2, c1, c1, up),                                # (B,   64, H,    W)
        ]
        super().__init__(encoder, decoder, c1, classes, dropout)


def residual_stage(in_channels, out_channels, blocks, stride):
    """`blocks` BasicBlocks in a row, the first of which changes size and channels."""
    first = BasicBlock(in_channels, out_channels, stride)
    return [first] + [BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)]


class ResNet34UNet(EncoderDecoder):
    """The convolutions of ResNet-34 (21,284,672 parameters at width 64) under a U-Net's decoder.

    The encoder is that of He, Zhang, Ren, Sun 2015 (https://arxiv.org/abs/1512.03385, figure 3 and
    table 1) to the last detail, less its average pool and classifier; the decoder's last doubling
    has no skip, for none is that large.
    """

    def __init__(self, in_channels=3, classes=1, width=64, up="transpose", dropout=0.0):
        c1, c2, c3, c4 = (width * 2**level for level in range(4))
        pool = MaxPool(3, stride=2, padding=1)
        encoder = [
            ConvBNReLU(in_channels, c1, kernel=7, stride=2),         # (B,  64, H/2,  W/2)
            nn.Sequential(pool, *residual_stage(c1, c1, 3, 1)),      # (B,  64, H/4,  W/4)
            nn.Sequential(*residual_stage(c1, c2, 4, 2)),            # (B, 128, H/8,  W/8)
            nn.Sequential(*residual_stage(c2, c3, 6, 2)),            # (B, 256, H/16, W/16)
            nn.Sequential(*residual_stage(c3, c4, 3, 2)),            # (B, 512, H/32, W/32)
        ]
        half = max(1, c1 // 2)
        decoder = [
            UpConcat(c4, c3, c3, up),                                # (B, 256, H/16, W/16)
            UpConcat(c3, c2, c2, up),                                # (B, 128, H/8,  W/8)
            UpConcat(c2, c1, c1, up),                                # (B,  64, H/4,  W/4)
            UpConcat(c1, c1, c1, up),                                # (B,  64, H/2,  W/2)
            UpConcat(c1, 0, half, up),                               # (B,  32, H,    W)
        ]
        super().__init__(encoder, decoder, half, classes, dropout)


def convolutions(block):
    """The convolutions whose sum goes into the batch norm of a ConvBN or an UpConcat."""
    return [part for part in block.children() if isinstance(part, nn.Conv2d)]


def initialise(network):
    """He's initialisation (https://arxiv.org/abs/1502.01852): weights of variance 2 / (number of
    inputs to one output) keep the signal's size through any number of ReLU layers. The last batch
    norm of a residual block starts at zero, so that each block starts as the identity
    (https://arxiv.org/abs/1706.02677, section 5.1)."""
    for module in reversed(list(network.modules())):  # what is inside before what is around it
        if isinstance(module, (nn.Conv2d, TransposedConv)):
            # an output of a transposed convolution has one tap of each channel
            taps = 1 if isinstance(module, TransposedConv) else math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / (module.in_channels * taps)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, UpConcat):  # two convolutions add up to one output
            parts = convolutions(module)
            for part in parts:
                part.weight.data *= math.sqrt(part.in_channels / sum(p.in_channels for p in parts))
        elif isinstance(module, BasicBlock):
            nn.init.zeros_(module.conv2.bn.weight)


def folded(network, dtype=torch.float32):
    """A copy that predicts faster: each batch norm, by now a fixed scale and shift, becomes part of
    the convolution before it: γ (w ∗ x − μ) / σ + β = (γ w / σ) ∗ x + (β − γ μ / σ)."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for block in network.modules():
        if isinstance(block, (ConvBN, UpConcat)):
            bn, convs = block.bn, convolutions(block)
            scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            for conv in convs:
                conv.weight.mul_(scale.view(-1, 1, 1, 1))
            convs[0].bias = nn.Parameter(bn.bias - bn.running_mean * scale, requires_grad=False)
            block.bn = nn.Identity()
    return network.to(dtype)


def probabilities(logits):
    """Logits (B, C, H, W) to the probability of each class, with one logit to that of class 1."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


class Portable(nn.Module):
    """A network as it is taken elsewhere: with the normalisation of its pictures before it, which
    are (B, 3, H, W) in 0..1, and probabilities instead of logits behind it."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images):
        return probabilities(self.network((images - self.mean) / self.std))


MODELS = {"unet": UNet, "resnet34_unet": ResNet34UNet}

# ---------------------------------------------------------------------------------------- losses
# logits (B, C, H, W) of any size; target (B, H, W) holds class numbers, and `ignore` where a pixel
# is not to count. C = 1 means two classes by one logit: the sigmoid of z is the probability of 1.


def finite(logits):
    """Logits in fp32, infinite ones made finite: inf − inf would be nan."""
    return logits.float().clamp(-1e5, 1e5)


def bce_loss(logits, target, weights=None, ignore=255):
    """Mean of −log p(right class) over the pixels that count: (binary) cross-entropy. A pixel
    counts as much as the weight of its class.

    One logit: −y log σ(z) − (1 − y) log(1 − σ(z)) = log(1 + exp((1 − 2y) z)), y in {0, 1}.
    Several:   log Σ_c exp(z_c) − z_y. Neither form overflows, however large a logit is.
    """
    logits, counts = finite(logits), target != ignore
    right = torch.where(counts, target, 0).long()                    # (B, H, W)
    if logits.shape[1] == 1:
        loss = F.softplus((1 - 2 * right) * logits[:, 0])
    else:
        loss = logits.logsumexp(dim=1) - logits.gather(1, right.unsqueeze(1)).squeeze(1)
    if weights is not None:
        counts = counts * weights[right]
    return (loss * counts).sum() / counts.sum().clamp(min=1e-6)


def dice_loss(logits, target, weights=None, ignore=255, smooth=1.0):
    """1 − soft Dice, mean over images and classes (https://arxiv.org/abs/1606.04797), of which each
    counts alike, whatever their `weights`.

    Dice = (2 Σ p y + s) / (Σ p + Σ y + s), summed over an image's pixels that count;
    s = 1 makes an empty prediction of an empty mask right, and the gradient there finite.
    """
    p = probabilities(finite(logits))
    first = 1 if p.shape[1] == 1 else 0  # with one logit the background has no channel of its own
    classes = torch.arange(first, first + p.shape[1], device=p.device).view(1, -1, 1, 1)
    y = target.unsqueeze(1) == classes                               # (B, C, H, W)
    p = torch.where(target.unsqueeze(1) != ignore, p, 0)
    overlap = (p * y).sum(dim=(2, 3))                                # (B, C)
    total = p.sum(dim=(2, 3)) + y.sum(dim=(2, 3))
    return 1 - ((2 * overlap + smooth) / (total + smooth)).mean()


def bce_dice_loss(logits, target, weights=None):
    """BCE + Dice: the first pulls every pixel, the second the figure that is scored."""
    return bce_loss(logits, target, weights) + dice_loss(logits, target)


LOSSES = {"bce_dice": bce_dice_loss, "bce": bce_loss, "dice": dice_loss}
