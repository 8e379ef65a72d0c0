"""Captions: data in both layouts, the captioner and its second pass, maps of words, and the run behind Table 4."""
import hashlib
import subprocess
import sys
import threading
import warnings
import zipfile
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import numpy as np
import pytest
import torch
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchmetrics.functional.text import bleu_score
from typer.testing import CliRunner

from antehoc_nb.cli import app
from antehoc_nb.core.interpretation_loss import int_losses
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import weights_digest
from antehoc_nb.data import captions as D
from antehoc_nb.evaluate.explainers import explain_with, explainers, grad_cam, score_cam
from antehoc_nb.show.plots import ConceptRegion
from antehoc_nb.tasks import captioner as C
from antehoc_nb.tasks import captioner as M
from antehoc_nb.tasks import captioning as T
from antehoc_nb.train.archs import rebuild_cnn

pytestmark = pytest.mark.usefixtures('one_thread', 'without_figures')
WORDS = 'a red green blue one two three above left of'.split()


@pytest.fixture(scope='module')
def data(): return D.digit_captions(16, 4, 6, 32)


@pytest.fixture(scope='module')
def tok(data): return D.caption_tokenizer([c for i in data.of('train') for c in data.captions[i]], 1)


@pytest.fixture(scope='module')
def dls(data, tok): return D.caption_dls(data, tok, 32, 8)


@pytest.fixture(scope='module')
def learn(dls):
    set_seed(0)
    learn = C.caption_learner(dls, 'small_cnn', False, 16, 32, eta=6)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 3e-3)
    return learn


def batch(dls): return [o.as_subclass(torch.Tensor) for o in dls.valid.one_batch()[:2]]


@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), min_size=1, max_size=4))
def test_tokens_and_back(captions):
    "Known words survive; short captions are padded at the end; case and punctuation do not matter"
    tok = D.caption_tokenizer([' '.join(WORDS)], 1)
    texts = [' '.join(c) for c in captions]
    t = D.encode_captions(tok, [f' {text.upper()} .' for text in texts])
    assert D.decode_captions(tok, t) == texts and t.shape[1] == 2 + max(map(len, captions))
    n = (t != 0).sum(1)
    assert n.tolist() == [2 + len(c) for c in captions] and all((r[k:] == 0).all() for r, k in zip(t, n))


def test_rare_words_are_unknown():
    tok = D.caption_tokenizer(['a dog', 'a dog', 'a zebra'], 2)
    assert D.decode_captions(tok, D.encode_captions(tok, ['a zebra'], D.UNK)) == ['a <unk>']
    assert D.words_of(tok, 'A Zebra!') == ['a', 'zebra']
    assert D.caption_tokenizer(['a b c a b a'], 1, max_words=2).get_vocab_size() == 6
    with pytest.raises(ValueError, match=r"unknown words \['zebra'\]; the vocabulary has 6 entries"):
        D.encode_captions(tok, ['a zebra'])
    with pytest.raises(ValueError, match='number 0 is empty'): D.encode_captions(tok, [''])
    with pytest.raises(ValueError, match='min_freq=0: 1 or more'): D.caption_tokenizer(['a'], 0)


def flickr(d, n=12):
    "Flickr-8k's archives, small"
    names = [f'{i}_0.jpg' for i in range(n)]
    with zipfile.ZipFile(d/'Flickr8k_Dataset.zip', 'w') as z:
        for f in names:
            Image.new('RGB', (24, 18), (int(f[0]) * 20, 80, 9)).save(d/f)
            z.write(d/f, f'Flicker8k_Dataset/{f}')
            z.writestr(f'__MACOSX/Flicker8k_Dataset/._{f}', b'shadow')
    with zipfile.ZipFile(d/'Flickr8k_text.zip', 'w') as z:
        lines = [f'{f}#{k}\tA dog with a ball , number {k} .\n' for f in names for k in range(5)]
        z.writestr('Flickr8k.token.txt', ''.join(lines) + 'broken line\nx.jpg#0\t \n')
        for split, part in (('train', names[:8]), ('dev', names[8:10]), ('test', names[10:])):
            z.writestr(f'Flickr_8k.{split}Images.txt', '\n'.join(part))
    return names


