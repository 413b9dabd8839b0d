"""From a word's logit to the patches of the image: two exact sums.

The pooled vector is a mean, and the head linear once its norm's deviation is taken from the image:
so the logit of any word is a sum over the patches, exactly. `output_shares` splits it at the
encoder's output, where attention has already mixed the patches, and `input_shares` at its input,
where a patch is still what it shows. A CLIP that reads a class token has no such sum at its output.
The paper does not speak of it; `show.py words` draws it. Models must be in evaluation mode.

Letters in the shapes:  B images, N patches, S image size, D width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from superclass import SuperClass


@torch.inference_mode()
def output_shares(
    model: SuperClass, images: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Each patch's exact share of a logit, split where the head reads: the encoder's output.

    Let z_n be the encoder's N tokens (its own last norm included), p = 1/N sum of z_n the pooled
    vector, m and s the mean and the deviation of p's D numbers, and w, b a row of the head. Then

        logit = w . (gamma (p - m) / s + beta) + b
              = sum over n of  1/N w . gamma (z_n - mean of z_n) / s    +    w . beta + b

    because m is the mean over n of the means of z_n: with the image's own s, the norm is linear.
    What is left over, w . beta + b, belongs to no patch. A weighted sum of logits splits likewise.
    It is computed in float32 from whatever the encoder gives, under autocast too.

    Args:
        images: [B, 3, S, S], normalised.
        token_weights: [V] or [B, V]: coefficients of the weighted sum of logits to split, such as a
            one at a single token.
    Returns:
        shares [B, N] and the constants [B]; together they sum to the weighted logits.
    """
    z = model.encoder(images).float()  # [B, N, D]
    with torch.autocast(images.device.type, enabled=False):
        w = token_weights.float() @ model.head.weight.float()  # [D] or [B, D]
        deviation = (z.mean(dim=1).var(dim=1, correction=0) + model.norm.eps).sqrt()  # [B]
        centred = (z - z.mean(dim=2, keepdim=True)) / deviation[:, None, None]  # [B, N, D]
        shares = (centred * (w * model.norm.weight).unsqueeze(-2)).sum(dim=2) / z.shape[1]
        constant = w @ model.norm.bias.float() + token_weights.float() @ model.head.bias.float()
    return shares, constant.expand(len(z))


def input_shares(model: SuperClass, images: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each patch's share of a logit, split where it comes from: the pixels.

    With the attention, the deviations in the norms and the gates of the GELUs held at the values
    that they have for this image (`Held`), the whole model is affine in its pixels: a logit is then
    a sum over pixels, gradient x pixel, and what the held model makes of an image of zeros, which
    comes from biases and positions. That sum is exact too, but conditional: it does not say what
    would happen to the attention without the patch. A pixel of the data's mean colour is zero, and
    has no share. Of a convolutional encoder this holds with its ReLU, max pooling and batch norm.

    Args, returns: as those of `output_shares`; N squares of pixels, a token's each. Always float32.
    """
    pixels = images.detach().float().requires_grad_()
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False), Held():
        tokens = model.encoder(pixels)  # [B, N, D]
        logits = model.head(model.norm(tokens.mean(dim=1)))  # [B, V]
        chosen = (logits * token_weights).sum(dim=1)  # [B]
        (gradient,) = torch.autograd.grad(chosen.sum(), pixels)
    by_pixel = (gradient * pixels).sum(dim=1).detach()  # [B, S, S]
    side, size = math.isqrt(tokens.shape[1]), images.shape[-1]
    rows = F.one_hot(torch.arange(size, device=images.device) * side // size).float()  # [S, side]
    shares = (rows.T @ by_pixel @ rows).flatten(1)  # [B, N]
    return shares, chosen.detach() - shares.sum(dim=1)


class Held(TorchFunctionMode):
    """Within it, layer norm, GELU and attention are linear in their input: factors are constants.

    Values stay the same; gradients are those of the linear map.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = self.LINEAR.get(function, function)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        dims = tuple(range(-len(shape), 0))
        centred = x - x.mean(dims, keepdim=True)
        x = centred * (centred.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    @staticmethod
    def gelu(x, **kwargs):
        gate = F.gelu(x.detach(), **kwargs) / x.detach()
        return x * gate.nan_to_num(0.5)  # 0 / 0 at zero

    @staticmethod
    def attention(q, k, v):
        scores = q.detach() @ k.detach().transpose(-1, -2) * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1) @ v

    LINEAR = {
        F.layer_norm: layer_norm,
        F.gelu: gelu,
        F.scaled_dot_product_attention: attention,
    }


SHARES = {"input": input_shares, "output": output_shares}
