"""A CNN that explains itself, trained by PyTorch Lightning: `pip install lightning`, then `python lightning_module.py`.

Both passes are in `training_step`; the CNN ends with the same weights as without the weight network."""
import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.data.shapes import shape_scenes


def block(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU())


def make_cnn():
    "Two classes: is there a disc?"
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2)
    return nn.Sequential(block(3, 8), block(8, 16), block(16, 32), *head)


class PlainClassifier(lightning.LightningModule):
    "As one has it without a weight network."
    def __init__(self, cnn, lr=1e-2):
        super().__init__()
        self.model, self.lr = cnn, lr

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        self.log('accuracy', (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self): return torch.optim.AdamW(self.model.parameters(), self.lr)


class ExplainedClassifier(PlainClassifier):
    "The same, with a weight network: what `training_step` returns has the losses of both passes."
    def __init__(self, cnn, images, lr=1e-2):
        super().__init__(AntehocModel(cnn, images, meta=dict(size=list(images.shape[2:]), vocab=['none', 'disc'])), lr)
        self.register_buffer('sample', images, persistent=False)

    def training_step(self, batch, number):
        images, labels = batch
        first = (self.current_epoch * self.trainer.num_training_batches + number) * len(images)  # also after a resume
        logits, int_loss = two_pass_step(self.model, images, labels, number=first)
        self.log('int_loss', int_loss.detach())
        return F.cross_entropy(logits, labels) + int_loss

    def validation_step(self, batch, _):
        images, labels = batch
        logits, int_loss = two_pass_step(self.model, images, labels)  # in evaluation mode, and without gradients
        self.log('valid_int_loss', int_loss)
        self.log('accuracy', (logits.argmax(1) == labels).float().mean())

    def on_train_end(self): self.model.measure_border(self.sample)  # of the CNN as it is now


def loaders(n=256):
    scenes, others = shape_scenes(n, 32), shape_scenes(64, 32, seed=1)
    train, valid = (TensorDataset(of.images, of.labels[:, 0].long()) for of in (scenes, others))
    return DataLoader(train, 16, shuffle=True), DataLoader(valid, 16)


def fit(module, train, valid=None, epochs=4):
    trainer = lightning.Trainer(max_epochs=epochs, accelerator='cpu', logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, train, valid)
    return trainer


def main(epochs=4, n=256):
    lightning.seed_everything(0)
    train, valid = loaders(n)
    images = torch.stack([valid.dataset[i][0] for i in range(2)])
    module = ExplainedClassifier(make_cnn(), images)
    trainer = fit(module, train, valid, epochs)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    explanation = module.model.explain(images, target='disc')
    print(explanation)
    return module, explanation


if __name__ == '__main__':
    main()[1].save('disc.png')
