"""Same seeds, same threads, no windows, for every test."""
import os
import random
import shutil
import time

os.environ['MPLBACKEND'] = 'Agg'  # also for processes that tests start

import matplotlib

matplotlib.use('Agg')
import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1 if 'PYTEST_XDIST_WORKER' in os.environ else 2)  # beside another worker, one
settings.register_profile('repeatable', derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile('repeatable')
LONGEST = ('test_figure4', 'test_table3', 'test_a_planted_tag_is_found', 'test_inductor', 'test_exporting_',
           'test_images_of_any_size', 'test_killed_run', 'test_two_processes', 'test_table4')


def pytest_collection_modifyitems(items):
    "The longest tests come first: else one worker ends alone with them. The other slow ones come last."
    def place(item):
        if item.name.startswith(LONGEST): return 0
        return 2 if item.get_closest_marker('slow') else 1
    items.sort(key=place)


def pytest_runtest_setup(item):
    "Slow tests begin until SLOW_UNTIL, seconds since 1970, if that is set: CI has to end."
    until = os.environ.get('SLOW_UNTIL')
    if until and item.get_closest_marker('slow') and time.time() > float(until):
        pytest.skip('the time for slow tests is over (SLOW_UNTIL)')


@pytest.fixture(autouse=True)
def repeatable():
    "Seed every generator before a test; close its figures after it."
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    import matplotlib.pyplot as plt
    plt.close('all')


@pytest.fixture(scope='module')
def one_thread():
    "For CNNs and images too small to share among cores, also while a module's fixtures train them."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='module')
def without_figures():
    "The figures that a run writes take longer than a short training; the notebook of `train_run` draws them."
    from antehoc_nb.tasks import experiment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, '_write_figures', lambda *args: None)
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "Nothing a test unpacks or downloads lands in the user's cache."
    monkeypatch.setenv('ANTEHOC_CACHE', str(tmp_path_factory.getbasetemp()/'cache'))


@pytest.fixture(scope='module')
def browser():
    "Chromium without a window, by Playwright"
    sync_api = pytest.importorskip('playwright.sync_api', reason='no Playwright: pip install playwright')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no Chromium: apt install chromium')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser
        browser.close()
