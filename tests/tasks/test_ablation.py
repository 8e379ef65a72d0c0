"""An experiment of several seeds that is stopped half-way."""
import json

import pytest
from fastai.learner import Learner

from antehoc_nb.data.photo_digits import photo_digits_dls
from antehoc_nb.evaluate.scoreboard import read_record
from antehoc_nb.tasks import ablation
from antehoc_nb.train.archs import small_cnn

SCORES = {'l2, T=3': 1., 'control: ones': 4.}


def test_goes_on_with_the_next_seed(tmp_path, monkeypatch):
    ran = []

    def one_seed(config, seed, data):
        if len(ran) == stop_after: raise KeyboardInterrupt
        ran.append(seed)
        return [dict(trial=k, drop=v + seed) for k, v in SCORES.items()], seed / 10

    def run(): return ablation.run_trials('photo-digits', 'cpu', results=tmp_path/'results', work=tmp_path/'runs')

    monkeypatch.setattr(ablation, '_one_seed', one_seed)
    out = tmp_path/'results'/'weight-choice'/'photo-digits-cpu.json'
    stop_after = 2
    with pytest.raises(KeyboardInterrupt): run()
    assert ran == [0, 1] and not out.exists()
    finished = sorted(f.name for f in (tmp_path/'runs'/'weight-choice'/'photo-digits-cpu').iterdir())
    assert finished == ['config.json', 'seed0.json', 'seed1.json']
    stop_after = None
    rec = run()
    assert ran == [0, 1, 2] and [f.name for f in out.parent.iterdir()] == ['photo-digits-cpu.json']
    assert rec['results'] == dict(rows={'l2, T=3': dict(drop=2.), 'control: ones': dict(drop=5.)},
                                  spread={k: dict(drop=1.) for k in SCORES}, accuracy=[0, .1, .2])
    assert ablation.trials_table(rec).data['drop'].tolist() == ['2.0 ± 1.0', '5.0 ± 1.0']
    assert json.loads(out.read_text())['config']['seeds'] == [0, 1, 2]
    assert read_record(out)['command'] == 'antehoc reproduce weight-choice --dataset photo-digits --profile cpu'


def test_another_configuration_does_not_go_on(tmp_path, monkeypatch):
    ran = []

    def one_seed(config, seed, data):
        ran.append(seed)
        if config['dataset'] == 'photo-digits' and seed == 1: raise KeyboardInterrupt
        return [dict(trial='l2, T=3', drop=1.)], 0.

    def run(dataset, trials=None):
        return ablation.run_trials(dataset, 'cpu', trials, results=tmp_path, work=tmp_path/'runs')

    monkeypatch.setattr(ablation, '_one_seed', one_seed)
    with pytest.raises(KeyboardInterrupt): run('photo-digits')
    run('cifar10')
    assert ran == [0, 1, 0, 1, 2]
    with pytest.raises(ValueError, match='holds a run with other settings .trials: '):
        run('photo-digits', trials={'mine': {}})


def test_every_profile_but_the_smallest_has_three_seeds():
    for profile, seeds in dict(smoke=(0,), cpu=(0, 1, 2), paper=(0, 1, 2)).items():
        assert ablation.weight_choice.config('cifar10', profile)['seeds'] == seeds


def test_trials_of_the_default_weight_network_are_class_agnostic():
    "The candidates are compared without a target"
    learn = Learner(photo_digits_dls(n_train=32, n_valid=16, size=32, bs=16), small_cnn(10))
    trials = ablation.Trials({'default': {}, 'l2, T=3': ablation.TRIALS['l2, T=3']})
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=trials)
    assert not any(model.class_specific for model in trials.models.values())
    assert trials.models['default'].modulates and all(len(losses) == 2 for losses in trials.losses.values())
