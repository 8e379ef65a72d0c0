"""How much of an output a map keeps, against loops in plain Python; and both passes in a loop of one's own."""
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from workers import bare_cnn, small_cnn

from antehoc_nb.core.interpretation_loss import (
    change_at_area,
    default_loss,
    default_mask,
    output_at_area,
    output_change,
    top_pixels,
    two_pass_step,
)
from antehoc_nb.core.masking import Mask
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import weights_digest

pytestmark = pytest.mark.usefixtures('one_thread')


# --- Which pixels are kept

def kept_by_hand(one_map, share):
    "The highest pixels, one after the other; of equal ones the one whose place in a scattered order is lower."
    height, width = one_map.shape
    pixels = [(-one_map[i, j].item(), (i * 0.7548776662466927 + j * 0.5698402909980532) % 1, i, j)
              for i in range(height) for j in range(width)]
    kept = torch.zeros(height, width)
    for _, _, i, j in sorted(pixels)[:max(1, round(share * height * width))]: kept[i, j] = 1
    return kept


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1e-9, .05, .2, .5, 1]), st.integers(0, 10**6))
def test_top_pixels_written_out(height, width, share, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 4, (3, 1, height, width), generator=generator).float() / 3  # many ties
    kept = top_pixels(maps, share)
    for one_map, one_kept in zip(maps, kept): assert torch.equal(one_kept[0], kept_by_hand(one_map[0], share))


def test_a_constant_map_keeps_pixels_from_all_over_the_image():
    kept = top_pixels(torch.full((1, 1, 64, 48), .3))[0, 0]
    assert kept.sum() == round(.2 * 64 * 48)
    shares = F.avg_pool2d(kept[None], 16)
    assert shares.min() > .15 and shares.max() < .25
    assert kept.mean(0).max() < .5 and kept.mean(1).max() < .5  # no rows or columns


@pytest.mark.parametrize('maps, share, message', [
    (torch.rand(1, 1, 4, 4), 0, r'share=0 must lie in \(0,1\]'),
    (torch.rand(1, 1, 4, 4), 1.2, r'share=1.2 must lie in \(0,1\]'),
    (torch.rand(1, 4, 4), .2, r'maps must be \(B,1,H,W\), got \(1, 4, 4\)'),
    (torch.rand(1, 3, 4, 4), .2, r'maps must be \(B,1,H,W\), got \(1, 3, 4, 4\)'),
])
def test_what_top_pixels_refuses(maps, share, message):
    with pytest.raises(ValueError, match=message): top_pixels(maps, share)


# --- How much the output changes

def by_hand(model, x, maps, target, share, fill):
    "In per cent, image by image."
    black = (0 - model.mean) / model.std
    other = black.expand(1, 3, 1, 1) if fill == 'black' else (torch.tensor(fill) - model.mean) / model.std
    drops = []
    for i in range(len(x)):
        kept = kept_by_hand(maps[i, 0], share)
        masked = x[i:i + 1] * kept + other * (1 - kept)
        before, after = model.cnn(x[i:i + 1])[0].double().softmax(0), model.cnn(masked)[0].double().softmax(0)
        k = before.argmax() if target is None else target[i]
        drops.append(max(0, (before[k] - after[k]).item()) / before[k].item())
    return 100 * sum(drops) / len(drops)