def test_flickr8k_is_downloaded_checked_and_read(tmp_path, monkeypatch):
    "The real download code, on a server of this machine; broken lines are reported by number and the rest is used"
    names = flickr(tmp_path)
    srv = HTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    monkeypatch.setenv('ANTEHOC_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(D, 'FLICKR8K_URL', f'http://127.0.0.1:{srv.server_port}/')
    try:
        with pytest.raises(ValueError, match='the file is corrupt and was removed'): D.flickr8k()
        digests = {f: hashlib.md5((tmp_path/f).read_bytes()).hexdigest() for f in D.FLICKR8K_MD5}
        monkeypatch.setattr(D, 'FLICKR8K_MD5', digests)
        with pytest.warns(UserWarning, match='2 lines or images are not used: .*line 61: neither a tab nor a comma'
                                             '.*line 62: the caption of x.jpg is empty'):
            c = D.flickr8k()
    finally:
        srv.shutdown()
        srv.server_close()
    assert [len(c.of(s)) for s in D.SPLIT_NAMES] == [8, 2, 2] and sorted(map(c.name, range(12))) == sorted(names)
    assert all(f.stat().st_size > 100 for f in c.images) and c.captions[0][4] == 'A dog with a ball , number 4 .'
    assert len(D.caption_dls(c, D.caption_tokenizer(c.captions[0], 1), 32, 4).train_ds) == 40


def test_bad_captions_are_named(tmp_path):
    (tmp_path/'Images').mkdir()
    for f in ('a.jpg', 'b.jpg'): Image.new('RGB', (9, 9)).save(tmp_path/'Images'/f)
    with pytest.raises(FileNotFoundError, match='neither Flickr8k.token.txt nor captions.txt is in it'):
        D.flickr8k(tmp_path)
    (tmp_path/'captions.txt').write_text('image,caption\n')
    with pytest.raises(ValueError, match='no line holds an image and its caption, it is empty'): D.flickr8k(tmp_path)
    (tmp_path/'captions.txt').write_text('image,caption\na.jpg,"A ""big"" dog, wet"\nnot a file,A dog\n')
    captions, bad = D.read_captions(tmp_path/'captions.txt')
    assert captions == {'a.jpg': ['A "big" dog, wet']}
    assert bad == ["captions.txt line 3: 'not a file' is not the name of an image file"]
    for split, part in (('train', 'a.jpg'), ('dev', 'b.jpg'), ('test', '')):
        (tmp_path/f'Flickr_8k.{split}Images.txt').write_text(part)
    lacking = r'1 of 2 images lack something, the first is b.jpg \(no captions\)'
    with pytest.raises(ValueError, match=f"{lacking}; lacking='drop'"): D.flickr8k(tmp_path)
    with pytest.warns(UserWarning, match='b.jpg: left out, it has no captions'):
        c = D.flickr8k(tmp_path, lacking='drop')
    with pytest.raises(ValueError, match=r"split='test': it has no images; there are \['train'\]"): c.of('test')
    with pytest.raises(ValueError, match="lacking='no': choose"): D.flickr8k(tmp_path, lacking='no')
    (tmp_path/'Flickr_8k.devImages.txt').unlink()
    missing = 'Flickr_8k.devImages.txt is missing, others of the official lists are there'
    with pytest.raises(FileNotFoundError, match=missing): D.flickr8k(tmp_path)
    for split in ('train', 'test'): (tmp_path/f'Flickr_8k.{split}Images.txt').unlink()
    with pytest.raises(ValueError, match=lacking): D.flickr8k(tmp_path)
    with pytest.raises(ValueError, match='captions: a list for each image; a.jpg has a text'):
        D.Captioned(['a.jpg'], ['a dog'], ['train'])
    with pytest.raises(ValueError, match='split: no image is for training'): D.Captioned(['a.jpg'], [['a']], ['test'])


@pytest.mark.slow
@pytest.mark.parametrize('arch', [
    pytest.param('resnet18_half', id='half'), pytest.param('timm/resnet18', id='timm', marks=pytest.mark.slow),
    pytest.param(None, id='own')])
def test_any_backbone_is_left_as_it_is(data, tok, arch):
    "The captioner that explains itself is the plain one, to the bit"
    digests = []
    for explain in (True, False):
        set_seed(3)
        body = arch or nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        learn = C.caption_learner(D.caption_dls(data, tok, 32, 16, shuffle=False), body, False, 8, 16, explain=explain)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        digests.append(weights_digest(learn.model.cnn if explain else learn.model))
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_pass_two_masks_the_image_alone(dls):
    "The captioner is given the same words in both passes, and an image that differs"
    learn = C.caption_learner(dls, 'small_cnn', False, 8, 16, eta=6)
    seen = []

    def note(cnn, args):
        seen.append([tensor.detach().clone() for tensor in args])
        return args  # pass 2 does not call a hook that only watches
    learn.model.cnn.register_forward_pre_hook(note)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    (x1, t1), (x2, t2) = seen[:2]
    assert torch.equal(t1, t2) and not torch.equal(x1, x2) and x1.shape == x2.shape


def test_padding_changes_nothing(learn, dls):
    "Neither the logits, nor the loss, nor what pass 2 compares"
    x, t = batch(dls)
    m = learn.model.eval().cnn
    longer = nn.functional.pad(t, (0, 5))
    with torch.no_grad(): a, b, c = m(x, t), m(x, longer), m(x * .5, longer)
    torch.testing.assert_close(a, b[:, :a.shape[1]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(D.CaptionLoss()(a, t), D.CaptionLoss()(b, longer))
    mse = int_losses['mse']
    torch.testing.assert_close(mse(c, b), mse(c[:, :a.shape[1]], a))
    real = (b != 0).any(-1, keepdim=True)
    torch.testing.assert_close(mse(c * real, b), mse(c, b))
    longest = [int((t[i] != 0).sum()) - 1 for i in range(len(t))]
    error = torch.stack([((c - b)[i, :n]**2).sum() for i, n in enumerate(longest)])
    scale = ((b - b.mean(0))**2).sum((1, 2)).mean()
    torch.testing.assert_close(mse(c, b), (1 + error / scale).log2().mean())


def test_bleu_against_torchmetrics(tok):
    assert C.bleu(tok, ['A red one.'], [['a red one']])['BLEU-1'] == pytest.approx(100)
    captions = ['a red seven above a blue one', 'a green two left of a white two',
                'there is a red one left of a blue one']
    references = [['a red seven over a blue one', 'a red seven above a blue one and more'],
                  ['a green two left of a pink two'], ['a red one left of a blue one'] * 3]
    got = C.bleu(tok, captions, references)
    for n in (1, 2, 3, 4):
        want = 100 * bleu_score(captions, references, n_gram=n).item()
        assert got[f'BLEU-{n}'] == pytest.approx(want, abs=1e-3)


def test_a_wider_beam_finds_what_greedy_misses():
    "Greedy takes the likelier first word, from which only unlikelier captions follow"
    tok = D.caption_tokenizer(['p q r'], 1)
    m = C.Captioner('small_cnn', tok, 8, 8).eval()
    p, q, r, end = (tok.token_to_id(o) for o in ('p', 'q', 'r', D.END))
    prob = torch.full((7, 7), 1e-9)
    prob[2, p], prob[2, q] = .6, .4      # after <start>
    prob[p, p:r + 1] = prob[p, end] = .25  # after p anything
    prob[q, r], prob[r, end] = 1., 1.
    m.step = lambda tokens, encoded, state: (prob[tokens].log(), state)
    x = torch.zeros(2, 3, 32, 32)
    greedy, logp_greedy = m.generate(x, beam=1, max_len=6, length_penalty=0)
    beam, logp = m.generate(x, beam=2, max_len=6, length_penalty=0)
    assert D.decode_captions(tok, beam) == ['q r'] * 2 and (logp > logp_greedy).all()
    assert D.decode_captions(tok, greedy)[0].startswith('p')
    assert logp[0].exp().item() == pytest.approx(.4, rel=1e-3)
    for name, bad in (('beam', 0), ('max_len', 0), ('length_penalty', -1)):
        with pytest.raises(ValueError, match=f'{name}={bad}'): m.generate(x, **{name: bad})


class Halves(nn.Module):
    "Predicts 'left' by the brightness of the left half, 'right' by that of the right: what its words rest on is known"
    def __init__(self, tok):
        super().__init__()
        self.tokenizer = tok
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

    def forward(self, x, tokens):
        self.conv(x)
        out = x.new_zeros(len(x), tokens.shape[1] - 1, self.tokenizer.get_vocab_size())
        for word, half in (('left', x[..., :16]), ('right', x[..., 16:])):
            out[:, :, self.tokenizer.token_to_id(word)] = half.mean((1, 2, 3))[:, None] * 4
        return out


def test_words_are_given_their_regions():
    tok = D.caption_tokenizer(['left right'], 1)
    x = torch.ones(1, 3, 32, 32)
    m = AntehocModel(Halves(tok), (x, D.encode_captions(tok, ['left right']))).eval()
    yy, xx = np.mgrid[:32, :32]
    blobs = torch.tensor(np.maximum(*(np.exp(-((yy - 16)**2 + (xx - c)**2) / 30) for c in (8, 24)))).float()[None, None]
    w, = M.word_maps(m, x, D.encode_captions(tok, ['left right left']), fill='black', maps=blobs)
    assert w.words == ['left', 'right', 'left', '<end>'] and len(w.regions) == 2
    left = [r.mask[:, :16].all(0).any() or r.mask[16, 8] for r in w.regions].index(True)
    assert (w.loss[left, [0, 2]] > .1).all() and w.loss[left, 1] < 0 and w.loss[1 - left, 1] > .1
    assert (w.maps[0, :, 16:] == 0).all() and (w.maps[1, :, :16] == 0).all() and w.maps.max() == 1
    _, at, boxes = M.named_words(tok, D.encode_captions(tok, ['left right']), [dict(right=xx > 16)])
    assert at == [1] and boxes[0, 0].tolist() == (np.arange(32) > 16).tolist()


@given(st.integers(0, 50), st.floats(.05, .95))
def test_regions_share_what_is_above_the_threshold(seed, threshold):
    "Every pixel of the map above the threshold is in just one region, and the brightest is in one"
    m = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    m = nn.functional.interpolate(m, (24, 30), mode='bicubic').clamp(0, 1)
    rs = M.peak_regions(m, threshold, n=100)
    total = sum(r.mask.astype(int) for r in rs) if rs else np.zeros((24, 30), int)
    np.testing.assert_array_equal(total, (m[0, 0] >= threshold).int().numpy())
    assert [r.label for r in rs] == list(range(1, len(rs) + 1)) and all(isinstance(r, ConceptRegion) for r in rs)
    assert all(a.energy >= b.energy for a, b in zip(rs, rs[1:]))


def test_scores_by_hand(learn, dls, tok):
    x, t = batch(dls)
    m = learn.model.eval()
    values = M.score_captions(m, x, dict(reference=t), ['ante-hoc', 'ones'], ['faithfulness'], bs=3)
    e = m.explain(x, t)
    with torch.no_grad(): want = [M.caption_probability(m, o, t) for o in (x, e.energy, e.binarised)]
    for w, k in zip(want, (('', 'p_x'), ('energy', 'p_e'), ('binarised', 'p_e'))):
        np.testing.assert_allclose(values['ante-hoc'][('reference', *k)], w, rtol=1e-4)
    assert (values['ones']['reference', 'energy', 'area'] == 1).all()


def test_unknown_words_are_inputs_but_not_scored(learn, dls, tok):
    "They change what follows; their own probability is no part of the caption's"
    x, t = batch(dls)
    t = t.clone()
    t[:, 2] = 1
    with torch.no_grad(): lp, p = M.word_log_probs(learn.model, x, t), M.caption_probability(learn.model, x, t)
    for i in range(len(x)):
        n = int((t[i] != 0).sum()) - 1
        assert p[i].log().item() == pytest.approx(torch.cat([lp[i, :1], lp[i, 2:n]]).mean().item(), rel=1e-4)


@pytest.mark.parametrize('name', ['grad-cam', 'grad-cam++', 'layer-cam', 'score-cam'])
def test_activation_maps_are_of_the_layer_of_the_model(name, learn, dls):
    "The last that the model taps, by its name in the captioner; not the deepest that the explainer would choose"
    x, t = batch(dls)
    m = learn.model.eval()
    layer = f'captioner.{m.layers[-1]}'
    own = explain_with(partial(explainers[name], layer=layer), M.CaptionScore(m.cnn, t[:1]), x[:1], 0)
    torch.testing.assert_close(M.caption_maps(name, m, x[:1], t[:1]), own)


def test_score_cam_is_called_image_by_image(learn, dls):
    "By name or as a function, in a batch or alone"
    x, t = batch(dls)
    m = learn.model.eval()
    a = M.caption_maps('score-cam', m, x[:3], t[:3])
    assert torch.equal(a, M.caption_maps(score_cam, m, x[:3], t[:3]))
    for i in range(3): torch.testing.assert_close(a[i:i + 1], M.caption_maps('score-cam', m, x[i:i + 1], t[i:i + 1]))
    with pytest.raises(ValueError, match='3 images for 2 captions'): M.CaptionScore(m.cnn, t[:2])(x[:3])


def test_the_lstm_keeps_its_precision(learn, dls):
    "Autocast leaves it alone, and so do the flags of cuDNN"
    x, t = batch(dls)
    m = learn.model.eval().cnn
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        seen = []
        handle = m.lstm.register_forward_pre_hook(lambda *a: seen.append(torch.backends.cudnn.deterministic))
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): a = m(x, t)
        assert seen == [True] and torch.backends.cudnn.deterministic
        handle.remove()
    finally: torch.backends.cudnn.deterministic = before
    with torch.no_grad(): torch.testing.assert_close(a.float(), m(x, t), atol=.1, rtol=.1)


def test_a_captioner_is_a_fastai_learner(learn, data, dls, tok, tmp_path):
    "Exported, loaded, it describes images of its own; a caption-less explainer call is refused with a reason"
    learn.path = tmp_path
    learn.export('l.pkl')
    back = load_learner(tmp_path/'l.pkl')
    x, t = batch(dls)
    assert torch.equal(back.model.eval()(x, t), learn.model.eval()(x, t))
    assert len(back.show_captions(items=[data.images[0], Image.fromarray(data.images[1])])) == 2
    assert len(back.show_captions(items=data.images[0])) == 1
    with pytest.raises(Exception): back.predict('x.png')  # noqa: B017  not taken for a caption
    with pytest.raises(ValueError, match='a learner loaded from a file has none'): back.show_captions()
    assert len(learn.show_captions(3)) == 3  # images, not pairs
    with pytest.raises(ValueError, match='items, n=0: no images to describe'): learn.show_captions(0)
    learn.dls.show_batch()
    with pytest.raises(ValueError, match='captions: number 0 is empty'):
        learn.show_captions(items=[data.images[0]], captions=[' '])
    with pytest.raises(ValueError, match='a CNN that gives logits'): grad_cam(learn.model, x, 0)
    assert learn.model.explain(x).pred.dtype == torch.long
    plain = C.caption_learner(dls, 'small_cnn', False, 8, 8, explain=False)
    with pytest.raises(TypeError, match='learn.model is a Captioner, which has no maps'): plain.show_captions()
    with pytest.raises(ValueError, match='dls: has no tokenizer'): C.caption_learner(type('D', (), {})(), 'small_cnn')


def test_vocabulary_and_model_must_fit(learn, dls, tok, tmp_path):
    learn.model.save_pretrained(tmp_path)
    m = C.load_captioner(tmp_path, tok)
    x, t = batch(dls)
    assert torch.equal(m(x, t), learn.model.eval()(x, t)) and m.cnn.tokenizer.get_vocab() == tok.get_vocab()
    by_hand = AntehocModel(C.Captioner('small_cnn', tok, 8, 8), (x, t), eta=6)
    assert torch.equal(C.load_captioner(by_hand.save_pretrained(tmp_path/'hand'))(x, t), by_hand.eval()(x, t))
    Image.new('RGB', (9, 9)).save(tmp_path/'a.png')
    out = antehoc('explain', tmp_path, tmp_path/'a.png', '--out', tmp_path/'out', code=1)
    assert 'the model is a Captioner, not a classifier' in out
    with pytest.raises(ValueError, match='its vocabulary .* is not that of the tokenizer'):
        C.load_captioner(tmp_path, D.caption_tokenizer(['x y'], 1))
    with pytest.raises(ValueError, match='is not in the vocabulary of'): m(x, t + 99)
    with pytest.raises(ValueError, match='a caption needs <start> and <end>'): m(x, torch.full((len(x), 2), 0))


@pytest.mark.slow
def test_loaded_in_a_process_that_imports_no_more_than_the_captioner(learn, tmp_path):
    learn.model.save_pretrained(tmp_path)
    code = ('import sys, antehoc_nb.tasks.captioner, antehoc_nb.core.model as m; '
            'print(type(m.AntehocModel.from_pretrained(sys.argv[1]).cnn).__name__)')
    done = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'Captioner'


def test_nothing_but_sizes_comes_from_a_file(learn):
    described = learn.model.cnn.build
    assert {*described} == {'arch', 'n_out', 'backbone', 'emb', 'hidden', 'grid', 'dropout', 'tokenizer'}
    assert weights_shapes(rebuild_cnn(**described)) == weights_shapes(learn.model.cnn)
    for name in ('pretrained', 'checkpoint_path'):
        with pytest.raises(ValueError, match=f"unknown argument of a CNN '{name}'"):
            rebuild_cnn(**described, **{name: True})


def weights_shapes(cnn): return {name: tuple(value.shape) for name, value in cnn.state_dict().items()}


def antehoc(*args, code=0):
    r = CliRunner().invoke(app, list(map(str, args)))
    assert r.exit_code == code, r.output
    return r.output


@pytest.fixture(scope='module')
def class_specific(dls):
    "A learner whose weight network takes target words"
    set_seed(0)
    learn = C.caption_learner(dls, 'small_cnn', False, 16, 32, eta=6, class_specific=True)
    assert learn.two_pass.int_loss == 'cross_entropy'
    learn.two_pass.keep_best = False  # an untrained weight network makes the same map of all words
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 3e-3)
    return learn


def test_only_the_target_words_matter(class_specific, dls, tok):
    "Neither special tokens nor the order of words change a map, nor the caption beside a target; another word does"
    (x, tokens), word = batch(dls), tok.id_to_token(7)
    explain = class_specific.model.eval().explain
    e = explain(x, tokens)
    assert torch.equal(e.target, torch.where(tokens > 3, tokens, -1)[:, 1:])
    swapped = tokens.clone()
    swapped[:, [1, 3]] = tokens[:, [3, 1]]
    torch.testing.assert_close(explain(x, tokens, target=swapped).map, e.map)
    with_special = torch.cat([tokens, torch.zeros_like(tokens), torch.ones_like(tokens)], 1)
    torch.testing.assert_close(explain(x, tokens, target=with_special).map, e.map)
    one = explain(x, tokens, target=word)
    assert (one.map - e.map).abs().max() > 1e-3
    assert torch.equal(one.map, explain(x, tokens.flip(0), target=[word] * len(x)).map)
    assert torch.equal(one[1:2].target, one.target[1:2])
    twice = explain(x, tokens, target=f'{word} {word}')
    assert (twice.map - one.map).abs().max() > 1e-3  # given twice, it counts for more
    for words in (f' {word.upper()} ', [word] * len(x)): assert torch.equal(explain(x, target=words).map, one.map)
    generated = explain(x)
    assert torch.equal(generated.target, torch.where(generated.pred > 3, generated.pred, -1)[:, 1:])


def test_caption_maps_of_target_words(class_specific, dls, tok):
    "They are the model's own, of all words or of one"
    x, tokens = batch(dls)
    m = class_specific.model.eval()
    torch.testing.assert_close(M.caption_maps('ante-hoc', m, x, tokens), m.explain(x, tokens).map)
    third = [tok.id_to_token(int(t)) for t in tokens[:, 3]]
    want = m.explain(x, tokens, target=third).map
    torch.testing.assert_close(M.caption_maps('ante-hoc', m, x, tokens, 2, bs=3), want)


def test_loss_of_pass_two_is_about_the_words(class_specific, dls):
    "In validation it is the cross-entropy of the captions' words under the map of these words, counted word by word"
    m, losses = class_specific.model.eval(), []
    guess = np.log(m.cnn.n_words)
    with torch.no_grad():
        for x, tokens, _ in dls.valid:
            x, tokens = x.as_subclass(torch.Tensor), tokens.as_subclass(torch.Tensor)
            logp = m.cnn(m.mask(x, m.explain(x, tokens).map), tokens).log_softmax(2)
            for row, caption in zip(logp, tokens[:, 1:].tolist()):
                losses.append(-np.mean([row[k, word].item() / guess for k, word in enumerate(caption) if word > 3]))
    with class_specific.no_bar(), class_specific.no_logging(): class_specific.validate()
    assert class_specific.two_pass.mean_int_loss('valid') == pytest.approx(np.mean(losses), rel=1e-4)


def test_target_words_through_the_learner(class_specific, tok, tmp_path):
    word = tok.id_to_token(7)
    e = class_specific.explain(n=3, target=word)
    assert torch.equal(e.map, class_specific.explain(n=3, target=[word] * 3).map)
    assert class_specific.show_captions(2).shape[0] == 2
    back = C.load_captioner(class_specific.model.save_pretrained(tmp_path/'m'))
    want = class_specific.model.eval().explain(e.image, target=word).map
    assert torch.equal(back.explain(e.image, target=word).map, want)
    with pytest.raises(ValueError, match='cannot train a class-specific map'):
        C.caption_learner(class_specific.dls, 'small_cnn', False, 16, 32, eta=6, class_specific=True,
                          int_loss='mse')


@pytest.mark.parametrize('target, error, message', [
    ('zebra', ValueError, "target: unknown word 'zebra'"),
    (3, TypeError, 'a captioner takes words or tokens'),
    ([], TypeError, 'not list'),
    (['red'], ValueError, 'for 3 images'),
    (' ', ValueError, 'image 0 has no target word'),
    (torch.full((3, 4), 2), ValueError, 'image 0 has no target word'),
    (torch.full((3, 4), 999), ValueError, 'target: number 999 is not in the vocabulary'),
    (torch.full((3, 4), 7), ValueError, 'target: tokens begin with <start>'),
    (torch.zeros(3, 0).long(), ValueError, r'got \(3, 0\)'),
    (torch.ones(3, 4).bool(), ValueError, 'of torch.bool'),
], ids=str)
def test_bad_targets(class_specific, tok, target, error, message):
    if target == ['red']: target = [tok.id_to_token(7)]
    with pytest.raises(error, match=message): class_specific.explain(n=3, target=target)


@pytest.mark.slow
def test_table4_from_one_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flickr(tmp_path)
    for f in ('Flickr8k_Dataset', 'Flickr8k_text'): zipfile.ZipFile(tmp_path/f'{f}.zip').extractall(tmp_path/'data')
    args = 'reproduce', 'table4', '--dataset', 'flickr8k', '--profile', 'smoke', '--data', tmp_path/'data'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        out = antehoc(*args)
    assert 'wrote results/captioning/flickr8k-smoke.png' in out
    assert (tmp_path/'results'/'captioning'/'flickr8k-smoke.png').exists()
    rec = T.read_captioning('flickr8k', 'smoke')
    assert rec['command'] == 'antehoc reproduce table4 --dataset flickr8k --profile smoke'
    assert rec['config']['title'] == 'Flickr-8k (12 images: 8/2/2)'
    assert rec['results']['n_test'] == 2 and 'pointing' not in rec['results']
    run = tmp_path/'runs'/'captioning'/'flickr8k-smoke'
    own, class_specific = (C.load_captioner(run/o/'model') for o in ('captioner', 'class-specific'))
    assert weights_digest(own.cnn) == weights_digest(class_specific.cnn)  # only the second weight network was trained
    assert not own.class_specific and class_specific.modulates
    t = T.table4({'flickr8k': rec})
    assert list(t.index) == ["ante-hoc", T.CLASS_SPECIFIC, T.WRONG_CAPTION, *M.CAPTION_EXPLAINERS[1:]]
    assert (t.loc['ones'].xs('area', level=2) == '1.00').all() and (t.loc['ones'].xs('drop', level=2) == '–').all()
    (tmp_path/'p.json').write_text('{"table4": {"Flickr-8k": {"grad-cam": {"drop": 12.5}}}}')
    beside_paper = T.table4({'flickr8k': rec}, paper=tmp_path/'p.json')
    title = f"{rec['config']['title']} (paper: Flickr-8k)"
    for masks in ('energy', 'binarised'): assert beside_paper.loc['grad-cam', (title, masks, 'drop')].endswith('(12.5)')
    v = T.caption_verdict(rec)
    b = T.Benchmark.of(rec).pivot(('drop',), ('energy',), ('reference',)).iloc[:, 0]
    ahead = (b['ante-hoc'] < b[['grad-cam', 'grad-cam++', 'score-cam']]).sum()
    assert len(v) == 20 and v.loc[('reference', 'drop energy'), 'ahead'] == ahead
    before = (run/'scores'/'score-cam.npz').stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        antehoc(*args)  # nothing is scored again
    assert (run/'scores'/'score-cam.npz').stat().st_mtime_ns == before
    assert T.read_captioning('flickr8k', 'smoke')['results']['rows'] == rec['results']['rows']
    assert "unknown dataset 'cifar10'" in antehoc('reproduce', 'table4', '--dataset', 'cifar10', code=1)
    with pytest.raises(FileNotFoundError, match='antehoc reproduce table4 --dataset flickr8k --profile cpu'):
        T.read_captioning('flickr8k', results=tmp_path)
