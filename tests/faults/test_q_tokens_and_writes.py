"""Tokens that are no places of the image are left out; whatever a network writes when it runs is put back."""
from collections import Counter, OrderedDict, deque
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.layers import choose_layers
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import every_module, frozen, weights_digest

pytestmark = pytest.mark.usefixtures('one_thread')


def images(side): return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


class Transformer(nn.Module):
    "An encoder of patches, whose tokens may be in another order, with a decoder of learned queries behind it"
    def __init__(self, before=0, behind=0, order=None, queries=0, depth=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        width = dict(d_model=32, nhead=2, dim_feedforward=64, dropout=0., batch_first=True, norm_first=True)
        self.embed, self.order = nn.Conv2d(3, 32, 8, 8), order
        learned = [nn.Parameter(torch.randn(1, n, 32)) for n in (before, behind, queries)]
        self.before, self.behind, self.queries = learned
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(**width) for _ in range(depth)])
        self.decoder = nn.ModuleList([nn.TransformerDecoderLayer(**width) for _ in range(2 * bool(queries))])
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).mT
        if self.order is not None: tokens = tokens[:, self.order]
        before, behind, queries = (part.expand(len(x), -1, -1) for part in (self.before, self.behind, self.queries))
        tokens = torch.cat([before, tokens, behind], 1)
        for block in self.blocks: tokens = block(tokens)
        for block in self.decoder: queries = block(queries, tokens)
        return self.head((queries if len(self.decoder) else tokens).mean(1))


@pytest.mark.parametrize('queries', [4, 5, 9, 16, 25])
@pytest.mark.parametrize('side', [32, 64])  # at 32, the encoder has 16 tokens too
def test_learned_queries_are_no_places(queries, side):
    cnn = Transformer(queries=queries).eval()
    assert choose_layers(cnn, images(side), None) == ('blocks.0@tokens', 'blocks.1@tokens')


@pytest.mark.parametrize('side, before, behind', [(16, 0, 1), (32, 1, 1), (64, 0, 1), (64, 0, 2), (96, 1, 1)])
def test_tokens_behind_those_of_the_image_are_refused(side, before, behind):
    expected = choose_layers(Transformer(before).eval(), images(side), None)
    assert expected == tuple(f'blocks.{i}@tokens{"-1" * before}' for i in range(2))
    with pytest.raises(ValueError) as error: choose_layers(Transformer(before, behind).eval(), images(side), None)
    assert str(error.value) == (
        "cnn: Transformer is a transformer, with no more than one convolution, and no block of it holds the images' "
        "rows and columns: of 'blocks.0', some of its tokens, such as a class token, come after those of the image; "
        'only tokens before these can be left out')


@pytest.mark.parametrize('cells', [2, 4, 5, 8])
@pytest.mark.parametrize('down', [False, True])
def test_tokens_that_wind_along_rows_or_columns_are_refused(cells, down):
    order = torch.arange(cells**2).view(cells, cells)
    order[1::2] = order[1::2].flip(1)
    cnn = Transformer(order=(order.T if down else order).flatten(), depth=8).eval()
    with pytest.raises(ValueError, match="of 'blocks.0', a change of the image does not show in the same place"):
        choose_layers(cnn, images(8 * cells), None)


# --- What is written to

X, Y = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class InPlace(nn.Module):
    "Writes to the numbers of a parameter of its own, and of a convolution that it holds."
    def __init__(self):
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.ones(1)), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        with torch.no_grad(): self.scale.mul_(.9).add_(.1)
        self.conv.weight.data.mul_(.9)
        return self.conv(x) * self.scale

    def state(self): return self.scale.tolist(), self.conv.weight.tolist()


@dataclass
class Record:
    n: int = 0
    lengths: list = field(default_factory=list)


class Plain:
    "No module, but holds one"
    def __init__(self): self.n, self.norm = 0, nn.BatchNorm2d(3)


