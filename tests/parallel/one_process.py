"""What ranks are compared with: the same training by plain programs of one process."""

import sys
from functools import cache

import torch
from hybrid_plans import CLASSES, IMAGES, plan
from real_ranks import PROGRAMS
from torch.nn import functional as F

from horovod_owt.model import build_model
from horovod_owt.model.alexnet_owt import FC6_IN
from horovod_owt.model.dropout import keep_scale, sample_keys

sys.path.insert(0, str(PROGRAMS))
from train_random import AVERAGE, BAD, HIDDEN, configure, global_batch  # noqa: E402


def sgd(parameters, cfg, lr: float | None = None) -> torch.optim.SGD:
    if cfg.optimizer == "lars":  # the step is in the gradients
        return torch.optim.SGD(parameters, lr=1.0, momentum=cfg.momentum)
    return torch.optim.SGD(parameters, lr=lr or cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)


def weights_of(net) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in net.state_dict().items()}


def net_for(cfg):
    """The whole net with the same first weights; it leaves dropout to the programs below."""
    net = build_model(cfg.model, cfg.classes, dropout=0.0, seed=cfg.seed)
    return (net.double() if cfg.precision == "fp64" else net).train()


@cache
def plain(steps: int, *, masked: float = 0.0, **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, the whole net, the whole global batch at once, autograd and torch's SGD.

    `masked` is a share of dropout, its masks those of the samples' places in the stream.
    """
    cfg = configure(plan(1, steps, **settings)["settings"])
    net = net_for(cfg)
    optimizer, losses = sgd(net.parameters(), cfg), []
    floats = {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    averages = {name: tensor.clone() for name, tensor in floats.items()} if cfg.ema else {}
    for step in range(steps):
        images, labels = global_batch(step, IMAGES, cfg.classes)
        good = good_rows(step, cfg)
        images, labels = images[good], labels[good]
        features = net.convolve(images.to(next(net.parameters()).dtype))
        if masked:
            positions = torch.arange(step * IMAGES, (step + 1) * IMAGES).numpy()
            keys = torch.from_numpy(sample_keys(cfg.seed, positions))
            _, fc6, relu, _, *rest = net.classifier
            hidden = relu(fc6(features * keep_scale(keys, 0, range(FC6_IN), masked)))
            logits = torch.nn.Sequential(*rest)(hidden * keep_scale(keys, 1, range(HIDDEN), masked))
        else:
            logits = net.classifier(features)
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, labels, label_smoothing=cfg.label_smoothing)
        loss.backward()
        if cfg.clip_norm:
            norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
            assert norm > cfg.clip_norm, "nothing to clip"
            for parameter in net.parameters():  # torch's clip_grad_norm_ adds 1e-6 to the norm
                parameter.grad *= cfg.clip_norm / norm
        if cfg.optimizer == "lars":
            for p in net.parameters():
                size, decay = p.detach().norm(), cfg.weight_decay
                rate = cfg.lars_eta * size / (p.grad.norm() + decay * size)
                p.grad = cfg.lr * rate * (p.grad + decay * p.detach())
        optimizer.step()
        for name, average in averages.items():
            averages[name] = cfg.ema * average + (1 - cfg.ema) * floats[name]
        losses.append(loss.item())
    return losses, weights_of(net) | {f"{AVERAGE}{name}": average for name, average in averages.items()}


def first_gradient_norm() -> float:
    """Of the whole net's, before anything is clipped."""
    cfg = configure(plan(1, 1, precision="fp64")["settings"])
    net, (images, labels) = net_for(cfg), global_batch(0, IMAGES, CLASSES)
    F.cross_entropy(net(images.double()), labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).norm().item()


def good_rows(step: int, cfg) -> list[int]:
    """Of the global batch, when some of it is bad."""
    return [row for row in range(IMAGES) if cfg.bad_images == "fail" or row not in BAD.get(step, [])]


@cache
def plain_local(
    steps: int, *, ranks: int, size: int, **settings
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The paper's variable batch size as a sequence: one process, classifier updates in `size` turns a step.

    In turn k the classifier sees the sub-batch of the k-th rank of every group and is updated by their mean
    gradient, with the learning rate of a batch so much smaller. The features' gradients are those of the
    weights before that update; the convolutions are updated last, by the mean over the global batch. Bad
    images are in neither mean, and a turn without a good one is no update.
    """
    cfg = configure(plan(1, steps, **{"precision": "fp64", **settings})["settings"])
    net = net_for(cfg)
    share, batch = 1 / size, IMAGES // ranks
    fc_optimizer = sgd(net.classifier.parameters(), cfg, lr=cfg.lr * share)
    conv_optimizer, losses = sgd(net.features.parameters(), cfg), []
    for step in range(steps):
        images, labels = global_batch(step, IMAGES, cfg.classes)
        features = net.convolve(images.double())
        d_features, step_loss, good = torch.zeros_like(features), 0.0, good_rows(step, cfg)
        for turn in range(size):
            takers = range(turn, ranks, size)
            rows = [row for rank in takers for row in range(rank * batch, (rank + 1) * batch) if row in good]
            if not rows:
                continue
            own = features[rows].detach().requires_grad_()
            loss = F.cross_entropy(net.classifier(own), labels[rows], label_smoothing=cfg.label_smoothing)
            fc_optimizer.zero_grad()
            loss.backward()
            fc_optimizer.step()
            d_features[rows] = own.grad * len(rows) / len(good)
            step_loss += loss.item() * len(rows) / len(good)
        conv_optimizer.zero_grad()
        features.backward(d_features)
        conv_optimizer.step()
        losses.append(step_loss)
    return losses, weights_of(net)


def assert_same(ours: dict, theirs: dict, tolerance: float) -> None:
    """Each tensor's distance is at most `tolerance` of its length."""
    assert ours.keys() == theirs.keys()
    far = {}
    for name, wanted in theirs.items():
        assert ours[name].shape == wanted.shape
        wanted = wanted.double()
        # a bias before a normalisation has no gradient but rounding: there is no length to compare with
        distance = (ours[name].double() - wanted).norm() / wanted.norm().clamp(min=1e-6)
        if not distance <= tolerance:
            far[name] = distance.item()
    assert not far


def distance(ours: dict, theirs: dict) -> float:
    """Euclidean, over all tensors."""
    return sum((ours[n].double() - theirs[n].double()).square().sum().item() for n in theirs) ** 0.5


def way_of(weights: dict) -> float:
    """How far these have gone from the first weights."""
    return distance(net_for(configure(plan(1, 0)["settings"])).state_dict(), weights)
