"""The learning rate over a run."""

import pytest

from horovod_owt.schedule import learning_rate


def lr(schedule, epoch, *, warmup_epochs=0.0, epochs=90.0, step_epochs=0.1):
    return learning_rate(
        schedule,
        peak_lr=1.0,
        epoch=epoch,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        step_epochs=step_epochs,
    )


@pytest.mark.parametrize(
    ("schedule", "epoch", "expected"),
    [
        ("constant", 89, 1),
        ("step:30:0.1", 29.9, 1),
        ("step:30:0.1", 30, 0.1),
        ("step:30:0.1", 89, 0.01),
        ("cosine", 0, 1),
        ("cosine", 45, 0.5),
        ("cosine", 90, 0),
        ("poly:2", 45, 0.25),
        ("poly:2", 95, 0),  # a last step that overshoots the end
    ],
)
def test_schedules(schedule, epoch, expected):
    assert lr(schedule, epoch) == pytest.approx(expected)


def test_warm_up_rises_from_the_first_step_to_the_peak():
    ramp = [lr("constant", 0.1 * step, warmup_epochs=1) for step in range(12)]
    assert ramp == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1])


def test_a_last_step_of_the_warm_up_that_overshoots_its_end_has_the_peak():
    assert lr("constant", 0.9, warmup_epochs=1, step_epochs=0.3) == 1
