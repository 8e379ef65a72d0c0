"""What of a transformer's tokens says best where it looks: compared on photo-digits, by where the digit is.

A small ViT is trained from scratch. Of each block there are several candidates for the strength at each place: the L2
norm of the token after the block (the residual stream), of the token minus the mean token of the image, of the token
after the next norm, of the block's update (its output minus its input), and the row of the class token in the attention
rollout (Abnar and Zuidema 2020). Each becomes a soft attention map, and the maps of all blocks are averaged.
"""
import argparse
import json
import time
from pathlib import Path

RECORD = Path(__file__).resolve().parents[1]/'results'/'benchmarks'/'tokens.json'


def digits(n, split, options):
    "Normalised images, labels and boxes of `n` scenes, without those of digits that are left out."
    import numpy as np
    import torch

    from antehoc_nb.data.photo_digits import PhotoDigits
    scenes = PhotoDigits(n, options.size, options.seed, split)
    labels, boxes = torch.tensor(np.asarray(scenes.labels)).long(), torch.as_tensor(scenes.boxes)
    kept = labels < options.classes
    images = torch.tensor(np.stack([np.asarray(image) for image in scenes.images])).permute(0, 3, 1, 2).float() / 255
    return ((images - .45) / .25)[kept], labels[kept], boxes[kept]


def small_vit(options):
    """A ViT with a class token, and attention weights that can be read. Its patches are embedded by a few convolutions
    (Xiao et al. 2021), without which it would take far more images to learn."""
    import timm
    import torch
    from torch import nn
    torch.manual_seed(options.seed)
    sizes = dict(img_size=options.size, patch_size=options.patch, embed_dim=options.width, depth=options.depth)
    heads = dict(num_heads=options.width // 32, num_classes=options.classes)
    vit = timm.models.VisionTransformer(**sizes, **heads, mlp_ratio=2)
    stem, channels, width = [], 3, options.width // 2
    for _ in range(options.patch.bit_length() - 1):
        stem += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    vit.patch_embed.proj = nn.Sequential(*stem, nn.Conv2d(width, options.width, 1))
    return vit


def train(vit, images, labels, options):
    """AdamW with a cosine schedule for so many minutes of one core or epochs, whichever ends first; shifted images.
    Epochs done."""
    import torch
    import torch.nn.functional as F
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3, weight_decay=.05)
    start, generator, done = time.process_time(), torch.Generator().manual_seed(options.seed), 0.
    for epoch in range(options.epochs):
        order = torch.randperm(len(images), generator=generator)
        for step, batch in enumerate(order.split(64)):
            spent = (time.process_time() - start) / 60 / options.minutes
            done = epoch + 64 * step / len(images)
            if spent >= 1: return done
            progress = max(spent, done / options.epochs)
            for group in optimizer.param_groups:
                warm = min(1, (len(images) * done + 64) / 3000)
                group['lr'] = 1e-3 * warm * (1 + torch.cos(torch.tensor(progress * torch.pi)).item()) / 2
            down, right = torch.randint(-4, 5, (2,), generator=generator).tolist()
            x = images[batch].roll((down, right), (2, 3))
            loss = F.cross_entropy(vit.train()(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vit.parameters(), 1.)
            optimizer.step()
        print(f'epoch {epoch}: loss {loss.item():.3f}, {time.process_time() - start:.0f} s', flush=True)
    return float(options.epochs)


def strengths(vit, x):
    "Name -> of each block the strength at each place, (B,1,rows,columns)."
    import torch
    inputs, outputs, weights = [], [], []
    handles = []

    def note_block(module, args, output):
        inputs.append(args[0])
        outputs.append(output)

    def note_weights(module, args, output): weights.append(args[0])
    for block in vit.blocks:
        block.attn.fused_attn = False
        handles.append(block.register_forward_hook(note_block))
        handles.append(block.attn.attn_drop.register_forward_hook(note_weights))
    with torch.no_grad(): logits = vit.eval()(x)
    for handle in handles: handle.remove()
    norms = [*(block.norm1 for block in vit.blocks[1:]), vit.norm]
    rows, columns = vit.patch_embed.grid_size
    mean_weights = [each.mean(1) + torch.eye(each.shape[-1]) for each in weights]
    rollout, rolled = torch.eye(mean_weights[0].shape[-1])[None], []
    for each in mean_weights:
        rollout = each / each.sum(-1, keepdim=True) @ rollout
        rolled.append(rollout[:, 0, 1:])

    def norm(tokens): return tokens[:, 1:].square().mean(2).sqrt()
    with torch.no_grad():
        found = {'residual stream': [norm(output) for output in outputs],
                 'minus the mean token': [norm(output - output[:, 1:].mean(1, keepdim=True)) for output in outputs],
                 'after the next norm': [norm(layer(output)) for layer, output in zip(norms, outputs)],
                 'update of the block': [norm(output - before) for before, output in zip(inputs, outputs)],
                 'attention of the class token': [each[:, :, 0, 1:].mean(1) for each in weights],
                 'attention rollout': rolled}
    return logits, {name: [each.unflatten(1, (rows, columns))[:, None] for each in of_blocks]
                    for name, of_blocks in found.items()}


def score(vit, images, boxes, options):
    "Name -> pointing and energy in the box, of all blocks together, of the later half, and of the last."
    import torch

    from antehoc_nb.core.attention import minmax, softmax_map
    from antehoc_nb.core.geometry import resize
    from antehoc_nb.evaluate.localisation import localisation
    size = images.shape[2:]
    found = {}
    _, of_names = strengths(vit, images)
    for name, of_blocks in of_names.items():
        maps = [resize(softmax_map(each, options.temperature), size) for each in of_blocks]
        half = len(maps) // 2
        for blocks, some in (('all', maps), ('later half', maps[half:]), ('last', maps[-1:])):
            found[f'{name}, {blocks}'] = localisation(minmax(torch.stack(some).mean(0)), boxes)
    centre = [(n - 1) / 2 for n in size]
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in size), indexing='ij')
    blob = (-((rows - centre[0])**2 + (columns - centre[1])**2) / (2 * (min(size) / 4)**2)).exp()
    found['control: a blob in the centre'] = localisation(blob.expand(len(images), 1, -1, -1), boxes)
    return found


def main():
    import torch

    from antehoc_nb.evaluate.scoreboard import run_record, write_record
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--images', type=int, default=8000, help='scenes of all ten digits to train on')
    add('--scored', type=int, default=1000, help='scenes of all ten digits that maps are scored on')
    add('--classes', type=int, default=5, help='digits that are kept: those below')
    add('--size', type=int, default=48)
    add('--patch', type=int, default=8, help='a power of 2')
    add('--width', type=int, default=64)
    add('--depth', type=int, default=4)
    add('--epochs', type=int, default=20)
    add('--minutes', type=float, default=20., help='of training on one core, at most')
    add('--temperature', type=float, default=3.)
    add('--seed', type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    vit = small_vit(options)
    images, labels, _ = digits(options.images, 'train', options)
    epochs = train(vit, images, labels, options)
    images, labels, boxes = digits(options.scored, 'test', options)
    accuracy = (strengths(vit, images)[0].argmax(1) == labels).float().mean().item()
    scores = score(vit, images, boxes, options)
    print(json.dumps(dict(epochs=epochs, accuracy=accuracy, scores=scores), indent=1))
    record = run_record(vars(options), [options.seed], dict(epochs=epochs, accuracy=accuracy, scores=scores),
                        experiment='tokens', command='python benchmarks/tokens.py', seconds=round(time.time() - start))
    print(write_record(record, RECORD))


if __name__ == '__main__': main()
