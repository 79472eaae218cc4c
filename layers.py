"""layers.py: the mathematics: two networks for semantic segmentation, losses, metrics, EMA,
schedules, Muon, the guided filter, and at the end what is written for speed or for export.

Shapes in the comments are (batch, channels, height, width) for an input of (B, 3, H, W), width 64.
"""
import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = 255  # pixels with this target are ignored by losses and metrics
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of --precision

# ---------------------------------------------------------------------------------------- blocks
class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that uses its running statistics where a channel has one value, or none."""

    def forward(self, x):
        use_batch_stats = self.training and x.numel() > x.shape[1]
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            use_batch_stats, self.momentum, self.eps)

class ConvBN(nn.Module):
    """Convolution that keeps the size (or divides it by `stride`), then batch norm."""

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1):
        super().__init__()
        # no bias: the batch norm that follows subtracts the mean and adds its own
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2,
                              bias=False)
        self.bn = BatchNorm(out_channels)

    def forward(self, x):
        return self.bn(self.conv(x))

class ConvBNReLU(ConvBN):
    """Convolution, batch norm, ReLU."""

    def forward(self, x):
        return F.relu(super().forward(x), inplace=True)

class DoubleConv(nn.Sequential):
    """Two 3×3 ConvBNReLU in a row: what a U-Net does at each resolution."""

    def __init__(self, in_channels, out_channels):
        super().__init__(ConvBNReLU(in_channels, out_channels),
                         ConvBNReLU(out_channels, out_channels))

class BasicBlock(nn.Module):
    """ResNet's basic block: relu(F(x) + x) with F = conv-bn-relu-conv-bn (figure 2 of the paper);
    where stride or channels change the shape, the shortcut is a 1×1 convolution (option B)."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = ConvBNReLU(in_channels, out_channels, stride=stride)
        self.conv2 = ConvBN(out_channels, out_channels)
        identity = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if identity else ConvBN(in_channels, out_channels, 1, stride)

    def forward(self, x):
        residual = self.conv2(self.conv1(x))
        residual += self.shortcut(x)
        return F.relu(residual, inplace=True)

class UpConcat(nn.Module):
    """One decoder step: upsample x by 2, concatenate the encoder's skip, convolve twice. `upsample`
    is "transpose" (a learned 2×2 transposed convolution) or "bilinear"."""

    def __init__(self, in_channels, skip_channels, out_channels, upsample="transpose"):
        super().__init__()
        if upsample == "transpose":
            self.up = TransposedConv(in_channels, out_channels, 2, stride=2)
            in_channels = out_channels
        else:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.conv = DoubleConv(skip_channels + in_channels, out_channels)

    def forward(self, x, skip=None):
        x = self.up(x)                                               # (B, C, 2H, 2W)
        if skip is not None:
            # where the encoder halved an odd size, x is one row or column short, or over
            dh, dw = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            if dh or dw:
                x = F.pad(x, (0, dw, 0, dh))  # a negative pad crops
            x = torch.cat((skip, x), dim=1)                          # (B, skip + C, 2H, 2W)
        return self.conv(x)

# -------------------------------------------------------------------------------------- networks
class EncoderDecoder(nn.Module):
    """The U shape: encoder stages halve the resolution (UNet's first keeps it) and leave skips;
    decoder steps double it and take the skip of their size; a 1×1 convolution gives logits."""

    def __init__(self, encoder, decoder, channels, classes, dropout):
        super().__init__()
        self.encoder = nn.ModuleList(encoder)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.ModuleList(decoder)
        self.head = nn.Conv2d(channels, classes, 1)
        self.gradient_checkpointing = False  # True: less memory, a quarter more time
        # on the meta device there is nothing to initialize (and trying costs 2 s of imports)
        if not self.head.weight.is_meta:
            init_weights(self)

    def forward(self, x):
        height, width = x.shape[2:]
        skips = []
        for stage in self.encoder:
            x = self.forward_stage(stage, x)
            skips.append(x)
        x = self.dropout(skips.pop())
        for up in self.decoder:  # the last step of the ResNet has no skip
            x = self.forward_stage(up, x, skips.pop() if skips else None)
        return self.head(x)[..., :height, :width]                    # (B, classes, H, W)

    def forward_stage(self, stage, *inputs):
        """stage(*inputs). Gradient checkpointing computes it a second time, in backward: then on a
        copy of the BatchNorm statistics, so that a step updates the stage's own only once."""
        if not (self.gradient_checkpointing and self.training):
            return stage(*inputs)
        buffers = iter([{}, {name: buffer.clone() for name, buffer in stage.named_buffers()}])
        return checkpoint(lambda *args: functional_call(stage, next(buffers), args), *inputs,
                          use_reentrant=False, preserve_rng_state=False)

