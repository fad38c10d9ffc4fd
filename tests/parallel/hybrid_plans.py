"""The runs of train_random.py that test_hybrid.py compares, by name."""

IMAGES, CLASSES = 8, 10  # of a global batch
LR = 0.02
SEED = 7
STEPS = 3  # what is wrong shows in the second already
FP32_STEPS = 6  # these are quicker


def plan(ranks: int, steps: int, **settings) -> dict:
    """A run of train_random.py on `ranks` ranks."""
    batch = IMAGES // ranks // settings.get("accum_steps", 1)
    defaults = dict(image_size=63, classes=CLASSES, dropout=0, lr=LR, seed=SEED, batch=batch)
    return {"steps": steps, "settings": defaults | settings}


def hybrid(ranks: int, steps: int, size: int, scheme: str, **settings) -> dict:
    return plan(ranks, steps, parallel="hybrid", fc_group_size=size, owt_scheme=scheme, **settings)


BN = dict(model="alexnet-owt-bn", precision="fp64")
SKIP = dict(bad_images="skip", precision="fp64", label_smoothing=0.1)
CLIP_NORM = 0.05
LARS = dict(optimizer="lars", lr=10.0, weight_decay=0.01, precision="fp64")
ON_2_RANKS = {
    "fp64-data": plan(2, STEPS, precision="fp64"),
    "fp64-a": hybrid(2, STEPS, 2, "a", precision="fp64"),
    "fp64-b": hybrid(2, STEPS, 2, "b", precision="fp64"),
    "fp64-a-accum": hybrid(2, STEPS, 2, "a", precision="fp64", accum_steps=2),
    "fp64-b-accum": hybrid(2, STEPS, 2, "b", precision="fp64", accum_steps=2),
    "fp32-data": plan(2, FP32_STEPS),
    "fp32-a": hybrid(2, FP32_STEPS, 2, "a"),
    "fp32-b": hybrid(2, FP32_STEPS, 2, "b"),
    "sync-bn-data": plan(2, STEPS, sync_bn=True, **BN),
    "sync-bn-a": hybrid(2, STEPS, 2, "a", sync_bn=True, **BN),
    "lars-data": plan(2, STEPS, **LARS),
    "lars-a": hybrid(2, STEPS, 2, "a", **LARS),
    "average-data": plan(2, STEPS, sync_bn=True, ema=0.5, **BN),
    "average-a": hybrid(2, STEPS, 2, "a", sync_bn=True, ema=0.5, **BN),
    "dropout-data": plan(2, STEPS, precision="fp64", dropout=0.5, accum_steps=2),
    "dropout-a": hybrid(2, STEPS, 2, "a", precision="fp64", dropout=0.5),
    "dropout-b-accum": hybrid(2, STEPS, 2, "b", precision="fp64", dropout=0.5, accum_steps=2),
    "local": hybrid(2, STEPS, 2, "b", precision="fp64", fc_batch="local"),
    "bf16-data": plan(2, STEPS, precision="bf16"),
    "bf16-a": hybrid(2, STEPS, 2, "a", precision="bf16"),
    "bf16-b": hybrid(2, STEPS, 2, "b", precision="bf16"),
    "compressed-data": plan(2, STEPS, compression="fp16"),
    "one-bit": plan(2, FP32_STEPS, compression="onebit"),
    "low-rank": plan(2, FP32_STEPS, compression="powersgd:4"),
    "compressed": hybrid(2, STEPS, 2, "a", compression="fp16"),
    "clipped-data": plan(2, STEPS, precision="fp64", clip_norm=CLIP_NORM),
    "clipped-a": hybrid(2, STEPS, 2, "a", precision="fp64", clip_norm=CLIP_NORM),
    "skip-data": plan(2, STEPS, **SKIP),
    "skip-a": hybrid(2, STEPS, 2, "a", **SKIP),
    "skip-b-accum": hybrid(2, STEPS, 2, "b", accum_steps=2, **SKIP),
    "skip-local": hybrid(2, STEPS, 2, "b", fc_batch="local", **SKIP),
}
ON_4_RANKS = {
    **{
        f"fp64-{name}-{scheme}": hybrid(4, STEPS, size, scheme, precision="fp64")
        for name, size in (("one-group", 4), ("2x2", 2))
        for scheme in "ab"
    },
    **{
        f"fp32-{name}-{scheme}": hybrid(4, FP32_STEPS, size, scheme)
        for name, size in (("one-group", 4), ("2x2", 2))
        for scheme in "ab"
    },
    "fp64-2x2-accum": hybrid(4, STEPS, 2, "a", precision="fp64", accum_steps=2),
    "sync-bn-one-group": hybrid(4, STEPS, 4, "a", sync_bn=True, **BN),
    "sync-bn-2x2": hybrid(4, STEPS, 2, "a", sync_bn=True, **BN),
    "lars-2x2": hybrid(4, STEPS, 2, "b", **LARS),
    "average-2x2": hybrid(4, STEPS, 2, "a", sync_bn=True, ema=0.5, **BN),
    "average-bn-data": plan(4, STEPS, ema=0.5, **BN),
    "average-bn-2x2-b": hybrid(4, STEPS, 2, "b", ema=0.5, **BN),
    "bn-data": plan(4, STEPS, **BN),
    "bn-one-group-a": hybrid(4, STEPS, 4, "a", **BN),
    "bn-2x2-b": hybrid(4, STEPS, 2, "b", **BN),
    "dropout-one-group": hybrid(4, STEPS, 4, "a", precision="fp64", dropout=0.5),
    "dropout-2x2": hybrid(4, STEPS, 2, "b", precision="fp64", dropout=0.5),
    "local-2x2": hybrid(4, STEPS, 2, "b", precision="fp64", fc_batch="local"),
    "local-2x2-compressed": hybrid(4, STEPS, 2, "b", fc_batch="local", compression="fp16"),
    "bf16-2x2": hybrid(4, STEPS, 2, "b", precision="bf16"),
    "2-classes": hybrid(4, STEPS, 4, "a", precision="fp64", classes=2),
    "clipped-2x2": hybrid(4, STEPS, 2, "b", precision="fp64", clip_norm=CLIP_NORM),
    "skip-2x2": hybrid(4, STEPS, 2, "b", **SKIP),
    "skip-local-2x2": hybrid(4, STEPS, 2, "b", fc_batch="local", **SKIP),
}
PLANS = {2: ON_2_RANKS, 4: ON_4_RANKS}
EVALUATED = {
    2: ["fp64-a", "sync-bn-data", "sync-bn-a", "average-data", "average-a"],
    4: ["bn-data", "bn-2x2-b", "fp32-2x2-a", "average-2x2"],
}


def named(prefix: str, chosen=PLANS) -> list[tuple[int, str]]:
    return [(ranks, name) for ranks, plans in chosen.items() for name in plans if name.startswith(prefix)]
