"""Gradient flow, dθ/dt = −∇L(θ): training in continuous time, without the effects of a step size.

Integrated by the Runge–Kutta pair of Dormand and Prince of order 5(4), with local extrapolation: a step is accepted if
the difference of the two orders, relative to atol + rtol·|θ|, has a root mean square of at most 1, and the next one
is 0.9·error^(−1/5) times as long. ``method="rk4"`` is the classical scheme with equal steps.

The gradient of a ReLU head jumps where a unit switches for a sample. Where it points at the jump from both sides, the
flow slides along it (Filippov), which any scheme of this kind follows by small steps to and fro. Steps over jumps are
recognised by their error, which falls with dt instead of dt⁵; they are not made shorter than `kink_step`, whatever
their error is. With few samples a ReLU head slides much of the time, and the flow is right to the order of `kink_step`.

References:
    Dormand, Prince 1980, A family of embedded Runge-Kutta formulae. Du, Hu, Lee 2018, Algorithmic regularization in
    learning deep homogeneous models: layers are automatically balanced, arXiv 1806.00900 (the invariants).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from hfproj.checking import checked
from hfproj.errors import UsageError, check_choice
from hfproj.geometry._head import check_eval, check_loss
from hfproj.typing import OneOf

# Dormand and Prince, table 2: RK5(4)7M. The last stage is the first of the next step.
_STAGES = (
    (1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9), (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)  # fmt: skip
_FOURTH = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 5.0
_KINK_ORDER, _KINK_STEPS, _KINK_MOST = 2.5, 10, 0.01

Tensors: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class GradientFlow(NamedTuple):
    """Where the flow went.

    Attributes:
        params: At the end, in the form they were given in (for a module: name → tensor).
        times: The recorded times, the first 0 and the last `time`.
        losses: L at them.
        trajectory: The parameters at them, in the same form, with a first dimension for the times.
        steps, rejected: Accepted steps, and those that were too long and were repeated.
    """

    params: Any  # what the caller gave: its type is the caller's
    times: Float[Tensor, " times"]
    losses: Float[Tensor, " times"]
    trajectory: Any
    steps: int
    rejected: int


@checked
def gradient_flow(
    loss_fn: Callable[..., Tensor], params: Tensors | nn.Module, *, time: float, record: int | Sequence[float] = 1,
    method: OneOf["rk45", "rk4"] = "rk45", rtol: float = 1e-8, atol: float = 1e-10, kink_step: float | None = None,
    step: float | None = None, max_steps: int = 100_000,
) -> GradientFlow:  # fmt: skip
    """Integrate dθ/dt = −∇L(θ) from t = 0.

    Args:
        loss_fn: θ → L, one number. It gets what `params` is: a tensor, a list, a dict; for a module a function that
            calls it with the current parameters, so that ``lambda head: loss(head(h))`` works as in training.
        params: Where to start, left unchanged. Of a module the trainable parameters flow, and its buffers stand still.
            Use float64 (``head.double()``): in float32, rounding limits the tolerances to about 1e-5.
        time: Where to stop, in units of 1/learning rate: n steps of SGD with rate η come to n·η.
        record: Number of equal intervals to record between, or the times. 1: start and end.
        method: ``"rk45"`` with step control, or ``"rk4"`` with equal steps.
        rtol: Relative tolerance of a step of ``"rk45"``.
        atol: The absolute one.
        kink_step: Length down to which ``"rk45"`` resolves jumps of the gradient; None: time/2000; 0: to `rtol`.
        step: First step of ``"rk45"`` (None: 1 % of the way to a change by all of θ); every step of ``"rk4"`` at most.
        max_steps: Give up after so many.

    Raises:
        UsageError: If a module has BatchNorm or Dropout in training mode, the loss is not one finite number, parameters
            are not floating-point tensors, an option is out of range, or `max_steps` do not reach the end.

    Example:
        >>> theta = torch.tensor([2.0], dtype=torch.float64)
        >>> flow = gradient_flow(lambda theta: theta.square().sum() / 2, theta, time=1.0)
        >>> abs(flow.params.item() - 2 * 0.36787944117144233) < 1e-8  # 2/e
        True
    """
    check_choice("method", method, ("rk45", "rk4"))
    if not 0 < time < float("inf") or rtol < 0 or atol < 0 or rtol + atol == 0 or (step is not None and step <= 0):
        found = f"time={time}, step={step}, rtol={rtol}, atol={atol}"
        raise UsageError(f"Expected a positive time and step and tolerances that are not both 0, got {found}.")
    if method == "rk4" and step is None:
        raise UsageError("method='rk4' needs the length of its steps: step=0.01, for example.")
    times, field = _recorded(record, time), _Field(loss_fn, params)
    flow = _Integration(field, time, step, max_steps, rtol, atol, time / 2000 if kink_step is None else kink_step)
    losses, states = [], []
    for target in times:
        (flow.equal_steps if method == "rk4" else flow.controlled_steps)(target)
        flow.t = target
        losses.append(flow.loss)
        states.append(flow.y)
    at, values = (torch.tensor(numbers, dtype=torch.float64) for numbers in (times, losses))
    return GradientFlow(field.pack(flow.y), at, values, field.pack(torch.stack(states)), flow.taken, flow.rejected)


def _check_layers(W1: Tensor, W2: Tensor, b1: Tensor | None) -> None:
    if W1.shape[0] != W2.shape[1] or (b1 is not None and len(b1) != len(W1)):
        got = f"{list(W1.shape)} and {list(W2.shape)}" + ("" if b1 is None else f" with b1 {list(b1.shape)}")
        raise UsageError(f"Expected W1 [hidden, in_dim], W2 [out_dim, hidden] and b1 [hidden], got {got}.")


@checked
def linear_invariant(
    W1: Float[Tensor, "hidden in_dim"], W2: Float[Tensor, "out_dim hidden"], b1: Float[Tensor, " hidden"] | None = None
) -> Float[Tensor, "hidden hidden"]:
    """Return W_1 W_1ᵀ + b_1 b_1ᵀ − W_2ᵀ W_2, which gradient flow of a two-layer linear head conserves.

    The head is z = W_2 (W_1 h + b_1) + b_2; SGD does not conserve it.

    Args:
        W1: Weight of the first layer, `[hidden, in_dim]`.
        W2: Weight of the second layer, `[out_dim, hidden]`.
        b1: Bias of the first layer `[hidden]`, if it has one that is trained.

    Example:
        >>> W = torch.eye(2)
        >>> linear_invariant(W, W).tolist()  # balanced
        [[0.0, 0.0], [0.0, 0.0]]
    """
    _check_layers(W1, W2, b1)
    invariant = W1 @ W1.mT - W2.mT @ W2
    return invariant if b1 is None else invariant + torch.outer(b1, b1)


@checked
def relu_invariant(
    W1: Float[Tensor, "hidden in_dim"], W2: Float[Tensor, "out_dim hidden"], b1: Float[Tensor, " hidden"] | None = None
) -> Float[Tensor, " hidden"]:
    """Return ‖W_1[j, :]‖² + b_1[j]² − ‖W_2[:, j]‖² of each unit j, which gradient flow of a ReLU head conserves.

    Of LeakyReLU too; SiLU and GELU have no invariant of this kind. `W1`, `W2` are the layers' weights, `b1` is the bias
    of the first, if it has one that is trained, all as for :func:`linear_invariant`.

    Example:
        >>> relu_invariant(torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0]])).tolist()
        [0.0]
    """
    _check_layers(W1, W2, b1)
    invariant = W1.square().sum(1) - W2.square().sum(0)
    return invariant if b1 is None else invariant + b1.square()


class _Field:
    """−∇L as a function of one long vector, and the way back from it to the caller's form."""

    def __init__(self, loss_fn: Callable[..., Tensor], params: Tensors | nn.Module):
        self._loss_fn, self._module = loss_fn, params if isinstance(params, nn.Module) else None
        if isinstance(params, nn.Module):
            check_eval(params)
            params = {name: p for name, p in params.named_parameters() if p.requires_grad}
        self._keys = list(params) if isinstance(params, Mapping) else None
        self._single = isinstance(params, Tensor)
        if isinstance(params, Tensor):
            params = [params]
        tensors = list(params.values() if isinstance(params, Mapping) else params)
        if not tensors or not all(isinstance(t, Tensor) and t.is_floating_point() and not t.is_meta for t in tensors):
            raise UsageError("Expected floating-point tensors: one, a list, a dict or a module with some; got others.")
        self._shapes = [tensor.shape for tensor in tensors]
        self.start = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    def pack(self, y: Tensor) -> Any:
        """Return the caller's form of a vector, or of one for each time."""
        parts = y.split([shape.numel() for shape in self._shapes], dim=-1)
        tensors = [part.reshape((*y.shape[:-1], *shape)) for part, shape in zip(parts, self._shapes)]
        if self._keys is not None:
            return dict(zip(self._keys, tensors))
        return tensors[0] if self._single else tensors

    def __call__(self, y: Tensor) -> tuple[float, Tensor]:
        """Return (L, −∇L)."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = y.detach().clone().requires_grad_()
            params, module = self.pack(leaf), self._module
            loss = self._loss_fn(params if module is None else lambda *a, **k: functional_call(module, params, a, k))
            (gradient,) = torch.autograd.grad(check_loss(loss, "the parameters"), leaf)
        return float(loss.detach()), -gradient


class _Integration:
    """A point of the flow, and the steps that move it on."""

    def __init__(self, field: _Field, time: float, h: float | None, most: int, rtol: float, atol: float, kink: float):
        self.field, self.time, self.max_steps = field, time, most
        self.rtol, self.atol, self.kink_step = rtol, atol, kink
        self.t, self.taken, self.rejected = 0.0, 0, 0
        self.y = field.start
        self.loss, self.slope = field(self.y)
        if not (self.loss == self.loss and torch.isfinite(self.slope).all()):
            raise UsageError("Loss or gradient are NaN or infinite at the start of the flow.")
        self.h = h or 0.01 * float((self.y.norm() + atol) / (self.slope.norm() + 1e-300))  # the next step's length
        self.tried: tuple[float, float] | None = None  # the last rejected step from here, and its error
        self.jumps = 0  # for how many steps more an error is taken for that of a jump

    def equal_steps(self, target: float) -> None:
        """Go to `target` by steps of the classical scheme of order 4, of a length up to `h`."""
        count = max(1, math.ceil((target - self.t) / self.h - 1e-9)) if target > self.t else 0
        for _ in range(count):
            self._check_steps()
            dt = (target - self.t) / count
            k1, (_, k2) = self.slope, self.field(self.y + dt / 2 * self.slope)
            _, k3 = self.field(self.y + dt / 2 * k2)
            _, k4 = self.field(self.y + dt * k3)
            self.y = self.y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            self.loss, self.slope = self.field(self.y)
            if not torch.isfinite(self.slope).all():
                raise UsageError(f"The gradient is not finite after t = {self.t:.4g}: steps of {self.h} are too long.")
            self.taken += 1

    def controlled_steps(self, target: float) -> None:
        """Go to `target` by steps of order 5, as long as the difference from order 4 allows."""
        while target - self.t > 1e-14 * self.time:
            self._check_steps()
            left, h = target - self.t, self.h
            dt = left if left <= h else (left / 2 if left < 2 * h else h)  # two equal steps, not a long and a tiny one
            if dt < 1e-14 * self.time:
                raise UsageError(f"The flow does not go on beyond t = {self.t:.6g}: its steps shrank to {dt:.1g}.")
            y, loss, slope, difference = self._rk45(dt)
            error = _rms(difference / (self.atol + self.rtol * torch.maximum(self.y.abs(), y.abs())))
            # A smooth error falls with dt⁵, that over a jump of the gradient with dt: no tolerance would let it pass.
            if self.tried is not None and error > self.tried[1] * (dt / self.tried[0]) ** _KINK_ORDER:
                self.jumps = _KINK_STEPS
            over_jump = self.jumps and dt <= self.kink_step and _rms(difference) <= _KINK_MOST * _rms(self.y)
            if error > 1 and not over_jump:
                self.rejected += 1
                self.tried = (dt, error) if math.isfinite(error) else None
                self.h = dt * max(_SHRINK, _SAFETY * error**-0.2)
                continue
            longer = dt * min(_GROW, _SAFETY * max(error, 1e-10) ** -0.2)
            self.h = max(h, longer) if dt < h else longer
            if self.jumps:
                self.h, self.jumps = max(self.h, self.kink_step), self.jumps - 1
            self.y, self.loss, self.slope, self.tried = y, loss, slope, None
            self.taken += 1
            self.t = target if dt >= left else self.t + dt

    def _rk45(self, dt: float) -> tuple[Tensor, float, Tensor, Tensor]:
        """Return the step of order 5, L and −∇L at its end, and its difference from the step of order 4."""
        slopes, loss, new = [self.slope], 0.0, self.y
        for weights in _STAGES:
            new = self.y + dt * sum(w * k for w, k in zip(weights, slopes) if w)
            loss, following = self.field(new)
            slopes.append(following)
        fourth = self.y + dt * sum(w * k for w, k in zip(_FOURTH, slopes) if w)
        return new, loss, slopes[-1], new - fourth

    def _check_steps(self) -> None:
        if self.taken + self.rejected >= self.max_steps:
            hint = "Lower time, or raise rtol or max_steps; where it slides along kinks (ReLU), samples or kink_step."
            reached = f"t = {self.t:.4g} of {self.time:.4g}"
            raise UsageError(f"The flow reached {reached} in max_steps={self.max_steps} steps. {hint}")


def _rms(x: Tensor) -> float:
    value = float(x.square().mean().sqrt())
    return value if value == value else math.inf


def _recorded(record: int | Sequence[float], time: float) -> list[float]:
    if isinstance(record, int):
        if record < 1:
            raise UsageError(f"Expected record, a number of intervals, to be at least 1, got {record}.")
        return [time * i / record for i in range(record)] + [time]
    times = sorted({0.0, float(time), *(float(t) for t in record)})
    if times[0] < 0 or times[-1] > time:
        raise UsageError(f"Times to record must lie between 0 and time={time}, got {list(record)}.")
    return times
