"""Small networks and images on which faults of whole kinds show."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


def block(before, after, stride=1):
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU())


@pytest.fixture
def cnn():
    "Builds a stack of blocks with a linear head"
    def build(n_out=3, channels=3):
        torch.manual_seed(0)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out)
        return nn.Sequential(block(channels, 8), block(8, 8, 2), block(8, 8, 2), *head).eval()
    return build


@pytest.fixture
def photo():
    "Writes a small random image to a file"
    def write(path, size=(20, 16), seed=0, **kwargs):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **kwargs)
        return path
    return write
