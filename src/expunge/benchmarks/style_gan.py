"""A StyleGAN2 in miniature: a mapping of latents to styles, modulated convolutions, skip connections to the image; a residual
discriminator with the batch's standard deviation as a channel (Karras et al., 2020, 1912.04958). No noise inputs, so a latent is
an image. At 8 x 8 and the default width the pair has 0.26 M parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.tasks.gan import GanPair


class EqualLinear(nn.Module):
    """A linear layer whose weights are unit normal and scaled by 1/sqrt(fan in) when it runs. lr: its multiplier."""

    def __init__(self, inside: int, outside: int, bias: float = 0.0, lr: float = 1.0, active: bool = False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(outside, inside)), nn.Parameter(torch.empty(outside))
        self.first_bias, self.lr, self.active = bias, lr, active
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / self.lr)
        nn.init.constant_(self.bias, self.first_bias / self.lr)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * (self.lr / math.sqrt(self.weight.shape[1])), self.bias * self.lr)
        return F.leaky_relu(x, 0.2) * math.sqrt(2) if self.active else x


class EqualConv(nn.Module):
    """A convolution with unit normal weights, scaled when it runs."""

    def __init__(self, inside: int, outside: int, kernel: int, active: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outside, inside, kernel, kernel))
        self.bias, self.active = nn.Parameter(torch.empty(outside)), active
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 / math.sqrt(self.weight[0].numel())
        x = F.conv2d(x, self.weight * scale, self.bias, padding=self.weight.shape[-1] // 2)
        return F.leaky_relu(x, 0.2) * math.sqrt(2) if self.active else x


class ModulatedConv(nn.Module):
    """A convolution whose input channels a style scales, and whose output each example's own norm divides (demodulation)."""

    def __init__(self, inside: int, outside: int, kernel: int, style: int, demodulate: bool = True):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.empty(outside, inside, kernel, kernel)),
            nn.Parameter(torch.empty(outside)),
        )
        self.modulation, self.demodulate = EqualLinear(style, inside, bias=1.0), demodulate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scaled, s = self.weight / math.sqrt(self.weight[0].numel()), self.modulation(style)
        # scaling inputs and outputs equals scaling each example's own weights
        x = F.conv2d(x * s[:, :, None, None], scaled, padding=self.weight.shape[-1] // 2)
        if self.demodulate:
            norm = (scaled.square().sum((2, 3)) @ s.square().T).T + 1e-8
            x = x * norm.rsqrt()[:, :, None, None]
        return x + self.bias[:, None, None]


class Mapping(nn.Module):
    def __init__(self, latent: int, style: int, layers: int = 3):
        super().__init__()
        widths = [latent] + [style] * layers
        self.layers = nn.Sequential(
            *(EqualLinear(a, b, lr=0.01, active=True) for a, b in zip(widths, widths[1:], strict=False))
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())


class Synthesis(nn.Module):
    """Style -> image: a learned 4 x 4 start, one modulated convolution there, two at each doubled size."""

    def __init__(self, size: int, channels: int, width: int, style: int):
        super().__init__()
        self.start = nn.Parameter(torch.empty(1, width, 4, 4))
        stages = int(math.log2(size // 4))
        self.convs = nn.ModuleList(ModulatedConv(width, width, 3, style) for _ in range(1 + 2 * stages))
        self.images = nn.ModuleList(
            ModulatedConv(width, channels, 1, style, demodulate=False) for _ in range(1 + stages)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.start)

    def forward(self, style: Tensor) -> Tensor:
        def layer(number: int, x: Tensor) -> Tensor:
            return F.leaky_relu(self.convs[number](x, style), 0.2) * math.sqrt(2)

        x = layer(0, self.start.expand(len(style), -1, -1, -1))
        image = self.images[0](x, style)
        for stage in range(1, len(self.images)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = layer(2 * stage, layer(2 * stage - 1, x))
            image = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False) + self.images[stage](
                x, style
            )
        return image


class StyleGenerator(nn.Module):
    """(N, latent) -> (N, channels, size, size)."""

    def __init__(self, size: int = 8, channels: int = 1, width: int = 48, latent: int = 32, style: int = 32):
        super().__init__()
        self.latent = latent
        self.mapping, self.synthesis = Mapping(latent, style), Synthesis(size, channels, width, style)

    def forward(self, z: Tensor) -> Tensor:
        return self.synthesis(self.mapping(z))


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = EqualConv(width, width, 3), EqualConv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (F.avg_pool2d(x, 2) + F.avg_pool2d(self.second(self.first(x)), 2)) / math.sqrt(2)


class Discriminator(nn.Module):
    """(N, channels, size, size) -> (N, 1) logits."""

    def __init__(self, size: int = 8, channels: int = 1, width: int = 48, group: int = 4):
        super().__init__()
        self.enter = EqualConv(channels, width, 1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(int(math.log2(size // 4)))))
        self.last, self.group = EqualConv(width + 1, width, 3), group
        self.hidden, self.head = EqualLinear(16 * width, width, active=True), EqualLinear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.enter(x))
        x = self.last(torch.cat([x, self._spread(x)], 1))
        return self.head(self.hidden(x.flatten(1)))

    def _spread(self, x: Tensor) -> Tensor:
        """(N, 1, 4, 4) the mean standard deviation within groups of the batch, which betrays a collapsed generator."""
        group = math.gcd(self.group, len(x))
        parts = x.reshape(group, -1, *x.shape[1:])
        spread = (parts.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
        return spread.repeat(group).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])


def style_gan(size: int = 8, channels: int = 1, width: int = 48, latent: int = 32) -> GanPair:
    """An untrained pair."""
    return GanPair(StyleGenerator(size, channels, width, latent), Discriminator(size, channels, width))
