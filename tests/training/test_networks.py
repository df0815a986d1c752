import sys
import types
import urllib.error

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from genkl_ext.training import networks
from genkl_ext.training.networks import build, load_into
from genkl_ext.training.settings import Network

SMALL = "shufflenet_v2_x0_5"


@pytest.fixture
def factories(monkeypatch):
    """A module with functions that make networks."""
    module = types.ModuleType("some_networks")

    def tiny(num_classes, width=4):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.LazyLinear(num_classes))

    def small(num_classes, width=4):
        body = nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(body, nn.Linear(width, num_classes))

    class Held(nn.Module):
        """All names begin as those in last.ckpt do."""

        def __init__(self, num_classes):
            super().__init__()
            self.network = small(num_classes)

    module.tiny, module.small, module.Held = tiny, small, Held
    module.nothing = lambda num_classes: None
    monkeypatch.setitem(sys.modules, "some_networks", module)
    return module


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", SMALL, "mnasnet0_5"])
def test_gives_k_logits(name):
    net = build(Network(name), 7, seed=0)
    assert net.training
    assert net.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("alexnet", "classifier.6"),
        ("convnext_tiny", "classifier.2"),
        ("densenet121", "classifier"),
        ("efficientnet_b0", "classifier.1"),
        ("mobilenet_v3_large", "classifier.3"),
        ("resnext50_32x4d", "fc"),
        ("swin_t", "head"),
        ("vgg11_bn", "classifier.6"),
        ("vit_b_16", "heads.head"),
        ("wide_resnet50_2", "fc"),
    ],
)
def test_the_last_layer_is_replaced(name, layer):
    with torch.device("meta"):
        net = models.get_model(name)
        networks._replace_last_layer(name, net, 7)
    assert net.get_submodule(layer).out_features == 7
    assert sum(m.out_features == 7 for m in net.modules() if isinstance(m, nn.Linear)) == 1


def test_the_last_layer_stays_if_it_has_k_outputs():
    net = models.get_model(SMALL)
    layer = net.fc
    networks._replace_last_layer(SMALL, net, 1000)
    assert net.fc is layer


