"""What a layer may give: maps, channels at the end, tokens, dicts and lists of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from proac_cuda import ProACRegularizer
from regularizer_models import Says, batch, tokens_of, with_prefix

OUTPUTS = {  # and the layout that has to be said
    "a map": (lambda x: x, None),
    "a map of which this is said": (lambda x: x, "channels_first"),
    "channels at the end": (lambda x: x.movedim(1, 3), "channels_last"),
    "a dict": (lambda x: {"aux": x[:, :3], "out": x}, None),
    "a Hugging Face output": (lambda x: {"last_hidden_state": tokens_of(x), "hidden_states": (x, x)}, None),
    "a Hugging Face output of maps": (lambda x: {"last_hidden_state": x, "hidden_states": (x, x)}, None),
    "a backbone's output": (lambda x: {"feature_maps": (x[:, :2], x)}, None),
    "maps of all stages": (lambda x: [x[:, :2, ::2], x[:, :3], x], None),
    "tokens": (tokens_of, "tokens"),
    "tokens, said otherwise": (tokens_of, "channels_last"),
    "tokens beside numbers": (lambda x: (tokens_of(x), 16, 20), "tokens"),
    "tokens after a class token": (lambda x: (with_prefix(x, 1), None), "tokens"),
    "tokens after a class token and four registers": (lambda x: with_prefix(x, 5), "tokens"),
}


@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("name", OUTPUTS)
def test_what_layers_give(name, channels):
    make, layout = OUTPUTS[name]
    model, (images, labels) = nn.Sequential(Says(make)), batch()
    proac = ProACRegularizer(model, "0", 5, embedding_dim=8, layout=layout, in_channels=channels)
    model(images)
    value = proac(labels)
    torch.testing.assert_close(value, proac.loss(proac.head(model[0].convolution(images)), labels))
    assert proac.in_channels == 6


@pytest.mark.parametrize(
    "name", [name for name, (_, layout) in OUTPUTS.items() if layout not in (None, "channels_first")]
)
def test_a_layout_that_nobody_said(name):
    """Channels that were said tell nothing of the layout."""
    for channels in (None, 6, 16, 320):
        model, (images, labels) = nn.Sequential(Says(OUTPUTS[name][0])), batch()
        proac = ProACRegularizer(model, "0", 5, embedding_dim=8, in_channels=channels)
        model(images)
        with pytest.raises(ValueError, match=r"layer '0': .*layout="):
            proac(labels)


def test_a_map_that_could_be_either():
    """(B, 64, 64, 64): a convolution's is known; of another layer's, the layout has to be said, once."""
    images, labels = torch.randn(2, 3, 16, 16), torch.randint(0, 5, (2, 16, 16))
    convolution = nn.Conv2d(3, 16, 1)
    proac = ProACRegularizer(nn.Sequential(convolution, nn.ReLU()), "", 5, embedding_dim=8)
    convolution(images)
    model = nn.Sequential(Says(lambda x: convolution(x[:, :3])))
    for layout in (None, "channels_first", "channels_last"):
        proac = ProACRegularizer(model, "0", 5, embedding_dim=8, layout=layout)
        model(images)
        if layout is None:
            with pytest.raises(ValueError, match=r'\(2, 16, 16, 16\).*layout="channels_last"'):
                proac(labels)
            continue
        features = convolution(model[0].convolution(images)[:, :3])
        value = proac(labels)
        expected = features if layout == "channels_first" else features.movedim(3, 1)
        torch.testing.assert_close(value, proac.loss(proac.head(expected), labels))
    proac = ProACRegularizer(model, "0", 5, embedding_dim=8)
    model(images[:, :, :12])
    proac(labels[:, :12])
    model(images)
    assert proac(labels) > 0, "clear at one size, and so at another"


def test_a_wrong_guess_of_old():
    """A layer whose last registered part has other channels than it gives (yolo26m-sem's model.16: 64, and 256 on 64 x 64)."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(32, 32, 1)
            self.inner = nn.Conv2d(3, 8, 8, 8)  # registered last, run first

        def forward(self, images):
            x = self.inner(images)
            return self.last(torch.cat([x] * 4, 1))

    model, images, labels = nn.Sequential(Block()), torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    proac = ProACRegularizer(model, "0", 5, embedding_dim=16)
    model(images)
    value = proac(labels)  # (2, 32, 8, 8), whose width is what was guessed
    assert proac.head[0].weight.shape == (16, 32, 1, 1)
    torch.testing.assert_close(value, proac.loss(proac.head(model(images)), labels))
    proac.discard()
    proac = ProACRegularizer(model, "0", 5, in_channels=8)
    model(images)
    with pytest.raises(ValueError, match=r"\(B, 8, H, W\), got \(2, 32, 8, 8\); pass in_channels=32"):
        proac(labels)


KINDS = {
    "convolution": (nn.Conv2d(6, 4, 1), 4),
    "transposed convolution": (nn.ConvTranspose2d(6, 4, 1), 4),
    "norm and activation": (nn.Sequential(nn.Conv2d(6, 7, 1), nn.BatchNorm2d(7), nn.ReLU(), nn.Dropout2d()), 7),
    "group norm": (nn.GroupNorm(2, 6), 6),
}


@pytest.mark.parametrize("name", KINDS)
def test_layers_whose_channels_are_known(name):
    layer, channels = KINDS[name]
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5, embedding_dim=8)
    assert proac.in_channels == channels and proac.head[0].weight.shape == (8, channels, 1, 1)


