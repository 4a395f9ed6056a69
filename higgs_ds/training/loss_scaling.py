"""The loss scale of fp16 training: DeepSpeed's rule, the same at every ZeRO stage.

fp16 has no values between 0 and 6e-8. The loss is multiplied by a scale, so that small gradients stay above that, and
the gradients are divided by it in float32. If a gradient overflows, the scale is halved.

DeepSpeed 0.19.8 has two rules, that of stage 0 without hysteresis. Both change the scale before they divide by it: in
the step that doubles the scale, gradients and their norm are half as large as they should be. So its optimizers keep
the scale that they are given, and it is changed here, after the step.
"""

from __future__ import annotations

from typing import Any

# DeepSpeed's defaults, except for the hysteresis: it would repeat the first window that overflows at the same scale.
DEFAULTS = {
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 1,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}


class LossScaling:
    """The current loss scale, and when it changes."""

    def __init__(self, optimizer: Any, settings: dict[str, Any]) -> None:
        """Take over the scale of a DeepSpeed optimizer.

        Args:
            settings: the fp16 section of a DeepSpeed file. A `loss_scale` above 0 is fixed, 0 means a dynamic one.
        """
        self._optimizer = optimizer
        self.settings = DEFAULTS | settings
        self.is_dynamic = self.settings["loss_scale"] == 0
        self.hysteresis = self.settings["hysteresis"]
        self.steps = 0  # since the last overflow
        scale = 2.0 ** self.settings["initial_scale_power"] if self.is_dynamic else self.settings["loss_scale"]
        self._set_scale(float(scale))
        optimizer._update_scale = lambda *_: None

    def _set_scale(self, scale: float) -> None:
        self.scale = self._optimizer.loss_scale = scale

    @property
    def is_at_minimum(self) -> bool:
        """Whether an overflow cannot lower the scale any more."""
        return not self.is_dynamic or self.scale <= self.settings["min_loss_scale"]

    def update(self, overflowed: bool) -> None:
        """Halve the scale after an overflow, or double it after `loss_scale_window` steps without one.

        With a hysteresis of N, only the N-th overflow halves it, and all that follow; an increase starts the count
        anew, and with `consecutive_hysteresis` every step does.
        """
        if not self.is_dynamic:
            return
        if overflowed:
            self.steps = 0
            if self.hysteresis > 1:
                self.hysteresis -= 1
            else:
                self._set_scale(max(self.scale / 2, self.settings["min_loss_scale"]))
            return
        self.steps += 1
        if self.settings["consecutive_hysteresis"]:
            self.hysteresis = self.settings["hysteresis"]
        stable = self.steps - 1  # the first step after an overflow does not count
        if stable > 0 and stable % self.settings["loss_scale_window"] == 0:
            self.hysteresis = self.settings["hysteresis"]
            self._set_scale(2 * self.scale)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue with the same scales."""
        return {"scale": self.scale, "hysteresis": self.hysteresis, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set_scale(state["scale"])
        self.hysteresis, self.steps = state["hysteresis"], state["steps"]