class UNet(EncoderDecoder):
    """U-Net (Ronneberger, Fischer, Brox 2015, https://arxiv.org/abs/1505.04597, figure 1) with
    batch norm, and padding to keep the size; 31,037,633 parameters at width 64."""

    def __init__(self, in_channels=3, classes=1, width=64, upsample="transpose", dropout=0.0):
        c1, c2, c3, c4, c5 = (width * 2**level for level in range(5))
        encoder = [
            DoubleConv(in_channels, c1),                             # (B,   64, H,    W)
            nn.Sequential(nn.MaxPool2d(2), DoubleConv(c1, c2)),      # (B,  128, H/2,  W/2)
            nn.Sequential(nn.MaxPool2d(2), DoubleConv(c2, c3)),      # (B,  256, H/4,  W/4)
            nn.Sequential(nn.MaxPool2d(2), DoubleConv(c3, c4)),      # (B,  512, H/8,  W/8)
            nn.Sequential(nn.MaxPool2d(2), DoubleConv(c4, c5)),      # (B, 1024, H/16, W/16)
        ]
        decoder = [
            UpConcat(c5, c4, c4, upsample),                          # (B,  512, H/8,  W/8)
            UpConcat(c4, c3, c3, upsample),                          # (B,  256, H/4,  W/4)
            UpConcat(c3, c2, c2, upsample),                          # (B,  128, H/2,  W/2)
            UpConcat(c2, c1, c1, upsample),                          # (B,   64, H,    W)
        ]
        super().__init__(encoder, decoder, c1, classes, dropout)

def residual_stage(in_channels, out_channels, blocks, stride):
    """`blocks` BasicBlocks in a row; the first one changes resolution and channels."""
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride),
                         *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))

