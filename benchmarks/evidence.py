"""What the evidence for a class does to maps, before any training and after a short one, on validation images.

EfficientNet-Lite0 with ImageNet weights and a linear head, which is fitted to 100 images of each of ten classes;
nothing else is trained. Of ImageNet itself the network is taken as it comes, with its 1,000 classes, at 224 pixels.
The maps of the predicted classes are scored by the CNN. `other` is the next class by number: what is left of the target
under its map, and how probable it becomes there (`steering`). One command writes the record:

    ANTEHOC_DATA=folder OMP_NUM_THREADS=1 python benchmarks/evidence.py
"""
import argparse
import contextlib
import functools
import json
import os
import time
from pathlib import Path
from unittest import mock

import torch

RECORD = Path(__file__).resolve().parents[1]/'results'/'benchmarks'/'evidence.json'
SIZE, HEAD, VALID = 112, 100, 13
TINY = ('n02099601', 'n02123045', 'n01855672', 'n02279972', 'n02364673', 'n02403003', 'n02415577', 'n02437312',
        'n02504458', 'n01774750')
DATASETS = dict(tinyimagenet20=('tinyimagenet/tinyimagenet20_500tr_50val.tar.gz', 'val', TINY),
                food101_10=('food101_10/food101_10.tar', 'test', None), imagenet600=('imagenet_600.tar', None, None))
VARIANTS = ('without evidence', 'evidence alone', 'without contrast', 'without gate', 'untrained default', 'Grad-CAM',
            'trained default', 'trained without evidence')
OF_IMAGENET = 'without evidence', 'untrained default', 'Grad-CAM'


def images_and_cnn(dataset, root):
    "Training and validation images with their classes, boxes if they are known, and the CNN"
    from fastai.torch_core import set_seed

    from antehoc_nb.core.utils import plain_tensor
    from antehoc_nb.data.images import image_dls
    from antehoc_nb.tasks.classification import dataset_boxes
    from antehoc_nb.tasks.default import few_images, fit_head, pretrained_lite0
    set_seed(0)  # training images are mirrored and shifted
    archive, test, classes = DATASETS[dataset]
    if classes is None: classes = list(image_dls(root/archive, SIZE, 32, valid=test, verify=False).vocab)
    dls = few_images(root/archive, list(map(str, classes)), HEAD, VALID, SIZE, 32, 0, 1, test)['valid']

    def joined(loader): return [torch.cat([plain_tensor(part) for part in parts]) for parts in zip(*loader)]
    train, valid = joined(dls.train.new(shuffle=False, drop_last=False)), joined(dls.valid)
    boxes = dataset_boxes('tinyimagenet20', dls, SIZE) if dataset == 'tinyimagenet20' else None
    normalise = dls.train.after_batch.fs[-1]
    mean, std = normalise.mean.cpu(), normalise.std.cpu()
    cnn = fit_head(pretrained_lite0(mean, std), *train).eval().requires_grad_(False)
    return train, valid, boxes, cnn, dict(mean=mean.flatten().tolist(), std=std.flatten().tolist())


def imagenet_images(root):
    "The same of ImageNet: the validation photographs of `antehoc reproduce imagenet`, and its CNN"
    from antehoc_nb.core.utils import plain_tensor
    from antehoc_nb.tasks.imagenet import labelled_photos, photo_dls
    from antehoc_nb.train.imagenet import IMAGENET_SIZE, imagenet_cnn
    photos = labelled_photos(root/DATASETS['imagenet600'][0], 200, 60)['valid']
    dls = photo_dls(photos[:1], photos, IMAGENET_SIZE, 20)
    valid = [torch.cat([plain_tensor(part) for part in parts]) for parts in zip(*dls.valid)]
    return valid, valid, None, imagenet_cnn().requires_grad_(False), dict(mean=[.5] * 3, std=[.5] * 3)