@pytest.mark.parametrize('share', [.2, .5])
@pytest.mark.parametrize('fill', ['black', .5])
@pytest.mark.parametrize('targeted', [False, True])
def test_the_average_drop_written_out(share, fill, targeted):
    torch.manual_seed(1)
    model = AntehocModel(bare_cnn(), torch.rand(2, 3, 16, 16), mean=[.5, .4, .3], std=[.2, .3, .25])
    x, maps = torch.randn(5, 3, 16, 16) * 3, torch.rand(5, 1, 16, 16)
    target = torch.arange(5) if targeted else None
    with torch.no_grad():
        got = change_at_area(model, x, maps, target=target, share=share, fill=fill)
        want = by_hand(model, x, maps, target, share, fill)
        given = change_at_area(model, x, maps, model.cnn(x), target, share, fill)
    assert got == pytest.approx(want, abs=1e-3) and got > 0
    assert given == pytest.approx(want, abs=1e-3)


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_the_change_of_other_outputs_written_out(images, numbers, seed):
    generator = torch.Generator().manual_seed(seed)
    y1, y2 = [torch.randn(images, numbers, generator=generator) for _ in range(2)]
    mean = y1.mean(0)
    changes = []
    for a, b in zip(y1, y2):
        distance, from_mean = (b - a).square().sum().item(), (a - mean).square().sum().item()
        changes.append(min(1., distance / from_mean))
    expected = torch.tensor(changes, dtype=torch.float64)
    torch.testing.assert_close(output_change(y1, y2, activation=None), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(output_change((y1, y1), [y2, y2]), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(output_change(y1[:, :, None], y2[:, :, None]), expected, atol=1e-4, rtol=1e-3)
    assert output_change(y1, y1.clone(), activation=None).eq(0).all()


def test_outputs_at_the_edge():
    same = torch.ones(3, 2)
    assert output_change(same, same, activation=None).tolist() == [0, 0, 0]  # nothing to lose, nothing lost
    assert output_change(same, same + 1, activation=None).tolist() == [1, 1, 1]
    assert output_change(torch.tensor([2.]), torch.tensor([1.])).tolist() == [.25]  # one image: against 0
    assert output_change(same, torch.full((3, 2), float('nan')), activation=None).isnan().all()
    certain = torch.tensor([[500., 0]])
    assert output_change(certain, certain.flip(1)).tolist() == [1]
    assert output_change(certain, certain, torch.tensor([1])).tolist() == [0]  # a probability that underflows
    with pytest.raises(ValueError, match='no floating-point tensor'): output_change('text', 'text')
    with pytest.raises(ValueError, match="activation='relu': choose 'softmax'"):
        output_change(same, same, activation='relu')
    with pytest.raises(ValueError, match=r'one tensor of logits, \(B,K\) with K > 1; got \[\(3,\)\]'):
        output_change(torch.ones(3), torch.ones(3), activation='sigmoid')


def test_measuring_leaves_no_trace():
    torch.manual_seed(0)
    cnn = small_cnn().train()
    model = SimpleNamespace(cnn=cnn, mean=0., std=1.)
    before = weights_digest(cnn)
    x, maps = torch.rand(4, 3, 16, 16), torch.rand(4, 1, 16, 16, requires_grad=True)
    state = torch.random.get_rng_state()
    first, second = [change_at_area(model, x, maps) for _ in range(2)]
    assert first == second  # no dropout
    assert torch.equal(torch.random.get_rng_state(), state)
    assert weights_digest(cnn) == before and cnn.training and all(p.requires_grad for p in cnn.parameters())
    assert not output_at_area(model, x, maps).requires_grad


# --- Both passes in a loop of one's own

def batches(n=4, bs=6):
    generator = torch.Generator().manual_seed(5)
    return [(torch.rand(bs, 3, 16, 16, generator=generator), torch.randint(0, 10, (bs,), generator=generator))
            for _ in range(n)]


class Recomputing(nn.Module):
    "Half of it is computed again in the backward pass, to save memory."
    def __init__(self):
        super().__init__()
        self.net = small_cnn()

    def forward(self, x):
        return self.net[2:](torch.utils.checkpoint.checkpoint(self.net[:2], x, use_reentrant=False))


def trained_by_hand(weight_net=None, cnn=small_cnn, autocast=None, accumulate=1, scaled=False, **kwargs):
    "A CNN after a few steps of a plain loop, and the model around it."
    torch.manual_seed(3)
    net = cnn()
    state = torch.random.get_rng_state()
    model = AntehocModel(net, torch.rand(2, 3, 16, 16), weight_net=weight_net).train() if weight_net else net.train()
    torch.random.set_rng_state(state)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10, enabled=scaled)
    start = weights_digest(net)
    for i, (x, y) in enumerate(batches()):
        with torch.autocast('cpu', autocast, enabled=autocast is not None):
            if weight_net: out, int_loss = two_pass_step(model, x, label=y, **kwargs)
            else: out, int_loss = model(x), 0.
            loss = F.cross_entropy(out.float(), y) + int_loss
        scaler.scale(loss / accumulate).backward()
        if (i + 1) % accumulate: continue
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert weights_digest(net) != start
    return weights_digest(net), model


@pytest.mark.parametrize('weight_net', ['paper', 'auto'])
@pytest.mark.parametrize('kwargs', [
    {}, dict(autocast=torch.bfloat16), dict(autocast=torch.float16, scaled=True), dict(accumulate=2),
    dict(cnn=Recomputing),
], ids=['plain', 'bf16', 'fp16', 'accumulated', 'recomputing'])
def test_the_cnn_is_bit_identical_in_a_loop_of_ones_own(weight_net, kwargs):
    plain, _ = trained_by_hand(**kwargs)
    ours, model = trained_by_hand(weight_net, **kwargs)
    assert plain == ours
    assert model.weight_net.autoencoder.out.weight.abs().max() > 0  # the weight network has learnt
    assert model.images_seen == 24 and not model.recording and model.take_recorded() is None
    assert all(p.requires_grad for p in model.parameters()) and model.cnn.training


def test_gradients_stay_apart_and_are_those_of_the_loss():
    torch.manual_seed(0)
    model = AntehocModel(bare_cnn(), torch.rand(2, 3, 16, 16), weight_net='paper').train()
    nn.init.normal_(model.weight_net.autoencoder.out.weight, std=.1)
    (x, y), *_ = batches()
    out, int_loss = two_pass_step(model, x, mask='soft')
    int_loss.backward()
    assert all(p.grad is None for p in model.cnn.parameters())
    got = [p.grad.clone() for p in model.weight_net.parameters()]
    model.recording = True
    y1 = model(x)
    maps, *_ = model.interpret(model.take_recorded(), x.shape[2:])
    error = (model.cnn(model.mask(x, maps)) - y1.detach()).square().sum(1)
    of_constant = (y1 - y1.mean(0)).detach().square().sum(1).mean()
    loss = (1 + error / of_constant).log2().mean()
    want = torch.autograd.grad(loss, list(model.weight_net.parameters()))
    torch.testing.assert_close(int_loss.detach(), loss.detach(), atol=1e-5, rtol=1e-3)
    for mine, theirs in zip(got, want): assert (mine - theirs).norm() <= 1e-3 * theirs.norm()
    model.zero_grad()
    F.cross_entropy(out, y).backward()
    assert all(p.grad is None for p in model.weight_net.parameters())
    assert all(p.grad is not None for p in model.cnn.parameters())


def test_running_numbers_of_a_loop_of_ones_own():
    class Numbers(Mask):
        def __call__(self, maps, number):
            seen.append(number.tolist())
            return maps
    seen = []
    model = AntehocModel(bare_cnn(), torch.rand(2, 3, 16, 16), weight_net='paper').train()
    x = torch.rand(3, 3, 16, 16)
    for number in (None, None, 100, None, torch.tensor([7, 5, 6])):
        two_pass_step(model, x, number=number, mask=Numbers())
    assert seen == [[0, 1, 2], [3, 4, 5], [100, 101, 102], [103, 104, 105], [7, 5, 6]]
    model.eval()
    two_pass_step(model, x, mask=Numbers())  # validation: a soft mask, and nothing is counted
    assert len(seen) == 5 and model.images_seen == 106
    assert copy.deepcopy(model).images_seen == 106


def test_validation_and_what_is_not_trained():
    torch.manual_seed(0)
    model = AntehocModel(small_cnn(), torch.rand(2, 3, 16, 16), weight_net='auto')
    (x, y), *_ = batches()
    model.eval()
    with torch.no_grad():
        out, int_loss = two_pass_step(model, x, label=y)
        again = two_pass_step(model, x, label=y)[1]
    assert not out.requires_grad and not int_loss.requires_grad and int_loss == again
    model.train()
    for p in model.weight_net.parameters(): p.requires_grad_(False)
    out, int_loss = two_pass_step(model, x, label=y)
    assert out.requires_grad and not int_loss.requires_grad
    for p in model.parameters(): p.requires_grad_(not p.requires_grad)
    out, int_loss = two_pass_step(model, x, label=y)
    assert not out.requires_grad and int_loss.requires_grad
    with pytest.raises(ValueError, match='labels must be class numbers'): two_pass_step(model, x, label=y.float())
    with pytest.raises(ValueError, match="unknown mask 'hard'"): two_pass_step(model, x, mask='hard')
    with pytest.raises(TypeError, match='two_pass_step: model is a Sequential; wrap it first: AntehocModel'):
        two_pass_step(small_cnn(), x)
    for wrong, message in (
            (dict(x=(x, y)), 'two_pass_step: x is a tuple; give a tensor of images (B,C,H,W); take the images and '
                             'labels out of the batch: x, y = batch'),
            (dict(x=x.numpy()), 'two_pass_step: x is a ndarray; give a tensor of images (B,C,H,W)'),
            (dict(label=y.numpy()), 'two_pass_step: label is a ndarray; give a tensor: torch.as_tensor(label)'),
            (dict(label=y.tolist()), 'two_pass_step: label is a list; give a tensor: torch.as_tensor(label)')):
        with pytest.raises(TypeError) as e: two_pass_step(model, **dict(x=x, label=y) | wrong)
        assert str(e.value) == message


@pytest.mark.parametrize('weight_net', ['paper', 'auto'])
def test_the_defaults_are_those_of_the_callback(weight_net):
    from fastai.learner import Learner
    from workers import scenes

    from antehoc_nb.train.two_pass import TwoPass
    learn = Learner(scenes(n=16), small_cnn(), cbs=TwoPass(weight_net=weight_net))
    assert learn.two_pass.mask == default_mask(learn.model) and learn.two_pass.int_loss == default_loss(learn.model)
