"""The network of the demo."""

from __future__ import annotations

from torch import nn


def small(num_classes: int) -> nn.Module:
    """Three convolutions and a linear layer: (n, 3, 16, 16) images to (n, k) logits."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, 64):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels, num_classes))
