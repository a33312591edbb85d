"""Tests of the network files resnet18.py and resnet50.py: python -m pytest -q extras

What is expected comes from torchvision's own networks and from what a configuration means.
"""
import copy
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import batch_statistics_norm, count_macs, pooling_configs

FILES = {name: runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
         for name in ("resnet18", "resnet50")}
DEFAULT = {"resnet18": (3, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
SPACE = {"resnet18": pooling_configs(9, 4), "resnet50": pooling_configs(16, 4)}
for_both = pytest.mark.parametrize("name", FILES)


def make(name, image_size, norm=nn.BatchNorm2d, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        return FILES[name]["make_network"](7, image_size, norm)


def of_torchvision(name, device="cpu"):
    with torch.device(device):
        return getattr(torchvision.models, name)(num_classes=7)


def blocks(network):
    return [*network.layer1, *network.layer2, *network.layer3, *network.layer4]


def resolutions(config):
    """The resolution that each layer runs at: (1, 1, 2) gives 0, 1, 2, 2."""
    return [resolution for resolution, count in enumerate(config) for _ in range(count)]


def images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@for_both
def test_the_default_is_torchvisions_network_to_the_last_bit(name):
    mine, theirs, x = make(name, 64), of_torchvision(name), images(64)
    theirs.load_state_dict(mine.state_dict())
    assert FILES[name]["DEFAULT"] == DEFAULT[name]
    for training in (True, False):  # training first, since it moves the running statistics
        out, expected = mine.train(training)(x, DEFAULT[name]), theirs.train(training)(x)
        assert torch.equal(out, expected)
        if training:
            out.square().sum().backward()
            expected.square().sum().backward()
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in mine.state_dict().items())
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@for_both
def test_the_default_costs_what_torchvisions_network_costs(name):
    mine, theirs = make(name, 64, device="meta"), of_torchvision(name, "meta")
    for size in (64, 224):
        expected = count_macs((), lambda x, config: theirs(x), size)
        assert count_macs(DEFAULT[name], mine, size) == expected
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())


@for_both
@pytest.mark.parametrize("size, first", ((32, 32), (64, 16)))
def test_every_layer_runs_at_the_resolution_that_the_configuration_says(name, size, first):
    network, sizes = make(name, size, nn.Identity, "meta"), []
    layers = [network.maxpool, *blocks(network)] if name == "resnet18" else blocks(network)
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, out: sizes.append(out.shape[2:]))
    assert len(SPACE[name]) == {"resnet18": 56, "resnet50": 455}[name]
    for config in SPACE[name][::{"resnet18": 1, "resnet50": 40}[name]]:
        sizes.clear()
        network(torch.empty(2, 3, size, size, device="meta"), config)
        assert sizes == [(first / 2 ** r, first / 2 ** r) for r in resolutions(config)]


@for_both
def test_another_configuration_is_torchvisions_network_with_other_strides(name):
    mine, theirs, x = make(name, 64).eval(), of_torchvision(name).eval(), images(64)
    theirs.load_state_dict(mine.state_dict())
    for config in (SPACE[name][0], SPACE[name][len(SPACE[name]) // 2], DEFAULT[name]):
        at = resolutions(config) if name == "resnet18" else [0, *resolutions(config)]
        for block, before, after in zip(blocks(theirs), at, at[1:]):
            stride = (1 + after - before, 1 + after - before)
            (block.conv1 if name == "resnet18" else block.conv2).stride = stride
            if isinstance(block.downsample, nn.Sequential):
                block.downsample[0].stride = stride
            else:
                block.downsample = nn.MaxPool2d(1, stride)  # every pixel, or every second
        with torch.no_grad():
            assert torch.equal(mine(x, config), theirs(x))


@for_both
def test_a_supernet_learns_channels_last_and_keeps_nothing_of_another_configuration(name):
    network = make(name, 32, batch_statistics_norm).to(memory_format=torch.channels_last)
    x = images(32).contiguous(memory_format=torch.channels_last)
    before = network(x, DEFAULT[name])
    F.cross_entropy(network(x, SPACE[name][0]), torch.tensor([0, 1])).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert not list(network.buffers())  # as torchvision's own norms would have
    for same in (network, copy.deepcopy(network)):
        assert torch.equal(same(x, DEFAULT[name]), before)


@for_both
def test_a_configuration_that_does_not_fit_is_refused_in_one_line(name):
    network, (first, *others) = make(name, 32, device="meta"), DEFAULT[name]
    for config in ((), (sum(DEFAULT[name]),), (first + 1, *others), (first, 0, *others[1:]),
                   (first - 1, *others, 1), (first + others[0], 0, *others[1:])):
        with pytest.raises(ValueError, match=r"^\(.*\) does not share out .* 4 resolutions$"):
            network(torch.empty(2, 3, 32, 32, device="meta"), config)
