"""How anything here is trained: ``fit`` is the loop, ``objectives`` the losses of this model's parts."""

from minivlm.training.files import (
    MetricsLog,
    draw_curve,
    load_state,
    lock_folder,
    read_metrics,
    save_state,
)
from minivlm.training.fit import (
    OPTIMIZERS,
    DistributedContext,
    FitConfig,
    ParameterGroup,
    check_range,
    find_distributed_context,
    fit,
    lr_schedule,
    make_optimizers,
    set_learning_rate,
    train_step,
)

__all__ = [
    "OPTIMIZERS",
    "DistributedContext",
    "FitConfig",
    "MetricsLog",
    "ParameterGroup",
    "check_range",
    "draw_curve",
    "find_distributed_context",
    "fit",
    "load_state",
    "lock_folder",
    "lr_schedule",
    "make_optimizers",
    "read_metrics",
    "save_state",
    "set_learning_rate",
    "train_step",
]
