"""torchvision's networks as encoders."""

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from plugins import UserError, find
from superclass import SuperClass


@pytest.mark.parametrize(("name", "width"), [("resnet50", 2048), ("convnext_tiny", 768)])
def test_torchvisions_networks_give_tokens_and_keep_their_names(on_device, name, width):
    torch.manual_seed(0)
    network, images = torchvision.models.get_model(name).double().eval(), torch.randn(2, 3, 64, 64)
    images = images.double()  # a GPU rounds float32 differently with the channels last
    model = SuperClass(find("model", name)(64), 30).double().eval()
    missing, unexpected = network.load_state_dict(model.encoder.state_dict(), strict=False)
    assert unexpected == [] and all(key.startswith(("fc.", "classifier.")) for key in missing)
    with torch.no_grad():
        tokens = model.encoder(images)
        assert tokens.shape == (2, 4, width) and model(images).shape == (2, 30)
        maps = create_feature_extractor(network, {"avgpool": "pooled"})(images)["pooled"]
        torch.testing.assert_close(tokens.mean(dim=1), maps.flatten(1))
        if name == "convnext_tiny":  # it leaves out no block at random: any split gives the same
            for layer in model.encoder.modules():
                if hasattr(layer, "layer_scale"):
                    layer.layer_scale.fill_(1)  # with its 1e-6, no difference would be seen
            torch.testing.assert_close(model.train()(images), model.eval()(images))
    with pytest.raises(ValueError, match="32 px or more"):
        find("model", name)(28)


def test_unknown_names_are_refused_with_those_that_exist():
    with pytest.raises(UserError, match="unknown model 'resnet51': use SIZE/PATCH, resnet50, conv"):
        find("model", "resnet51")