def trained(model, x, y, images, epochs):
    "The model, after a training of its weight network with `two_pass_step`"
    from antehoc_nb.core.interpretation_loss import two_pass_step
    torch.manual_seed(0)
    optimiser = torch.optim.Adam(model.weight_net.parameters(), lr=3e-3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:images]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * (images // 16))
    model.train()
    model.cnn.eval()
    for _ in range(epochs):
        for rows in order[torch.randperm(images)].split(16)[:images // 16]:
            _, loss = two_pass_step(model, x[rows], y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


class Scores:
    "Scores of maps of the predicted classes, by the CNN"
    def __init__(self, model, x, y, boxes):
        from antehoc_nb.evaluate.localisation import Mosaics
        self.model, self.x, self.y, self.boxes = model, x, y, boxes
        self.given = torch.cat([self.outputs(images) for images in x.split(50)])
        self.target = self.given.argmax(1)
        self.other = (self.target + 1) % self.given.shape[1]
        self.mosaics = Mosaics(confidence=.3)
        right = self.given.gather(1, y[:, None])[:, 0] * (self.target == y)
        self.groups = self.mosaics.group(y, right)

    @torch.no_grad()
    def outputs(self, x): return self.model.cnn(x).softmax(1)

    def probability(self, x, target):
        return torch.cat([self.outputs(images) for images in x.split(50)]).gather(1, target[:, None])[:, 0]

    def drop(self, p_x, p_e): return 100 * ((p_x - p_e).clamp_min(0) / p_x).mean().item()

    def of(self, explain):
        "All scores of `explain(images, target)`"
        from antehoc_nb.evaluate.faithfulness import equal_area_mask, insertion_deletion
        from antehoc_nb.evaluate.localisation import localisation

        def maps_of(target): return torch.cat([explain(*part) for part in zip(self.x.split(25), target.split(25))])
        own, other, black = maps_of(self.target), maps_of(self.other), -self.model.mean / self.model.std

        def kept(maps): return torch.lerp(black.expand_as(self.x), self.x, maps)
        p_x = self.probability(self.x, self.target)
        masks = {f'{share:.0%}': equal_area_mask(own, share) for share in (.1, .2, .5)} | dict(energy=own)
        found = dict(drop={name: self.drop(p_x, self.probability(kept(mask), self.target))
                           for name, mask in masks.items()})
        curves = insertion_deletion(self.probability, self.x, own, 16, baseline=black, target=self.target, bs=50)
        found |= {name: curves[name].mean().item() for name in ('insertion', 'deletion')}
        for name, mask in (('energy', lambda maps: maps), ('20%', lambda maps: equal_area_mask(maps, .2))):
            under_own, under_other = kept(mask(own)), kept(mask(other))
            scored = dict(own=(under_own, self.target), other=(under_other, self.target),
                          steering=(under_other, self.other))
            found[f'swap {name}'] = {key: self.probability(*pair).mean().item() for key, pair in scored.items()}
        if self.boxes is not None: found |= localisation(own, self.boxes)
        found['grid'] = self.grid_pointing(explain)
        return found | dict(area=own.mean().item())

    def grid_pointing(self, explain):
        shares = []
        for group in self.groups.split(10):
            mosaics = self.mosaics.build(self.x[group.flatten()])
            for cell in range(4):
                maps = explain(mosaics, self.y[group[:, cell]])
                shares.append(self.mosaics.share_in_cell(maps, cell))
        return torch.cat(shares).mean().item()


def variant(name, model, plain, train, options):
    "A function from images and target classes to maps"
    from antehoc_nb.core import model as module
    from antehoc_nb.evaluate.explainers import grad_cam
    changed = {
        'without contrast': dict(contrast=functools.partial(module.contrast, share=0.)),
        'without gate': dict(contribution_gate=lambda contributions, evidence=None: 1.),
        'evidence alone': dict(spatial_softmax=lambda maps, temperature: torch.ones_like(maps)),
    }.get(name, {})
    if name == 'Grad-CAM': return functools.partial(grad_cam, model)
    used = plain if 'without evidence' in name else model
    if name.startswith('trained'): used = trained(used, *train, options.images, options.epochs)

    def explain(x, target):
        with mock.patch.multiple(module, **changed) if changed else contextlib.nullcontext():
            return used.explain(x, target=target).map
    return explain


def run(dataset, options, results):
    "The scores of every variant that the record does not have yet"
    from antehoc_nb.core.model import AntehocModel
    root, is_imagenet = Path(os.environ['ANTEHOC_DATA']), dataset == 'imagenet600'
    train, (x, y), boxes, cnn, normalisation = imagenet_images(root) if is_imagenet else images_and_cnn(dataset, root)
    for name in OF_IMAGENET if is_imagenet else VARIANTS:
        if name in results: continue
        start = time.time()
        torch.manual_seed(0)  # of the weight networks
        model = AntehocModel(cnn, x[:2], **normalisation)
        plain = AntehocModel(cnn, x[:2], evidence=False, **normalisation)
        explain = variant(name, model, plain, train, options)
        scores = Scores(model, x, y, boxes)
        results[name] = scores.of(explain)
        results['accuracy'], results['n'] = (scores.target == y).float().mean().item(), len(x)
        print(dataset, name, json.dumps(results[name]), f'{time.time() - start:.0f} s', flush=True)
        yield


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--datasets', nargs='+', default=list(DATASETS), choices=DATASETS)
    parser.add_argument('--images', type=int, default=800, help='images that the weight network is trained on')
    parser.add_argument('--epochs', type=int, default=3)
    options = parser.parse_args()
    from antehoc_nb.evaluate.scoreboard import run_record, write_record
    results = json.loads(RECORD.read_text())['results'] if RECORD.exists() else {}
    config = dict(cnn='tf_efficientnet_lite0, frozen, linear head', size=SIZE, images=options.images,
                  epochs=options.epochs, head_images=HEAD, valid_images=VALID)
    for dataset in options.datasets:
        for _ in run(dataset, options, results.setdefault(dataset, {})):
            record = run_record(config, 0, results, experiment='evidence', command='python benchmarks/evidence.py')
            write_record(record, RECORD)


if __name__ == '__main__': main()
