"""The small convolutional classifier whose features define `fd_mnist`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitClassifier(nn.Module):
    """uint8 [B, 1, 32, 32] -> (features [B, 64], logits [B, 10]); features are what the last layer sees."""

    feature_dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.features = nn.Linear(64 * 4 * 4, self.feature_dim)
        self.head = nn.Linear(self.feature_dim, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float() / 127.5 - 1
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(_largest_of_4(conv(x)))
        features = F.relu(self.features(x.flatten(1)))
        return features, self.head(features)


def _largest_of_4(x: Tensor) -> Tensor:
    """F.max_pool2d(x, 2), which takes ten times as long on a CPU; and of fewer numbers the relu costs less."""
    rows = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])
