"""Forty models that people use, one of each kind: they trace, nearly all varies, and the parallel pass is right.

`benchmarks/zoo.py` asks the same and more of every model of timm and torchvision.
"""

import numpy as np
import pytest
import torch
from torch import nn

import psenet
from psenet.inputs import tensors_in
from psenet.models import build_model

LEAST_ELASTIC_SHARE = 0.9
SIDES = {
    # Residual, dense, branched and plain nets.
    **{"timm:resnet10t": 64, "timm:resnetblur18": 64, "timm:resnetv2_18": 64, "timm:resnext26ts": 64},
    **{"timm:res2next50": 64, "timm:densenet121": 64, "timm:dla46x_c": 64, "timm:hrnet_w18_small": 64},
    **{"timm:cspresnet50": 64, "timm:darknet17": 64, "timm:selecsls42": 64, "timm:gernet_s": 64},
    **{"timm:inception_v3": 96, "timm:dpn48b": 64, "torchvision:squeezenet1_1": 64, "torchvision:mnasnet0_5": 64},
    # Attention over channels and branches, in many spellings.
    **{"timm:legacy_seresnet18": 64, "timm:ecaresnet26t": 64, "timm:skresnet18": 64, "timm:resnest14d": 64},
    **{"timm:ese_vovnet19b_slim_dw": 64, "timm:gcresnext26ts": 64},
    # For phones.
    **{"timm:mobilenetv2_035": 64, "timm:mobilenetv3_small_075": 64, "timm:efficientnet_b0": 64, "timm:mixnet_s": 64},
    **{"timm:ghostnet_100": 64, "timm:rexnet_100": 64, "timm:starnet_s050": 64, "torchvision:shufflenet_v2_x0_5": 64},
    # Regular, reparameterised, without batch norm.
    **{"timm:regnety_002": 64, "timm:regnetz_005": 64, "timm:repvgg_a0": 64, "timm:mobileone_s1": 64},
    **{"timm:nf_resnet26": 64, "timm:nf_regnet_b0": 64},
    # Channels-last blocks and their relatives.
    **{"timm:convnextv2_atto": 64, "timm:poolformer_s12": 64, "timm:inception_next_atto": 64},
    **{"timm:focalnet_tiny_srf": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIDES)
def test_a_model_that_people_use_varies_and_its_parallel_pass_is_right(name: str):
    torch.manual_seed(0)
    model, shape = build_model(name, num_classes=10).eval(), (3, SIDES[name], SIDES[name])
    space = psenet.trace(model, torch.randn(1, *shape))
    assert space.elastic_share() >= LEAST_ELASTIC_SHARE
    _check_one_pass(model, space, shape)


@pytest.mark.slow
def test_a_model_for_segmentation_varies_and_its_outputs_keep_their_names():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(0)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    space = psenet.trace(model, torch.randn(1, 3, 64, 64))
    assert space.elastic_share() >= LEAST_ELASTIC_SHARE
    small = psenet.Supernet(model, space).extract(space.smallest()).eval()
    assert {name: tuple(out.shape) for name, out in small(torch.randn(2, 3, 64, 64)).items()} == {"out": (2, 4, 64, 64)}
    _check_one_pass(model, space, (3, 64, 64))


def _check_one_pass(model: nn.Module, space: psenet.WidthSpace, shape: tuple[int, ...]) -> None:
    """Compare three subnets in one pass with the extracted modules, run by themselves."""
    rng = np.random.default_rng(0)
    supernet = psenet.Supernet(model, space).double().eval()
    widths = [space.sample(rng) for _ in range(3)]
    x = torch.randn(6, *shape, dtype=torch.float64)
    with torch.no_grad():
        together = tensors_in(supernet(x, widths))
        for number, setting in enumerate(widths):
            for ours, alone in zip(together, tensors_in(supernet.extract(setting)(x[number::3])), strict=True):
                assert (ours[number::3] - alone).abs().max() <= 1e-9 * alone.abs().max()
