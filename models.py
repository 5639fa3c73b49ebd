"""The networks of the paper (section 5.1), each an `nn.Sequential` whose children are its units.

They take float images [N, 3, H, W] in [0, 1] and give logits [N, classes]. What the paper leaves
open, the widths above all, is ours; the README says how it was chosen.
"""

from collections import OrderedDict

from torch import nn


def mnist_net(classes: int = 10) -> nn.Sequential:
    """The 4-layer network for digits of 28 x 28: two convolutional, two fully connected units.

    Pooling and flattening stand inside a unit, so that there are exactly four.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            conv2=nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            fc1=nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU()),
            fc2=nn.Linear(128, classes),
        )
    )
