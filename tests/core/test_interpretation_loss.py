"""The targets of pass 2, and the loss of class-specific weight networks, against what they are by definition."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from antehoc_nb.core.interpretation_loss import draw_targets, int_losses

pytestmark = pytest.mark.usefixtures('one_thread')


@given(st.integers(1, 8), st.integers(2, 12), st.integers(0, 10**6))
def test_targets_are_classes(images, classes, start):
    y1, label = torch.randn(images, classes) * 5, torch.randint(0, classes, (images,))
    number = torch.arange(start, start + images)
    for labels in (label, label.int(), label.byte(), None, torch.full((images,), -100)):
        for numbers in (number, None):
            target = draw_targets(y1, labels, numbers)
            assert target.shape == (images,) and target.dtype == torch.int64
            assert 0 <= target.min() and target.max() < classes
            assert torch.equal(target, draw_targets(y1, labels, numbers))  # nothing is drawn from a stream
    assert torch.equal(draw_targets(y1, label.int(), None), label)
    assert torch.equal(draw_targets(y1, None, None), y1.argmax(1))


@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 10**6), st.integers(0, 2**30))
def test_targets_of_captions_are_their_words(images, length, start, seed):
    "All the words of a caption, or one of them; never a place without a word."
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-1, 5, (images, length), generator=generator)
    logits = torch.zeros(images, length, 5)
    targets = draw_targets(logits, words, torch.arange(start, start + images))
    for target, caption in zip(targets, words):
        drawn = target >= 0
        assert torch.equal(target[drawn], caption[drawn]) and (drawn & (caption < 0)).sum() == 0
        assert torch.equal(target, caption) or drawn.sum() == 1
    assert torch.equal(draw_targets(logits, words, None), words)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**30))
def test_cross_entropy_of_words_written_out(images, length, seed):
    torch.manual_seed(seed)
    y2, targets = torch.randn(images, length, 7), torch.randint(-3, 7, (images, length), dtype=torch.int32)
    log_probability = y2.log_softmax(2)
    def of(log_p):
        loss = -log_p / math.log(7)
        return loss if loss <= 2 else 2 + 2 * math.log(loss / 2)
    losses = [[of(log_probability[i, t, word].item()) for t, word in enumerate(targets[i].tolist()) if word >= 0]
              for i in range(images)]
    expected = sum(sum(each) / len(each) for each in losses if each) / images
    assert int_losses['cross_entropy'](y2, targets).item() == pytest.approx(expected, abs=1e-4)
