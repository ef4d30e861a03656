"""A conditional variational autoencoder as a user may have one: a plain module, one-hot classes inside, that trains in a second."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, LATENT = 10, 4


class TinyVae(nn.Module):
    latent = LATENT

    def __init__(self, width: int = 48):
        super().__init__()
        self.body = nn.Linear(64 + CLASSES, width)
        self.mean, self.log_variance = nn.Linear(width, LATENT), nn.Linear(width, LATENT)
        self.back = nn.Sequential(nn.Linear(LATENT + CLASSES, width), nn.ReLU(), nn.Linear(width, 64))

    def encode(self, x, c):
        h = self.body(torch.cat([x.flatten(1), F.one_hot(c, CLASSES).to(x)], 1)).relu()
        return self.mean(h), self.log_variance(h)

    def decode(self, z, c):
        return self.back(torch.cat([z, F.one_hot(c, CLASSES).to(z)], 1)).sigmoid().view(-1, 1, 8, 8)


def images(split: str, rows: int):
    """Real digits (rows, 1, 8, 8) in 0..1 and their classes."""
    from expunge.benchmarks.canvas import digit_images

    x, y = digit_images(split)
    return (x[:rows] + 1) / 2, y[:rows]


def nearest(pictures):
    """(N, 10) a judge: how near the mean picture of each class is."""
    x, y = images("train", 1347)
    centres = torch.stack([x[y == c].mean(0) for c in range(CLASSES)]).flatten(1)
    return (-20 * torch.cdist(pictures.flatten(1), centres)).softmax(1)