class _Normed(nn.LayerNorm):
    """As in several libraries: a LayerNorm of maps with channels first."""

    def forward(self, x):
        return super().forward(x.movedim(1, 3)).movedim(3, 1)


@pytest.mark.parametrize(
    "layer, ndim",
    [
        (nn.Linear(6, 6), 4),
        (nn.Linear(6, 6), 3),
        (nn.LayerNorm(6), 4),
        (nn.LayerNorm(6), 3),
        (nn.Sequential(nn.Linear(6, 6), nn.GELU()), 4),
        (nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), 3),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), 1), 3),
        (_Normed(6), 0),
    ],
)
def test_layers_known_to_have_channels_at_the_end(layer, ndim):
    maps, labels = torch.randn(2, 6, 8, 10), torch.randint(0, 5, (2, 16, 20))
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5, embedding_dim=8)
    given = {0: maps, 3: tokens_of(maps), 4: maps.movedim(1, 3)}[ndim]
    output = layer(given)
    value = proac(labels)
    expected = output if ndim == 0 else output.reshape(2, 8, 10, 6).movedim(-1, 1)
    torch.testing.assert_close(value, proac.loss(proac.head(expected), labels))


def test_tokens_of_sequence_first_encoders_are_not_known():
    layer = nn.TransformerEncoderLayer(6, 2, 8)  # (N, B, C)
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5)
    layer(torch.randn(80, 2, 6))
    with pytest.raises(ValueError, match='layout="tokens"'):
        proac(torch.randint(0, 5, (2, 16, 20)))


def test_tokens_of_patches_that_cross_the_border():
    model, images = nn.Sequential(nn.Conv2d(3, 6, 4, 4, padding=2), nn.Flatten(2)), torch.randn(2, 3, 16, 34)
    proac = ProACRegularizer(model, "1", 5, layout="tokens", select=lambda x: x.transpose(1, 2))
    model(images)  # 5 x 9 patches, for labels in proportions of 8 : 17
    assert proac(torch.randint(0, 5, (2, 16, 34))).item() > 0


def test_tokens_that_could_be_two_grids():
    """Nine tokens are 3 x 3, or 2 x 2 after a class token and four registers."""
    layer = nn.Linear(6, 6)
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5)
    layer(torch.randn(2, 9, 6))
    with pytest.raises(ValueError, match=r"9 tokens.*\(3, 3\) after 0.*\(2, 2\) after 5.*select="):
        proac(torch.randint(0, 5, (2, 24, 24)))


def test_outputs_that_need_select():
    model, (images, labels) = nn.Sequential(Says(lambda x: {"deep": x})), batch()
    proac = ProACRegularizer(model, "0", 5)
    model(images)
    with pytest.raises(TypeError, match="got dict; pass select="):
        proac(labels)
    proac = ProACRegularizer(model, "0", 5, select=lambda output: output["deep"])
    model(images)
    assert proac(labels).item() > 0
    proac = ProACRegularizer(model, "0", 5, in_channels=7, select=lambda output: output["deep"])
    model(images)
    with pytest.raises(ValueError, match=r"\(B, 7, H, W\), got \(2, 6, 16, 20\); pass in_channels="):
        proac(labels)
    proac = ProACRegularizer(model, "0", 5, layout="tokens", select=lambda output: tokens_of(output["deep"])[:, 7:])
    model(images)
    with pytest.raises(ValueError, match=r"313 tokens.*\(2, 16, 20\); pass select="):
        proac(labels)
    proac = ProACRegularizer(model, "0", 5, layout="tokens", select=lambda output: output["deep"])
    model(images)
    with pytest.raises(ValueError, match=r"expected tokens \(B, N, C\), got an output \(2, 6, 16, 20\)"):
        proac(labels)


def test_a_list_of_maps():
    """Deep supervision: the regularizer takes the last; the loss says how to have all."""
    maps = [torch.randn(2, 6, 8, 10), torch.randn(2, 6, 16, 20)]
    layer, labels = nn.Identity(), batch()[1]
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5, embedding_dim=8)
    layer(maps)
    torch.testing.assert_close(proac(labels), proac.loss(proac.head(maps[1]), labels))
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5, layout="tokens")
    layer([tokens_of(part) for part in maps])
    with pytest.raises(TypeError, match="list of 2 tensors.*pass select="):
        proac(labels)
    for given in (maps, tuple(maps)):
        with pytest.raises(TypeError, match="features: .* of 2 tensors.*call the loss once for each"):
            proac.loss(given, labels)
    layer(maps)
    with pytest.raises(TypeError, match="labels: .*list"):
        proac([labels, labels])
