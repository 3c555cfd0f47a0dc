"""What features go through before they are compared, and what no exported model has.

The projection head of SimCLR and SLIP is for views; a linear layer gives features the width of a teacher's.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from clipmini.annotations import Limits


@dataclass(frozen=True)
class HeadOptions:
    """A perceptron between the features of a picture and what its views are compared by.

    SLIP's (https://arxiv.org/abs/2112.12750, section 4) has three layers, 4096 wide, of 256 at its end, and BatchNorm,
    which looks at the batch of a process where there is no GPU; LayerNorm looks at one picture.

    Attributes:
        layers: of the perceptron; 0 is none, and views are compared by the embeddings themselves.
        hidden_width: of all but the last.
        width: of the last.
        norm: before each activation, `batch` or `layer`.

    Raises:
        UserError: a value that makes no perceptron.
    """

    layers: int
    hidden_width: int
    width: int
    norm: Literal["batch", "layer"]

    def __post_init__(self) -> None:
        for name, least in (("layers", 0), ("hidden_width", 1), ("width", 1)):
            Limits(least).check(f"loss.head.{name}", getattr(self, name))

    def make(self, width: int) -> nn.Module | None:
        """Make the perceptron for features of a width, or None."""
        return ProjectionHead(width, self) if self.layers else None


class Projection(nn.Linear):
    """Features [b, width] to unit vectors [b, another width]."""

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(super().forward(features), dim=-1)


class ProjectionHead(nn.Module):
    """Features [b, width] to unit vectors [b, options.width]."""

    def __init__(self, width: int, options: HeadOptions) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(options.layers - 1):
            norm = nn.BatchNorm1d if options.norm == "batch" else nn.LayerNorm
            layers += [nn.Linear(width, options.hidden_width), norm(options.hidden_width), nn.ReLU(inplace=True)]
            width = options.hidden_width
        self.layers = nn.Sequential(*layers, nn.Linear(width, options.width))

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.layers(features), dim=-1)
