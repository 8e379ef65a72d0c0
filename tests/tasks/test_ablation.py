"""An experiment of several seeds that is stopped half-way."""
import json

import pytest

from antehoc_nb.evaluate.scoreboard import read_record
from antehoc_nb.tasks import ablation

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


def test_the_later_trials_have_one_seed_in_the_cpu_profile():
    assert ablation.weight_net_choice.config('cifar10', 'cpu')['seeds'] == (0,)
    assert ablation.weight_net_choice.config('cifar10', 'paper')['seeds'] == (0, 1, 2)
    assert ablation.weight_choice.config('cifar10', 'cpu')['seeds'] == (0, 1, 2)
