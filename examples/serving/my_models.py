"""Models of one's own: a factory returns the module and example inputs, with the batch in dimension 0."""

from __future__ import annotations

import torch


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        self.head = torch.nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image))


class Embedder(torch.nn.Module):
    """Heavy enough to be felt by a neighbour."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8)))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.layers(text)


def classifier(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    return Classifier().eval(), torch.zeros(max(batch, 1), 3, 64, 64)


def embedder(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    return Embedder().eval(), torch.zeros(max(batch, 1), 1024)
