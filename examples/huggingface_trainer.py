"""A network of Hugging Face that explains itself, trained by its `Trainer`: `pip install 'transformers[torch]'`, then
`python huggingface_trainer.py`.

Both passes are in `forward`, which returns the sum of their losses. The CNN ends with the same weights as without the
weight network."""
import tempfile

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.data.shapes import shape_scenes


def make_cnn():
    "Two classes: is there a disc?"
    sizes = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return ResNetForImageClassification(ResNetConfig(layer_type='basic', num_labels=2, **sizes))


class Explained(nn.Module):
    "What the `Trainer` gets in place of the CNN: `forward` gives the losses of both passes."
    def __init__(self, model):
        super().__init__()
        self.model = model  # an `AntehocModel`

    def forward(self, pixel_values, labels):
        out, int_loss = two_pass_step(self.model, pixel_values, labels)
        return dict(loss=F.cross_entropy(out.logits, labels) + int_loss, logits=out.logits)


def dataset(n, seed=0):
    scenes = shape_scenes(n, 32, seed)
    return [dict(pixel_values=image, labels=int(label)) for image, label in zip(scenes.images, scenes.labels[:, 0])]


def train(model, epochs=4, n=256):
    """`max_grad_norm=0`, since clipping by the norm of all gradients together would let those of the weight network
    shrink the CNN's."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=1e-2, max_grad_norm=0,
            use_cpu=True, save_strategy='no', report_to=[], disable_tqdm=True, logging_strategy='no')
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset(n), eval_dataset=dataset(32, seed=1))
        trainer.train()
        scores = trainer.evaluate()
    return scores


def main(epochs=4, n=256):
    set_seed(0)
    images = torch.stack([item['pixel_values'] for item in dataset(2, seed=1)])
    model = AntehocModel(make_cnn(), images, meta=dict(size=[32, 32], vocab=['none', 'disc']))  # explains `logits`
    scores = train(Explained(model), epochs, n)
    model.calibrate(images)  # of the CNN as it is now
    print({'eval_loss': round(scores['eval_loss'], 3)})
    explanation = model.explain(images, target='disc')
    print(explanation)
    return model, explanation


if __name__ == '__main__':
    main()[1].save('disc.png')
