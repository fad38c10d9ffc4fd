"""A plain torch loop: the same initial weights, images in the same order, rates and validation."""

import torch
from torch.nn import functional as F

from horovod_owt.model import build_model
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.step import DTYPES
from horovod_owt.schedule import learning_rate
from horovod_owt.train.pipelines import training_pipeline, validation_pipeline
from horovod_owt.train.prepare import Request

ALONE = World(0, 1, 0, 1, "here", torch.device("cpu"), 1)


def train(request: Request) -> tuple[list[float], float]:
    """The losses of all steps, and the final top-1 accuracy in percent."""
    cfg, images = request.cfg, len(request.folder.train)
    model = build_model(cfg.model, cfg.classes, dropout=cfg.dropout, seed=cfg.seed).to(DTYPES[cfg.precision])
    torch.manual_seed(cfg.seed)  # of dropout
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=cfg.momentum, weight_decay=cfg.weight_decay
    )
    losses, model = [], model.train()
    with training_pipeline(cfg, request.folder, ALONE) as batches:
        for step in range(cfg.total_steps(images, 1)):
            optimizer.param_groups[0]["lr"] = learning_rate(
                cfg.schedule,
                peak_lr=cfg.peak_lr(1),
                epoch=step * cfg.batch / images,
                epochs=cfg.epochs,
                warmup_epochs=cfg.warmup_epochs,
                step_epochs=cfg.batch / images,
            )
            batch = next(batches)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch.images.to(DTYPES[cfg.precision])), batch.labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, _top1(model.eval(), request)


@torch.no_grad()
def _top1(model: torch.nn.Module, request: Request) -> float:
    correct = seen = 0
    with validation_pipeline(request.cfg, request.folder.val, ALONE) as batches:
        for batch in batches:
            logits = model(batch.images.to(DTYPES[request.cfg.precision]))
            right = logits.argmax(dim=1) == batch.labels
            correct += int((right & batch.valid).sum())
            seen += int(batch.valid.sum())
    return 100 * correct / seen
