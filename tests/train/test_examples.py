"""The examples in examples/ run, and the CNN they train is that of the same training without a weight network."""
import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]
EXAMPLES = Path(__file__).resolve().parents[2]/'examples'


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(a, b): return [*a] == [*b] and all(torch.equal(a[name], b[name]) for name in a)


def check(explanation):
    assert explanation.target.tolist() == [1, 1] and explanation.map.isfinite().all() and explanation.map.std() > 0


@pytest.mark.filterwarnings('ignore')
def test_lightning():
    lightning = pytest.importorskip('lightning')
    module = example('lightning_module')
    explained, explanation = module.main(epochs=2, n=64)
    check(explanation)
    lightning.seed_everything(0)
    train, valid = module.loaders(64)
    plain = module.PlainClassifier(module.make_cnn())
    module.fit(plain, train, valid, epochs=2)
    assert same(plain.model.state_dict(), explained.model.cnn.state_dict())


@pytest.mark.filterwarnings('ignore')
def test_huggingface_trainer():
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    module = example('huggingface_trainer')
    model, explanation = module.main(epochs=2, n=64)
    check(explanation)
    transformers.set_seed(0)
    plain = module.make_cnn()
    module.train(plain, epochs=2, n=64)
    assert same(plain.state_dict(), model.cnn.state_dict())