class Holder(nn.Module):
    "Holds batch norms, and counts its calls, in all that an attribute can be."
    def __init__(self):
        super().__init__()
        in_closure, of_closure = nn.BatchNorm2d(3), 0
        self.norms = dict(a=[nn.BatchNorm2d(3), (nn.BatchNorm2d(3), self)])
        self.array, self.tuple, self.list = np.zeros(1), (torch.zeros(1), [0]), [torch.zeros(1)]
        self.set, self.deque, self.counter = set(), deque(maxlen=99), Counter()
        self.nested, self.record, self.plain = dict(a=OrderedDict(b=[0])), Record(), Plain()

        def count():
            nonlocal of_closure
            of_closure += 1
            return in_closure
        self.count, self.counted = count, lambda: (of_closure, in_closure.running_mean.tolist())

    def forward(self, x):
        self.array += 1
        for tensor in (self.tuple[0], self.list[0]): tensor.add_(1)
        self.tuple[1][0] += 1
        self.set.add(len(self.set))
        self.deque.append(1)
        self.counter['calls'] += 1
        self.nested['a']['b'][0] += 1
        self.record.n += 1
        self.record.lengths.append(len(x))
        self.plain.n += 1
        for norm in (self.norms['a'][0], self.norms['a'][1][0], self.plain.norm, self.count()): x = norm(x)
        return x

    def state(self):
        norms = [norm.running_var.tolist() for norm in (self.norms['a'][0], self.norms['a'][1][0], self.plain.norm)]
        counts = self.array, self.tuple, self.list, self.set, self.deque, self.counter, self.nested, self.record
        return deepcopy([*counts, self.plain.n, norms, self.counted()])


class PlainListDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropouts = [nn.Dropout(.5)]

    def forward(self, x): return self.dropouts[0](x)

    def state(self): return self.dropouts[0].training


def trained(kind, cnn, steps, is_copy=False):
    torch.manual_seed(0)
    network = nn.Sequential(kind(), *cnn()).train()
    model = network
    if steps is two_pass_step:
        model = AntehocModel(network, X[:2], eta=2).train()
        if is_copy: model, model.images_seen = deepcopy(model), 8
        network = model.cnn
    optimizer = torch.optim.SGD(network.parameters(), .1)
    torch.manual_seed(1)
    for _ in range(2):
        out, loss = steps(model, X, Y)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(out, Y) + loss).backward()
        optimizer.step()
    return str(network[0].state()), weights_digest(network)


@pytest.mark.parametrize('kind', [InPlace, Holder, PlainListDropout])
def test_two_steps_are_those_of_plain_training(cnn, kind):
    assert trained(kind, cnn, two_pass_step) == trained(kind, cnn, lambda network, x, y: (network(x), 0))


def test_a_copy_of_a_model_learns_what_is_written(cnn):
    "Parameters of a copy are other ones."
    plain = trained(InPlace, cnn, lambda network, x, y: (network(x), 0))
    assert trained(InPlace, cnn, two_pass_step, is_copy=True) == plain


def test_modules_in_attributes():
    holder = Holder()
    assert len(every_module(holder)) == 5 and every_module(holder, hidden=False) == [holder]
    inner, before = nn.Sequential(nn.Linear(2, 2)), holder.state()
    inner[0].above = [holder, inner]
    holder.inner = inner
    assert every_module(inner) == [inner, inner[0]]  # not what it is in
    with frozen(holder):
        holder(X)
        assert str(holder.state()) != str(before)
    assert str(holder.state()) == str(before) and all(module.training for module in every_module(holder))


def test_what_is_unlike_a_dictionary_is_left_alone():
    "Some dictionaries refuse to be written to; and the order of one can be what it is for."
    class Locked(dict):
        def refuse(self, *args): raise TypeError('locked')
        __setitem__ = __delitem__ = update = pop = clear = refuse
    class Recent(nn.Module):
        def __init__(self):
            super().__init__()
            self.locked, self.order = Locked(a=torch.zeros(1)), dict(a=1, b=2)

        def forward(self, x):
            self.order['a'] = self.order.pop('a')
            self.order['c'] = 3
            return x
    network = Recent()
    with frozen(network):
        network(X)
        assert [*network.order] == ['b', 'a', 'c']
    assert [*network.order.items()] == [('a', 1), ('b', 2)]