class ResNet34UNet(EncoderDecoder):
    """ResNet-34 without its classifier (He, Zhang, Ren, Sun 2015, https://arxiv.org/abs/1512.03385,
    figure 3 and table 1; 21,284,672 parameters at width 64) under the decoder of a U-Net."""

    def __init__(self, in_channels=3, classes=1, width=64, upsample="transpose", dropout=0.0):
        c1, c2, c3, c4 = (width * 2**level for level in range(4))
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        encoder = [
            ConvBNReLU(in_channels, c1, kernel_size=7, stride=2),    # (B,  64, H/2,  W/2)
            nn.Sequential(pool, *residual_stage(c1, c1, 3, 1)),      # (B,  64, H/4,  W/4)
            residual_stage(c1, c2, 4, 2),                            # (B, 128, H/8,  W/8)
            residual_stage(c2, c3, 6, 2),                            # (B, 256, H/16, W/16)
            residual_stage(c3, c4, 3, 2),                            # (B, 512, H/32, W/32)
        ]
        decoder = [
            UpConcat(c4, c3, c3, upsample),                          # (B, 256, H/16, W/16)
            UpConcat(c3, c2, c2, upsample),                          # (B, 128, H/8,  W/8)
            UpConcat(c2, c1, c1, upsample),                          # (B,  64, H/4,  W/4)
            UpConcat(c1, c1, c1, upsample),                          # (B,  64, H/2,  W/2)
            UpConcat(c1, 0, c1 // 2, upsample),                      # (B,  32, H,    W)
        ]
        super().__init__(encoder, decoder, c1 // 2, classes, dropout)

MODELS = {"unet": UNet, "resnet34_unet": ResNet34UNet}

def init_weights(model):
    """He initialization (https://arxiv.org/abs/1502.01852): variance 2 / fan_in. Residual blocks
    start as their shortcut: their last γ is 0 (https://arxiv.org/abs/1706.02677, 5.1)."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            # kernel = stride: an output of a transposed convolution sees one weight per channel
            kernel_area = module.kernel_size[0] ** 2 if isinstance(module, nn.Conv2d) else 1
            nn.init.normal_(module.weight, std=math.sqrt(2 / (module.in_channels * kernel_area)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, BasicBlock):
            nn.init.zeros_(module.conv2.bn.weight)

def probabilities(logits):
    """Logits (B, C, H, W) to class probabilities; one logit to the probability of class 1."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)

# ---------------------------------------------------------------------------------------- losses
# logits (B, C, H, W), maybe bfloat16; target (B, H, W) uint8: class indices, 255 is ignored.
# C = 1 means two classes with one logit: sigmoid(z) is the probability of class 1.
def bce_loss(logits, target, class_weights=None):
    """Mean of −log p(target class) over the pixels that are not ignored: (binary) cross-entropy.

    One logit: −y log σ(z) − (1 − y) log(1 − σ(z)) = log(1 + exp((1 − 2y) z)), y in {0, 1}.
    Several:   log Σ_c exp(z_c) − z_y. softplus and logsumexp compute both without overflow.
    """
    logits = logits.float().clamp(-1e5, 1e5)  # inf − inf would be nan
    valid = target != IGNORE_INDEX
    target = torch.where(valid, target, 0).long()                    # (B, H, W)
    if logits.shape[1] == 1:
        loss = F.softplus((1 - 2 * target) * logits[:, 0])
    else:
        loss = logits.logsumexp(dim=1) - logits.gather(1, target.unsqueeze(1)).squeeze(1)
    weight = valid if class_weights is None else valid * class_weights[target]
    return (loss * weight).sum() / weight.sum().clamp(min=1e-6)

def dice_loss(logits, target, class_weights=None, smooth=1.0):
    """1 − soft Dice, averaged over images and classes (V-Net, https://arxiv.org/abs/1606.04797, but
    without squares in the denominator). `class_weights` is not used.

    Dice = (2 Σ p y + s) / (Σ p + Σ y + s), summed over the pixels of an image that are not ignored;
    s = 1 makes an empty prediction of an empty mask right."""
    p = probabilities(logits.float().clamp(-1e5, 1e5))
    first_class = 1 if p.shape[1] == 1 else 0  # one logit: the background has no channel
    indices = torch.arange(first_class, first_class + p.shape[1], device=p.device)
    y = target.unsqueeze(1) == indices.view(1, -1, 1, 1)             # (B, C, H, W)
    p = torch.where(target.unsqueeze(1) != IGNORE_INDEX, p, 0)
    intersection = (p * y).sum(dim=(2, 3))                           # (B, C)
    cardinality = p.sum(dim=(2, 3)) + y.sum(dim=(2, 3))
    return 1 - ((2 * intersection + smooth) / (cardinality + smooth)).mean()

def bce_dice_loss(logits, target, class_weights=None):
    """BCE + Dice: BCE gives every pixel a gradient, soft Dice is close to the metric itself."""
    return bce_loss(logits, target, class_weights) + dice_loss(logits, target)

LOSSES = {"bce_dice": bce_dice_loss, "bce": bce_loss, "dice": dice_loss}

def class_weights(mode, frequencies):
    """Weights for the cross-entropy from the fraction of pixels of each class; 1 on average."""
    # CamVid, 28 passes over the data: mean IoU on val 0.660 with sqrt, 0.578 with none (a run each)
    auto = 0.5 if len(frequencies) > 2 else 0
    power = {"none": 0, "sqrt": 0.5, "inverse": 1, "auto": auto}[mode]
    weights = torch.where(frequencies > 0, 1 / frequencies ** power, 0)
    return (weights / weights[frequencies > 0].mean()).float()

# --------------------------------------------------------------------------------------- metrics
def logits_to_mask(logits, threshold=0.5):
    """Logits (B, C, H, W) to class indices (B, H, W): argmax, or p ≥ threshold if C = 1."""
    probs = probabilities(logits)
    if probs.shape[1] == 1:
        return (probs[:, 0] >= threshold).byte()
    return probs.argmax(dim=1).byte()

def confusion_matrix(mask, target, classes):
    """The pixels of each true class (a row) that are predicted as each class (a column), for each
    image: (B, C, C)."""
    image = torch.arange(len(mask), device=mask.device).view(-1, 1, 1)
    cell = (image * classes + target) * classes + mask               # (B, H, W)
    counts = cell[target != IGNORE_INDEX].bincount(minlength=len(mask) * classes**2)
    return counts.view(-1, classes, classes)

def dice_and_iou(confusion):
    """Dice 2 tp / (predicted + true) and IoU tp / (predicted + true − tp); 1 if both are empty."""
    tp = confusion.diagonal(dim1=-2, dim2=-1)
    predicted, true = confusion.sum(dim=-2), confusion.sum(dim=-1)
    empty = predicted + true == 0
    return ((2 * tp + empty) / (predicted + true + empty),
            (tp + empty) / (predicted + true - tp + empty))

def score_names(class_names):
    """The metrics that curves and tables show; the first one selects the best epoch."""
    return ("dice", "iou") if len(class_names) == 2 else ("mean_iou", "mean_dice")

def compute_metrics(confusion, class_names):
    """All metrics of a split, from the matrix of each image (N, C, C). Of two classes, `dice` and
    `iou` are means over images; of more, means are over the classes that occur."""
    total = confusion.sum(dim=0).double()                            # (C, C)
    predicted, true, pixels = total.sum(dim=0), total.sum(dim=1), total.sum().clamp(min=1)
    dice, iou = dice_and_iou(total)
    metrics = {"accuracy": (total.trace() / pixels).item(), "images": len(confusion)}
    if len(class_names) == 2:
        image_dice, image_iou = (x[:, 1].mean().item() for x in dice_and_iou(confusion.double()))
        return {"dice": image_dice, "iou": image_iou,
                "dataset_dice": dice[1].item(), "dataset_iou": iou[1].item(),
                "precision": (total[1, 1] / predicted[1]).item() if predicted[1] else None,
                "recall": (total[1, 1] / true[1]).item() if true[1] else None, **metrics}
    present = predicted + true > 0
    rows = [{"class": class_names[i], "dice": dice[i].item(), "iou": iou[i].item(),
             "fraction": (true[i] / pixels).item()} for i in present.nonzero().flatten().tolist()]
    mean_dice, mean_iou = (x[present].mean().nan_to_num().item() for x in (dice, iou))
    return {"mean_dice": mean_dice, "mean_iou": mean_iou, **metrics, "classes": rows}

def image_scores(confusion, class_names):
    """The main metric of each image alone."""
    metric = score_names(class_names)[0]
    return torch.tensor([compute_metrics(c[None], class_names)[metric] for c in confusion])

# ------------------------------------------------------------------ EMA and learning-rate schedules
@torch.no_grad()
def update_ema(ema_model, model, decay, step):
    """ema ← decay · ema + (1 − decay) · model; the decay is smaller in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for ema, value in zip(ema_model.state_dict().values(), model.state_dict().values()):
        if ema.is_floating_point():  # not num_batches_tracked
            ema.lerp_(value, 1 - decay)

def scale_size(size, factor):
    """An image size times a factor, in multiples of 16 from 32 up; by 1 it stays as it is."""
    return size if factor == 1 else tuple(max(32, 16 * round(n * factor / 16)) for n in size)

def train_image_size(config, epoch):
    """Progressive resizing: of the first `progressive` · `epochs` epochs (never the last) two
    thirds are at 1/2 size, the others at 3/4. UNet, same compute: val Dice 0.891, without 0.873."""
    small_epochs = round(config["progressive"] * config["epochs"], 6)  # 100 · 0.29 is 28.99…
    if epoch > small_epochs or epoch == config["epochs"]:
        return config["size"]
    return scale_size(config["size"], 0.75 if epoch > round(small_epochs * 2 / 3, 6) else 0.5)

def epoch_progress(config):
    """For each epoch the fraction of the run's pixels that is done before it, and a final 1.0."""
    pixels = [math.prod(train_image_size(config, i + 1)) for i in range(config["epochs"])]
    done = [*itertools.accumulate(pixels, initial=0)]
    return [each / done[-1] for each in done]

# A schedule gives the learning rate from the config, the fraction of the run's pixels that is done
# (never 0 or 1), and the val scores of the epochs so far; it has no state to be saved.
def constant(config, progress, val_scores):
    """Always the same."""
    return config["lr"]

def cosine(config, progress, val_scores):
    """Linear warm-up for the fraction `warmup` of the run, then half a cosine down to 0."""
    warmup = config["warmup"]
    if progress <= warmup:
        return config["lr"] * progress / warmup
    return config["lr"] * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

def plateau(config, progress, val_scores, patience=3):
    """Halved after more than `patience` epochs without a better val score, down to 1e-6."""
    lr, best, bad_epochs = config["lr"], -1.0, 0
    for score in val_scores:
        best, bad_epochs = (score, 0) if score > best else (best, bad_epochs + 1)
        if bad_epochs > patience:
            lr, bad_epochs = max(lr * 0.5, min(1e-6, config["lr"])), 0
    return lr

def exponential(config, progress, val_scores):
    """Multiplied by `gamma` after each epoch."""
    return config["lr"] * config["gamma"] ** len(val_scores)

def inverse_sqrt(config, progress, val_scores):
    """Quadratic warm-up for the fraction `warmup`, then proportional to 1/√progress."""
    warmup = max(config["warmup"], 0.001)
    return config["lr"] * min((progress / warmup) ** 2, math.sqrt(warmup / progress))

SCHEDULES = {"cosine": cosine, "constant": constant, "plateau": plateau,
             "exponential": exponential, "inverse_sqrt": inverse_sqrt}

# ------------------------------------------------------------------------------------- optimizers
def newton_schulz(matrices, dtype=torch.float32):
    """Orthogonalizes matrices with equal min(shape): singular vectors stay, values over 0.006 of
    the norm go to 0.7 to 1.2. A step is X ← (a I + b G + c G²) X, G = XXᵀ the Gram matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = [x.shape[0] > x.shape[1] for x in matrices]  # transposed, so that G is small
    wide = [((x.mT if t else x) / (x.norm() + 1e-7)).to(dtype) for x, t in zip(matrices, tall)]
    gram = torch.stack([x @ x.mT for x in wide])                     # (N, n, n)
    product = identity = torch.eye(gram.shape[1], dtype=dtype, device=gram.device)
    # on G alone, as P X has the Gram matrix P G P: half the time of multiplying X in each step. In
    # bfloat16 rounding makes eigenvalues of G negative, and those grow: values up to 2.5, not 1.2
    for _ in range(4):
        poly = a * identity + b * gram + c * gram @ gram
        gram, product = poly @ gram @ poly, poly @ product
    wide = [p @ x for p, x in zip(product, wide)]
    return [x.mT if t else x for x, t in zip(wide, tall)]

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton–Schulz (K. Jordan and others, 2024,
    https://kellerjordan.github.io/posts/muon/): a step as large in rare directions of the gradient
    as in frequent ones. A convolution is a matrix (out_channels, kernel area · in_channels), in a
    transposed one they change places. UNet after 3 epochs: val Dice 0.873, AdamW 0.847."""

    def __init__(self, params, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=0.0, weight_decay=weight_decay, momentum=0.95, odd=0))
        self.dtype = dtype  # bfloat16 takes 15% off a step of ResNet34UNet; UNet's Dice is the same

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        # even and odd parameters take turns, with twice the learning rate: a step of ResNet34UNet
        # takes 7% less time (13% with bfloat16), of UNet 2%; the same val Dice (UNet −0.002)
        group["odd"] = 1 - group["odd"]
        by_size = {}  # matrices with equal min(shape) are orthogonalized together
        for i, p in enumerate(group["params"]):
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffer = self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
            if i % 2 == group["odd"]:
                update = p.grad.add(buffer, alpha=group["momentum"])  # Nesterov
                matrix = update.permute(0, 2, 3, 1).flatten(1)  # in the order of channels-last
                by_size.setdefault(min(matrix.shape), []).append((p, matrix))
        for pairs in by_size.values():
            params, matrices = zip(*pairs)
            for p, update in zip(params, newton_schulz(matrices, dtype=self.dtype)):
                lr, ratio = 2 * group["lr"], update.shape[0] / update.shape[1]
                weight = p.mul_(1 - lr * group["weight_decay"]).permute(0, 2, 3, 1)
                weight.sub_(update.reshape(weight.shape), alpha=lr * math.sqrt(max(1, ratio)))

def make_optimizers(model, config):
    """The optimizers of a model; a group's learning rate is the schedule's times its `lr_scale`."""
    # fused: one pass over all weights, 7 ms instead of 11 in a step of ResNet34-UNet on two cores
    if config["optimizer"] != "muon":  # Adam is AdamW without weight decay
        weight_decay = {"adamw": config["weight_decay"], "adam": 0.0}[config["optimizer"]]
        return [torch.optim.AdamW([{"params": model.parameters(), "lr_scale": 1}], fused=True,
                                  weight_decay=weight_decay)]
    # Muon is for the matrices between layers: not for the head, biases and batch norms
    body = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    matrices = [p for p in body if p.dim() == 4]
    others = [p for p in body if p.dim() != 4] + [*model.head.parameters()]
    return [Muon([{"params": matrices, "lr_scale": 1}], config["weight_decay"],
                 dtype=DTYPES[config["precision"]]),
            torch.optim.AdamW([{"params": others, "lr_scale": 0.3}], fused=True, betas=(0.9, 0.99),
                              weight_decay=0.0)]

# ---------------------------------------------------------------------------------- guided filter
def box_mean(x, radius):
    """Means of (C, H, W) over windows of 2 · radius + 1 pixels each way, fewer at the borders."""
    for _ in range(2):  # along columns, then along rows
        x = F.avg_pool1d(x.mT, 2 * radius + 1, 1, radius, count_include_pad=False)
    return x

def guided_filter(image, p, radius, eps=1e-4):
    """Guided image filtering (He, Sun, Tang 2010, https://doi.org/10.1007/978-3-642-15549-9_1) of a
    map p (1, H, W) by an image (3, H, W): p ≈ a · image + b in windows; means of a, b (4, H, W)."""
    products = torch.cat((image, p, image * p, (image[:, None] * image).flatten(0, 1)))
    mean, mean_p, cov_p, cov = box_mean(products, radius).split((3, 1, 3, 9))
    cov_p = cov_p - mean * mean_p                                    # (3, H, W)
    cov = cov.unflatten(0, (3, 3)) - mean[:, None] * mean            # (3, 3, H, W)
    cov = cov + eps * torch.eye(3).view(3, 3, 1, 1)                  # Σ + εI
    # the inverse of a symmetric 3×3 matrix: its adjugate (cross products of rows) / determinant
    adjugate = torch.linalg.cross(cov[[1, 2, 0]], cov[[2, 0, 1]], dim=1)
    a = (adjugate * cov_p[:, None]).sum(dim=0) / (adjugate[0] * cov[0]).sum(dim=0)
    return box_mean(torch.cat((a, mean_p - (a * mean).sum(dim=0, keepdim=True))), radius)

# --------------------------------------------------------------- faster, same numbers; and export
class TransposedConv(nn.ConvTranspose2d):
    """ConvTranspose2d with kernel = stride = 2. The 2×2 output blocks do not overlap, so the layer
    is one matrix product per pixel; written as F.linear, a training step of UNet is 5% faster on
    two cores."""

    def forward(self, x):
        batch, channels, height, width = x.shape
        weight = self.weight.permute(2, 3, 1, 0).reshape(-1, channels)     # (2 · 2 · out, in)
        y = F.linear(x.permute(0, 2, 3, 1), weight, self.bias.repeat(4))   # (B, H, W, 2 · 2 · out)
        out = self.out_channels
        y = y.view(batch, height, width, 2, 2, out).transpose(2, 3)        # (B, H, 2, W, 2, out)
        return y.reshape(batch, 2 * height, 2 * width, out).permute(0, 3, 1, 2)

def fuse_conv_bn(model, dtype=torch.float32):
    """A copy for inference: in eval mode a batch norm is a fixed scale and shift, which the
    convolution before it can do: γ (w ∗ x − μ) / σ + β = (γ w / σ) ∗ x + (β − γ μ / σ)."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for block in model.modules():
        if isinstance(block, ConvBN):
            bn, conv = block.bn, block.conv
            scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            conv.weight.mul_(scale.view(-1, 1, 1, 1))
            conv.bias = nn.Parameter(bn.bias - bn.running_mean * scale, requires_grad=False)
            block.bn = nn.Identity()
    return model.to(dtype)

class ExportModel(nn.Module):
    """A model for use without petseg: images (B, 3, H, W) in 0..1 to probabilities."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images):
        return probabilities(self.model((images - self.mean) / self.std))
