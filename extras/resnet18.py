"""ResNet18 whose strides are searched: a network file for every script.

    python search_supernet.py --network extras/resnet18.py

What moves: the first layer of each resolution but the first has stride 2, and a configuration says
which layers those are. There are nine layers, the first convolution and eight residual blocks, and
four resolutions: 56 configurations. Channels belong to the layer and never move. In the default,
[3,2,2,2], strides stand where channels double, as in torchvision's resnet18. From 64 pixels on, the
first convolution is the usual one, 7x7 with stride 2 and a 3x3 max pooling after it, and the
weights have the names and shapes of torchvision's. Below that it is 3x3 with stride 1.

Sources: He et al., 2016, for the network; torchvision for its code; the paper, section 5 and
tables 3 and 4, for the search, which moves the strides of these networks and adds no pooling.
"""
import itertools

import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock, ResNet

DEFAULT = (3, 2, 2, 2)


class Block(BasicBlock):
    """torchvision's BasicBlock, but its stride, 1 or 2, is an argument."""

    def forward(self, x, stride):
        out = F.conv2d(x, self.conv1.weight, stride=stride, padding=1)
        out = self.relu(self.bn1(out))
        out = self.bn2(self.conv2(out))
        if self.downsample is None:
            shortcut = x[:, :, ::stride, ::stride]  # every pixel, or every second
        else:  # the channels double
            conv, norm = self.downsample
            shortcut = norm(F.conv2d(x, conv.weight, stride=stride))
        return self.relu(out + shortcut)


class ResNet18(ResNet):
    """torchvision's ResNet18, but forward(x, config) says which of its layers have stride 2."""

    def forward(self, x, config=DEFAULT):
        if len(config) != 4 or min(config) < 1 or sum(config) != 9:
            raise ValueError(f"{config} does not share out 9 layers among 4 resolutions")
        strided = set(itertools.accumulate(config[:-1]))  # the layers that begin a resolution
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # layer 0
        blocks = itertools.chain(self.layer1, self.layer2, self.layer3, self.layer4)
        for number, block in enumerate(blocks, 1):
            x = block(x, stride=2 if number in strided else 1)
        return self.fc(self.avgpool(x).flatten(1))


def make_network(classes, image_size, norm):
    """Make the network for so many classes and pixels. norm(channels) makes a norm."""
    network = ResNet18(Block, [2, 2, 2, 2], classes)
    if image_size < 64:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    for name, old in list(network.named_modules()):
        if isinstance(old, nn.BatchNorm2d):  # torchvision itself takes no norm without a scale
            network.set_submodule(name, norm(old.num_features))
    return network