def test_seeds():
    before = torch.get_rng_state()
    first, again, other = (build(Network(SMALL), 5, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again)
    assert not torch.equal(first.fc.weight, other.fc.weight)
    torch.manual_seed(8)
    assert same(build(Network(SMALL), 5, 1), first)


def test_channels_last_changes_the_layout_only():
    plain = build(Network(SMALL, channels_last=False), 5, 0)
    turned = build(Network(SMALL, channels_last=True), 5, 0)
    assert same(plain, turned)
    assert turned.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.conv1[0].weight.is_contiguous()


def test_compile_is_in_place(monkeypatch, factories):
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: calls.append(self))
    net = build(Network("some_networks:small", compile=True), 5, 0)
    assert calls == [net]
    assert list(net.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    build(Network("some_networks:small"), 5, 0)
    assert len(calls) == 1


def test_options_reach_the_constructor(factories):
    assert build(Network("some_networks:small", options={"width": 9}), 5, 0)[1].in_features == 9
    net = build(Network("mobilenet_v3_small", options={"width_mult": 0.25}), 3, 0)
    assert net.features[0][0].out_channels == 8


def test_a_function_makes_the_network(factories):
    first, again = (build(Network("some_networks:small"), 5, 3) for _ in range(2))
    assert same(first, again)
    assert first(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_load_into_takes_every_form(tmp_path, suffix, prefix):  # C1, C8
    source, net = build(Network(SMALL), 5, 0), build(Network(SMALL), 5, 1)
    weights = {prefix + name: value.contiguous() for name, value in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        whole = {"epoch": 3, "state_dict": weights, "optimizer": {}, "train_bvacc": 0.5}
        torch.save(whole if suffix == ".pth.tar" else weights, path)
    load_into(net, path)
    assert same(net, source)


def test_load_into_takes_our_last_ckpt(tmp_path, factories):
    for name in ("some_networks:small", "some_networks:Held"):
        source, net = build(Network(name), 5, 0), build(Network(name), 5, 1)
        for prefix in ("", "network."):
            weights = {prefix + name: value for name, value in source.state_dict().items()}
            torch.save({"state_dict": weights}, tmp_path / "last.ckpt")
            load_into(net, tmp_path / "last.ckpt")
            assert same(net, source)


def test_old_weights_do_not_count_batches(tmp_path):
    source, net = build(Network(SMALL), 5, 0), build(Network(SMALL), 5, 1)
    weights = {k: v for k, v in source.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(weights, tmp_path / "w.pth")
    load_into(net, tmp_path / "w.pth")
    assert same(net, source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("1.bias"), r"w.pth must hold .* lacks 1 \(1.bias\); .* besides none"),
        (lambda w: w.update(extra=torch.ones(1)), r"lacks none; it has besides 1 \(extra\)"),
        (lambda w: w.update({"1.bias": torch.ones(6)}), r"got size mismatch for 1.bias"),
        (lambda w: w.clear() or w.update(a=torch.ones(1)), r"lacks 4 \(0.0.*, 1.*, \.\.\.\)"),
    ],
)
def test_load_into_is_strict(tmp_path, factories, change, message):
    net = build(Network("some_networks:small"), 5, 0)
    weights = dict(net.state_dict())
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_into(net, tmp_path / "w.pth")


def test_pretrained_from_a_file(tmp_path):
    source = models.get_model(SMALL)  # 1000 classes
    torch.save(source.state_dict(), tmp_path / "w.pth")
    net = build(Network(SMALL, pretrained=str(tmp_path / "w.pth")), 7, seed=4)
    fresh = build(Network(SMALL), 7, seed=4)
    assert torch.equal(net.fc.weight, fresh.fc.weight)
    assert torch.equal(net.fc.bias, fresh.fc.bias)
    net.fc = source.fc
    assert same(net, source)


def test_pretrained_for_as_many_classes_is_loaded_whole(tmp_path, factories):
    source = build(Network("some_networks:small"), 5, 0)
    save_file(
        {k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors"
    )
    pretrained = Network("some_networks:small", pretrained=str(tmp_path / "w.safetensors"))
    assert same(build(pretrained, 5, 1), source)
    other = build(pretrained, 6, 1)
    assert torch.equal(other[0][0].weight, source[0][0].weight)
    assert other[1].weight.shape == (6, 4)
    wider = Network("some_networks:small", pretrained.pretrained, {"width": 6})
    with pytest.raises(ValueError, match="build: .*w.safetensors must hold"):
        build(wider, 5, 1)


def test_pretrained_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = models.get_model_weights(SMALL).DEFAULT
    cached = tmp_path / "checkpoints" / weights.url.rpartition("/")[2]
    cached.parent.mkdir()
    source = models.get_model(SMALL)
    torch.save(source.state_dict(), cached)
    for name in ("IMAGENET1K_V1", "DEFAULT"):
        net = build(Network(SMALL, pretrained=name), 7, seed=0)
        assert net.fc.out_features == 7
        assert torch.equal(net.conv1[0].weight, source.conv1[0].weight)
    ran = tmp_path / "ran"
    torch.save({"fc.weight": _Code(ran)}, cached)
    with pytest.raises(ValueError, match="must hold plain weights"):
        build(Network(SMALL, pretrained="DEFAULT"), 7, seed=0)
    assert not ran.exists()


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    message = r"cannot fetch https://.*no route to host.*give the file's path as pretrained"
    with pytest.raises(OSError, match=message):
        build(Network(SMALL, pretrained="DEFAULT"), 7, seed=0)


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (Network("resnt50"), ValueError, "got 'resnt50'; did you mean 'resnet50'?"),
        (Network("fasterrcnn_resnet50_fpn"), ValueError, "must be a classifier of torchvision"),
        (Network("squeezenet1_0"), ValueError, "squeezenet1_0 must end in a linear layer"),
        (Network("googlenet", options={"init_weights": False}), ValueError, "aux_logits=False"),
        (Network("resnet18", "IMAGENET1K_V2"), ValueError, "did you mean 'IMAGENET1K_V1'"),
        (Network("resnet18", "weights/absent.pth"), ValueError, "a file or one of IMAGENET1K_V1"),
        (Network("resnet18", options={"widht": 2}), ValueError, "arguments of resnet18, .*widht"),
        (Network("some_networks:small", options={"w": 2}), ValueError, "arguments of some_net"),
        (Network("some_networks:large"), ValueError, "must have a function 'large'"),
        (Network("some_networks:nothing"), ValueError, "must give a torch.nn.Module, got None"),
        (Network("some_networks:small", "DEFAULT"), ValueError, "pretrained must be a file"),
        (Network("absent_networks:small"), ImportError, "cannot import absent_networks"),
    ],
)
def test_what_cannot_be_built(factories, network, error, message):
    with pytest.raises(error, match=message):
        build(network, 5, 0)


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="needs the package timm: pip install timm"):
        build(Network("timm/resnet18"), 5, 0)


def test_timm(monkeypatch, factories):
    timm = types.ModuleType("timm")
    asked = {}

    def create_model(name, **options):
        asked.update(options, name=name)
        return factories.small(options["num_classes"])

    timm.create_model = create_model
    timm.is_model = lambda name: name == "resnet18.a1_in1k"
    timm.list_models = lambda: ["resnet18.a1_in1k"]
    monkeypatch.setitem(sys.modules, "timm", timm)
    net = build(Network("timm/resnet18.a1_in1k", "DEFAULT", {"drop_rate": 0.1}), 5, 0)
    assert net[1].out_features == 5
    assert asked == {
        "name": "resnet18.a1_in1k",
        "pretrained": True,
        "num_classes": 5,
        "drop_rate": 0.1,
    }
    with pytest.raises(ValueError, match="got 'resnet1.a1'; did you mean 'resnet18.a1_in1k'"):
        build(Network("timm/resnet1.a1"), 5, 0)
    with pytest.raises(ValueError, match="pretrained must be a file or DEFAULT"):
        build(Network("timm/resnet18.a1_in1k", "IMAGENET1K_V1"), 5, 0)
