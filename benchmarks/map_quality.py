"""How good the default maps of a frozen, pretrained CNN are after a short training: to compare two states of the code.

The CNN is EfficientNet-Lite0 with ImageNet weights and a logistic regression on some images of a data set. Its default
weight network is trained on the same images. Everything is scored on other images of the training split.
"""
import argparse
import json
import os
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]/'results'/'benchmarks'
ARCHIVES = {'cifar10': 'cifar10/cifar10_jpeg_full.tar.gz', 'food101-10': 'food101_10/food101_10.tar'}
SHARES = .05, .1, .2, .5


def loaders(name, options, seed):
    "Training images and images to score on, and the boxes of the latter, if they are known."
    import torch
    from fastai.data.core import DataLoaders

    from antehoc_nb.data.images import image_dls
    from antehoc_nb.data.photo_digits import photo_digits_dls
    from antehoc_nb.evaluate.benchmark import subset
    from antehoc_nb.tasks.experiment import seed_loaders
    if name == 'photo-digits':
        dls = photo_digits_dls(options.images, options.scored, options.size, options.bs, seed)
        boxes = torch.as_tensor(dls.valid_ds.boxes)
    else:
        archive, boxes = Path(os.environ['ANTEHOC_DATA'])/ARCHIVES[name], None
        whole = image_dls(archive, options.size, options.bs, verify=False)
        order = torch.randperm(len(whole.train_ds), generator=torch.Generator().manual_seed(seed)).tolist()
        train, scored = order[:options.images], order[options.images:options.images + options.scored]
        subsets = subset(whole.train_ds, train), subset(whole.train_ds, scored)
        both = whole.train.new(subsets[0]), whole.valid.new(subsets[1])
        dls = DataLoaders(*both, path=whole.path, device=whole.device)
    seed_loaders(dls, seed)
    return dls, boxes


def tensors(batches):
    "All images and classes of a loader."
    import torch

    from antehoc_nb.core.utils import plain_tensor
    pairs = [(plain_tensor(x), plain_tensor(y)) for x, y in batches]
    return (torch.cat(parts) for parts in zip(*pairs, strict=True))


def run(name, options, seed):
    "Train and score; what the record says of this data set and seed."
    import torch
    from fastai.losses import CrossEntropyLossFlat
    from fastai.torch_core import set_seed

    from antehoc_nb.core.interpretation_loss import change_at_area
    from antehoc_nb.evaluate.explainers import grad_cam
    from antehoc_nb.evaluate.faithfulness import insertion_deletion
    from antehoc_nb.evaluate.localisation import localisation
    from antehoc_nb.tasks.default import fit_head, pretrained_lite0
    from antehoc_nb.train.learner import antehoc_learner
    dls, boxes = loaders(name, options, seed)
    x, y = tensors(dls.train.new(shuffle=False, drop_last=False))
    normalize = dls.train.after_batch.fs[-1]
    cnn = fit_head(pretrained_lite0(normalize.mean.cpu(), normalize.std.cpu()), x, y)
    set_seed(seed)
    learn = antehoc_learner(dls, cnn, train_cnn=False, loss_func=CrossEntropyLossFlat())
    with learn.no_bar(): learn.fit_one_cycle(options.epochs, 3e-3)
    model = learn.model.eval()
    x, y = tensors(dls.valid)
    with torch.no_grad(): predicted = torch.cat([model(part) for part in x.split(50)]).argmax(1)
    maps = {'default': torch.cat([model.explain(part).map for part in x.split(50)]),
            'grad-cam': torch.cat([grad_cam(model, *parts) for parts in zip(x.split(50), predicted.split(50))])}

    def probability(images, target): return model(images).softmax(1).gather(1, target[:, None])[:, 0]
    found = dict(data=name, seed=seed, accuracy=(predicted == y).float().mean().item(), kept=learn.two_pass.best.kept)
    for explainer, of_explainer in maps.items():
        scores = {f'drop_at_{share:.0%}': change_at_area(model, x, of_explainer, target=predicted, share=share)
                  for share in SHARES}
        with torch.no_grad():
            curves = insertion_deletion(probability, x, of_explainer, options.steps, target=predicted, bs=50,
                                        baseline=-model.mean / model.std)
        scores |= {what: curves[what].mean().item() for what in ('insertion', 'deletion')}
        found[explainer] = scores | (localisation(of_explainer, boxes) if boxes is not None else {})
    return found


def compare(labels):
    "Means over the seeds of each data set, from the records of two states of the code."
    import pandas as pd

    from antehoc_nb.evaluate.scoreboard import read_record
    rows = []
    for label in labels:
        record = read_record(FOLDER/f'quality-{label}.json', f'python benchmarks/map_quality.py --label {label}')
        for part in record['results']['parts']:
            for maps in ('default', 'grad-cam'):
                rows.append(dict(data=part['data'], maps=maps, code=label) | part[maps])
    print(pd.DataFrame(rows).groupby(['data', 'maps', 'code'], sort=False).mean().round(2).to_string())


def parse_options():
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=show_defaults)
    add = parser.add_argument
    add('--data', nargs='+', default=['photo-digits', *ARCHIVES], choices=['photo-digits', *ARCHIVES])
    add('--images', type=int, default=500, help='to train on')
    add('--scored', type=int, default=200, help='images to score on, of the training split')
    add('--size', type=int, default=112, help='side of the images in pixels')
    add('--bs', type=int, default=16, help='images per batch')
    add('--epochs', type=int, default=5)
    add('--steps', type=int, default=8, help='of insertion and deletion')
    add('--seeds', nargs='+', type=int, default=[0, 1])
    add('--label', help='what the code is called in the record, such as "before"')
    add('--compare', nargs=2, metavar='LABEL', help='print the records of two states beside each other, and stop')
    options = parser.parse_args()
    if not options.label and not options.compare: parser.error('give --label or --compare')
    return options


def main():
    from antehoc_nb.evaluate.scoreboard import run_record, write_record
    options = parse_options()
    if options.compare: return compare(options.compare)
    start = time.time()
    parts = FOLDER/f'quality-{options.label}.parts.json'
    found = json.loads(parts.read_text()) if parts.exists() else []
    for seed in options.seeds:
        for name in options.data:
            if any((part['data'], part['seed']) == (name, seed) for part in found): continue
            found.append(run(name, options, seed))
            parts.write_text(json.dumps(found))
            print(found[-1], flush=True)
    command = f'python benchmarks/map_quality.py --label {options.label}'
    config = {key: value for key, value in vars(options).items() if key != 'compare'}
    record = run_record(config, options.seeds, dict(parts=found), experiment='map_quality', command=command,
                        seconds=round(time.time() - start))
    print(write_record(record, FOLDER/f'quality-{options.label}.json'))
    parts.unlink()


if __name__ == '__main__': main()
