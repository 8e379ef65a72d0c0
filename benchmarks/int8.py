"""How far integers of 8 bits move predictions and maps, on photographs that did not set the ranges of the numbers.

    ANTEHOC_DATA=folder OMP_NUM_THREADS=1 python benchmarks/int8.py

EfficientNet-Lite0 with its ImageNet weights is exported twice, as floats and with `int8=` 100 photographs of
`imagenet_600.tar`. 200 others are explained by both files, with the class that the floats predict as the target:

- `prediction`: the largest change of a probability, and in how many photographs the same class wins;
- `map`: the mean absolute difference of the maps, their correlation, and the overlap (intersection over union) of
  their highest fifths. `other class` is the same between the float file's maps of the first and the second class.

The time of one photograph is on one thread, sides in turns. About three minutes.
"""
import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

RECORD = Path(__file__).resolve().parents[1]/'results'/'benchmarks'/'int8.json'
TEST, VALID = 200, 60  # as `antehoc reproduce imagenet` divides the photographs


def photographs(n):
    "Files that set the ranges, at most `n`; and files to measure on, with their classes."
    from antehoc_nb.data.images import data_root
    from antehoc_nb.tasks.imagenet import labelled_photos
    parts = labelled_photos(data_root()/'imagenet_600.tar', TEST, VALID)
    return [file for file, _ in parts['train'][:n]], *zip(*parts['test'], strict=True)


def in_batches(exported, files, target=None, n=20):
    "Predictions and maps of files."
    found = [exported(list(files[i:i + n]), target=None if target is None else target[i:i + n])
             for i in range(0, len(files), n)]
    return np.concatenate([part.prediction for part in found]), np.concatenate([part.map[:, 0] for part in found])


def highest_fifth(maps):
    flat = maps.reshape(len(maps), -1)
    return flat > np.quantile(flat, .8, axis=1, keepdims=True)


def alike(maps, others):
    "How much two maps of each image are alike, on average."
    correlation = [np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in zip(maps, others, strict=True)]
    one, other = highest_fifth(maps), highest_fifth(others)
    overlap = (one & other).sum(1) / (one | other).sum(1)
    return dict(difference=float(np.abs(maps - others).mean()), correlation=float(np.mean(correlation)),
                overlap=float(overlap.mean()))


def milliseconds(paths, reps=40):
    "Median time of one photograph, of each file, on one thread."
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider']) for path in paths]
    feed = dict(images=np.zeros((1, 3, 224, 224), 'uint8'), target=np.array([-1]))
    times = [[] for _ in sessions]
    for repetition in range(reps + 2):
        for session, of_session in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, {one.name: feed[one.name] for one in session.get_inputs()})
            if repetition > 1: of_session.append(1000 * (time.perf_counter() - start))
    return [round(statistics.median(of_session), 2) for of_session in times]


def measure(model, ranges, files, classes, folder):
    "The results for one model."
    from antehoc_nb.core.export import load_exported
    paths = [model.export(folder/'floats.onnx'), model.export(folder/'integers.onnx', int8=ranges)]
    floats, integers = map(load_exported, paths)
    before, _ = in_batches(floats, files)
    first, second = before.argsort(1)[:, :-3:-1].T
    is_specific = model.class_specific
    maps = in_batches(floats, files, first if is_specific else None)[1]
    after, moved = in_batches(integers, files, first if is_specific else None)
    found = dict(n=len(files), ranges=len(ranges),
                 prediction=dict(same_class=float((before.argmax(1) == after.argmax(1)).mean()),
                                 largest_change=float(np.abs(before - after).max(1).mean()),
                                 accuracy=[float((scores.argmax(1) == classes).mean()) for scores in (before, after)]),
                 map=alike(maps, moved), megabytes=[path.stat().st_size / 1e6 for path in paths],
                 milliseconds=milliseconds(paths))
    if is_specific: found['other class'] = alike(maps, in_batches(floats, files, second)[1])
    return found


def main():
    from antehoc_nb.core import export  # noqa: F401  adds `model.export`
    from antehoc_nb.evaluate.scoreboard import run_record, write_record
    from antehoc_nb.train.imagenet import SHIPPED_WEIGHT_NET, imagenet_model
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--ranges', type=int, default=100, help='photographs that set the ranges of the numbers')
    parser.add_argument('--out', type=Path, default=RECORD, help='record')
    options = parser.parse_args()
    start = time.time()
    ranges, files, classes = photographs(options.ranges)
    results = {}
    for name, weights in (('default', None), ('shipped weight network', SHIPPED_WEIGHT_NET)):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(imagenet_model(weights), ranges, files, np.array(classes), Path(folder))
        print(name, results[name], flush=True)
    config = dict(cnn='tf_efficientnet_lite0', size=224, ranges=options.ranges, test=TEST)
    record = run_record(config, 0, results, experiment='int8', command='python benchmarks/int8.py',
                        seconds=round(time.time() - start))
    print(f'record: {os.path.relpath(write_record(record, options.out))}')


if __name__ == '__main__': main()
