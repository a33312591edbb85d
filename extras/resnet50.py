"""ResNet50 whose strides are searched: a network file for every script.

    python search_supernet.py --network extras/resnet50.py

What moves: the first block of each resolution but the first has stride 2, and a configuration says
which blocks those are. There are 16 residual blocks and four resolutions: 455 configurations.
Channels belong to the block and never move. In the default, [3,4,6,3], strides stand where channels
double, as in torchvision's resnet50. Before the blocks stands a convolution that is not counted.
From 64 pixels on it is the usual one, 7x7 with stride 2 and a 3x3 max pooling after it, and the
weights have the names and shapes of torchvision's. Below that it is 3x3 with stride 1.

Sources: He et al., 2016, for the network; torchvision for its code, where the 3x3 convolution of a
block has the stride; the paper, section 5 and tables 3 and 4, for the search, which moves the
strides of these networks and adds no pooling.
"""
import itertools

import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import Bottleneck, ResNet

DEFAULT = (3, 4, 6, 3)


class Block(Bottleneck):
    """torchvision's Bottleneck, but its stride, 1 or 2, is an argument."""

    def forward(self, x, stride):
        out = self.relu(self.bn1(self.conv1(x)))
        out = F.conv2d(out, self.conv2.weight, stride=stride, padding=1)
        out = self.relu(self.bn2(out))
        out = self.bn3(self.conv3(out))
        if self.downsample is None:
            shortcut = x[:, :, ::stride, ::stride]  # every pixel, or every second
        else:  # more channels leave than enter
            conv, norm = self.downsample
            shortcut = norm(F.conv2d(x, conv.weight, stride=stride))
        return self.relu(out + shortcut)


class ResNet50(ResNet):
    """torchvision's ResNet50, but forward(x, config) says which of its blocks have stride 2."""

    def forward(self, x, config=DEFAULT):
        if len(config) != 4 or min(config) < 1 or sum(config) != 16:
            raise ValueError(f"{config} does not share out 16 blocks among 4 resolutions")
        strided = set(itertools.accumulate(config[:-1]))  # the blocks that begin a resolution
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        blocks = itertools.chain(self.layer1, self.layer2, self.layer3, self.layer4)
        for number, block in enumerate(blocks):
            x = block(x, stride=2 if number in strided else 1)
        return self.fc(self.avgpool(x).flatten(1))


def make_network(classes, image_size, norm):
    """Make the network for so many classes and pixels. norm(channels) makes a norm."""
    network = ResNet50(Block, [3, 4, 6, 3], classes)
    if image_size < 64:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    for name, old in list(network.named_modules()):
        if isinstance(old, nn.BatchNorm2d):  # torchvision itself takes no norm without a scale
            network.set_submodule(name, norm(old.num_features))
    return network
