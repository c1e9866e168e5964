"""The demo's U-Net and its training step in PyTorch, with the layers that PyTorch has for it."""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks import data
from benchmarks.cases import Case
from benchmarks.contestants.base import Prepared

torch.set_num_threads(len(os.sched_getaffinity(0)))

LEARNING_RATE, FEATURES, LEVELS = 1e-3, 8, 3


class Convolution(nn.Module):
    """3x3x3 convolution, normalization of each voxel's channels, leaky ReLU."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(channels, features, 3, padding=1, bias=False)
        self.normalization = nn.LayerNorm(features, eps=1e-5)
        nn.init.kaiming_normal_(self.convolution.weight)

    def forward(self, x: Any) -> Any:
        x = self.normalization(self.convolution(x).movedim(1, -1)).movedim(-1, 1)
        return functional.leaky_relu(x, 0.1)


class UNet(nn.Module):
    """The layers of the demo's network, one for one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = [FEATURES * 2**level for level in range(LEVELS + 1)]
        self.down = nn.ModuleList(nn.Conv3d(a, b, 2, 2) for a, b in itertools.pairwise(widths))
        self.encode = nn.ModuleList(Convolution(width if level else 1, width) for level, width in enumerate(widths))
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in itertools.pairwise(widths))
        self.decode = nn.ModuleList(Convolution(2 * width, width) for width in widths[:-1])
        self.classify = nn.Conv3d(FEATURES, classes, 1)

    def forward(self, x: Any) -> Any:
        skips = []
        for level, encode in enumerate(self.encode):
            x = encode(self.down[level - 1](x) if level else x)
            skips.append(x)
        for level in reversed(range(LEVELS)):
            x = self.decode[level](torch.cat([self.up[level](x), skips[level]], 1))
        return self.classify(x)


def loss_function(logits: Any, labels: Any) -> Any:
    """As the demo's: cross-entropy plus one minus the mean soft Dice of the classes but the background."""
    entropy = functional.cross_entropy(logits, labels)
    probabilities = torch.softmax(logits, 1)
    truth = functional.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    overlap = (probabilities * truth).sum((0, 2, 3, 4))
    total = (probabilities + truth).sum((0, 2, 3, 4))
    return entropy + 1 - ((2 * overlap + 1) / (total + 1))[1:].mean()


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    torch.manual_seed(0)
    memory_format = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}[variant]
    network = UNet(case.filters).to(memory_format=memory_format)
    image = torch.tensor(data.to_channels_first(data.operands(case)[0])).contiguous(memory_format=memory_format)
    labels = torch.tensor(data.labels(case)).long()
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE)

    def call() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function(network(image), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    parameters = sum(p.numel() for p in network.parameters())
    return Prepared(call, lambda results: [], compared=False, facts={"parameters": parameters})
