"""Transformers and hybrids: tokens with a grid are layers like any other."""
import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from antehoc_nb.core.export import MapModule
from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.layers import (
    ActivationRecorder,
    candidate_layers,
    choose_layers,
    first_tensor,
    layer_layout,
    layer_table,
    unseen_share,
    with_first_tensor,
)
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import weights_digest
from antehoc_nb.evaluate.explainers import grad_cam

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:explain')]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    "A ViT with some extra tokens before the others; `order` permutes the tokens, `wrap` is what a block returns."
    def __init__(self, extra=1, depth=3, order=None, wrap=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.extra = nn.Parameter(torch.randn(1, extra, 16))
        self.blocks = nn.ModuleList([Returning(wrap) if wrap else Block(16) for _ in range(depth)])
        self.norm, self.head, self.order = nn.LayerNorm(16), nn.Linear(16, 3), order

    def forward(self, x):
        tokens = self.embed(x).flatten(2).mT
        if self.order is not None: tokens = tokens[:, self.order]
        tokens = torch.cat([self.extra.expand(len(x), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
            if isinstance(tokens, tuple): tokens = tokens[0]
            if isinstance(tokens, dict): tokens = tokens['tokens']
        return self.head(self.norm(tokens).mean(1))


class Returning(Block):
    def __init__(self, wrap):
        super().__init__(16)
        self.wrap = wrap

    def forward(self, x): return self.wrap(super().forward(x))


def images(height, width, n=2): return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('extra', [0, 1, 2, 5])
@pytest.mark.parametrize('size', [(64, 64), (64, 96), (128, 64)])
def test_extra_tokens_are_left_out(extra, size):
    cnn, x = Transformer(extra).eval(), images(*size)
    suffix = f'@tokens-{extra}' if extra else '@tokens'
    assert choose_layers(cnn, x, None) == tuple(f'blocks.{i}{suffix}' for i in range(3))
    assert {layer.shape for layer in candidate_layers(cnn, x)} == {(16, size[0] // 8, size[1] // 8)}
    assert set(layer_table(cnn, x).grid) == {f'tokens, {extra} left out' if extra else 'tokens'}


def test_what_is_recorded_is_where_it_should_be():
    cnn, x = Transformer(2).eval(), images(64, 96)
    outputs = []
    cnn.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with ActivationRecorder(cnn, ['blocks.1@tokens-2']) as recorder: cnn(x)
    view, = recorder.values
    assert view.shape == (2, 16, 8, 12) and not view.requires_grad
    for row in range(8): assert torch.equal(view[0, :, row].T, outputs[0][0, 2 + 12 * row:14 + 12 * row])
    assert torch.equal(layer_layout('blocks.1@tokens-2').restore(view, outputs[0]), outputs[0])


@pytest.mark.parametrize('wrap', [lambda tokens: (tokens, None), lambda tokens: dict(tokens=tokens)])
def test_blocks_that_return_more_than_tokens(wrap):
    cnn = Transformer(wrap=wrap).eval()
    assert choose_layers(cnn, images(64, 64), None) == tuple(f'blocks.{i}@tokens-1' for i in range(3))


@pytest.mark.parametrize('order', [torch.arange(64).flip(0), torch.arange(64).view(8, 8).T.flatten(),
                                   torch.arange(64).view(2, 4, 2, 4).transpose(1, 2).flatten(),  # windows of 4 x 4
                                   torch.arange(64).view(4, 2, 4, 2).permute(1, 3, 0, 2).flatten(),  # of each 2 x 2
                                   torch.randperm(64, generator=torch.Generator().manual_seed(0))])
def test_tokens_in_another_order_are_refused(order):
    with pytest.raises(ValueError, match="no block of it holds the images' rows and columns: of 'blocks.0', a change "
                                         'of the image does not show in the same place'):
        AntehocModel(Transformer(order=order).eval(), images(64, 64))


def test_the_first_of_several_tensors():
    Pair = namedtuple('Pair', 'tokens weights')
    a, b = torch.zeros(1), torch.ones(1)
    for output in (a, (a, 5), [a, 5], dict(tokens=a, other=5), Pair(a, 5)):
        assert first_tensor(output) is a
        changed = with_first_tensor(output, b)
        assert type(changed) is type(output) and first_tensor(changed) is b
    assert first_tensor(5) is first_tensor(()) is first_tensor({}) is first_tensor((5, a)) is None


def test_names_of_layers():
    cnn, x = Transformer().eval(), images(64, 64)
    named = 'blocks.1@tokens-1', 'blocks.2@tokens-1'
    assert choose_layers(cnn, x, layers=['blocks.1', 'blocks.2@tokens-1']) == named
    for spec, message in (('blocks.1@last', r"'blocks.1@last' returns \(2, 65, 16\), which is not of the form \(B,H,W"),
                          ('embed@tokens', r"'embed@tokens' returns \(2, 16, 8, 8\).*not of the form \(B,0 \+ H\*W,C"),
                          ('blocks.1@tokens-5', "layer 'blocks.1@tokens-5' does not hold the images' rows and columns"),
                          ('blocks.1@rows', r'is not of the form name\[:call\]\[@last or @tokens\[-n\]\]\[\+relu\]')):
        with pytest.raises(ValueError, match=message): choose_layers(cnn, x, layers=[spec])


@pytest.mark.slow
def test_a_transformer_from_end_to_end(tmp_path):
    cnn, x = Transformer().train(), images(64, 64)
    model, plain = AntehocModel(cnn, x), Transformer().train()
    target = torch.tensor([0, 2])
    for network in (model, plain):
        optimizer = torch.optim.SGD(network.parameters(), .1)
        for _ in range(2):
            out, loss = two_pass_step(model, x, target) if network is model else (plain(x), 0)
            optimizer.zero_grad()
            (F.cross_entropy(out, target) + loss).backward()
            optimizer.step()
    assert weights_digest(cnn) == weights_digest(plain)
    with pytest.warns(UserWarning, match='cannot be built by name'): model.save_pretrained(tmp_path)
    loaded = AntehocModel.from_pretrained(tmp_path, cnn=Transformer())
    expected = model.eval().explain(x)
    assert loaded.layers == model.layers and torch.equal(loaded.explain(x).map, expected.map)
    with torch.inference_mode(): assert torch.equal(model.explain(x).map, expected.map)
    assert model.grids == [((3.5, 8.), (3.5, 8.))] * 3
    exported = torch.export.export(MapModule(model, size=64, trace=False), (x, target))
    assert torch.allclose(exported.module()(x, target)[1], model.explain(x, target=target).map, atol=1e-5)


def test_the_map_depends_on_all_that_the_network_computes():
    "No blind map: with the last block's weights redrawn, the map changes too."
    cnn, x = Transformer().eval(), images(64, 64)
    model = AntehocModel(cnn, x)
    before = model.explain(x).map
    for parameter in cnn.blocks[-1].parameters(): nn.init.normal_(parameter)
    assert model.unseen == 0 and (model.explain(x).map - before).abs().max() > .01


class Blind(nn.Module):
    "Two convolutions, and much work on tokens whose place is lost."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.mix, self.head = nn.Linear(256, 256), nn.Linear(16, 3)

    def forward(self, x): return self.head(self.mix(self.stem(x).flatten(2)).mean(2))


def test_a_blind_map_is_said():
    cnn, x = Blind().eval(), images(64, 64)
    with pytest.warns(UserWarning) as caught: model = AntehocModel(cnn, x)
    share = unseen_share(cnn, x, model.layers)
    assert share == model.unseen and .5 < share < 1
    assert [str(warning.message) for warning in caught] == [
        f'AntehocModel: {share:.0%} of the multiply-adds of Blind come after the last layer that is recorded, '
        "'stem.3', so the map does not show what they look at; name later layers with layers=[...] "
        '(layer_table(cnn, images) lists them)']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert AntehocModel(nn.Sequential(cnn.stem, nn.Conv2d(16, 4, 1)), x).unseen < .5


HYBRIDS = dict(levit_128=224, swinv2_cr_tiny_224=224, volo_d1_224=224, vitamin_small_224=224, crossvit_tiny_240=240,
               nest_tiny=224, vit_tiny_r_s16_p8_224=224)


@pytest.mark.slow
@pytest.mark.parametrize('name', HYBRIDS)
def test_hybrids_are_seen_to_the_end(name):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    cnn, x = timm.create_model(name, num_classes=3).eval(), images(HYBRIDS[name], HYBRIDS[name], n=1)
    assert unseen_share(cnn, x, choose_layers(cnn, x, None)) < .1


TIMM = dict(vit_tiny_patch16_224=dict(img_size=64, depth=2), deit_tiny_distilled_patch16_224=dict(img_size=64, depth=2),
            vit_little_patch16_reg4_gap_256=dict(img_size=64, depth=2), mixer_s32_224=dict(img_size=64),
            swin_tiny_patch4_window7_224=dict(img_size=64, window_size=4, depths=(1, 1, 1, 1), embed_dim=24),
            poolformerv2_s12={}, pvt_v2_b0={}, mobilevit_xxs={}, efficientvit_m0=dict(img_size=64))
LAYOUTS = dict(vit_tiny_patch16_224='@tokens-1', deit_tiny_distilled_patch16_224='@tokens-2', mixer_s32_224='@tokens',
               vit_little_patch16_reg4_gap_256='@tokens-4', swin_tiny_patch4_window7_224='@last')


@pytest.mark.parametrize('name', [name if name in ('vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224')
                                  else pytest.param(name, marks=pytest.mark.slow) for name in TIMM])
def test_transformers_of_timm(name):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    cnn, x = timm.create_model(name, num_classes=3, **TIMM[name]).eval(), images(64, 64)
    model = AntehocModel(cnn, x)
    assert model.unseen < .2
    if name in LAYOUTS: assert {layer_layout(layer).suffix for layer in model.layers} == {LAYOUTS[name]}
    explanation = model.explain(x)
    assert explanation.map.shape == (2, 1, 64, 64) and explanation.map.flatten(1).std(1).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ViT', 'Swin', 'ConvNext'])
def test_transformers_of_hugging_face(name):
    transformers = pytest.importorskip('transformers')
    vit = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=8)
    small = dict(ViT=vit,
                 Swin=dict(embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4),
                 ConvNext=dict(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]))[name]
    torch.manual_seed(0)
    config = getattr(transformers, f'{name}Config')(image_size=64, num_labels=3, **small)
    cnn, x = getattr(transformers, f'{name}ForImageClassification')(config).eval(), images(64, 64)
    model = AntehocModel(cnn)
    explanation = model.explain(x)
    assert explanation.map.shape == (2, 1, 64, 64) and explanation.map.flatten(1).std(1).min() > 0
    assert model.unseen < .2
    torch.testing.assert_close(explanation.pred.logits, cnn(x).logits)
    suffixes = dict(ViT='@tokens-1', Swin='@tokens', ConvNext='')
    assert {layer_layout(layer).suffix for layer in model.layers} == {suffixes[name]}


@pytest.mark.parametrize('extra', [0, 1, 3])
def test_grad_cam_of_tokens_is_that_of_pytorch_grad_cam(extra):
    pytest.importorskip('torchcam')
    cam = pytest.importorskip('pytorch_grad_cam')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    cnn, x = Transformer(extra).eval(), images(64, 64)
    def as_image(tokens): return tokens[:, extra:].mT.unflatten(2, (8, 8))
    with cam.GradCAM(cnn, [cnn.blocks[1]], as_image) as other:
        expected = torch.as_tensor(other(x, [ClassifierOutputTarget(k) for k in (0, 2)]))[:, None]
    found = grad_cam(cnn, x, [0, 2], layer='blocks.1', aligned=False)
    assert (found - expected).abs().max() < .02 and found.std() > .1
