"""From noise to a clean latent: Euler, DPM-Solver++(2M) and UniPC for flow matching, as in diffusers.

To add a solver, name it in SOLVERS and give solver_steps a branch; what it yields is asked of the network.
"""
import math

import torch

SOLVERS = ("unipc", "dpm++", "euler")


def shifted(sigma, shift):
    """Noise levels in 0..1 after the timestep shift: more than 1 moves them to more noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(steps, shift, solver):
    """Noise levels [steps + 1], the last one 0, and times [steps] in 0..1000, both float64.
    UniPC and DPM++ ask the network at whole times, as Wan's do."""
    if solver not in SOLVERS or steps < 1:
        raise ValueError(f"{steps} steps of {solver!r}; expected at least one, of {', '.join(SOLVERS)}")
    sigma = torch.linspace(0.999 if solver == "unipc" else 1, 0, steps + 1, dtype=torch.float64)
    sigma = shifted(sigma, shift)
    times = 1000 * sigma[:-1]
    return sigma, times if solver == "euler" else times.floor()


def solve(velocity, x, steps, shift, solver):
    """Integrate dx/dsigma = velocity from noise x at sigma 1 to x0 at sigma 0.

    velocity  function (x, t) -> noise - x0, t a float32 scalar tensor in 0..1000
    shift     timestep shift: more than 1 spends more steps at high noise
    solver    "euler"; "dpm++", DPM-Solver++(2M) (Lu et al. 2022); "unipc", UniPC of order 2 with
              B(h) = e^h - 1 (Zhao et al. 2023): the predictor of dpm++, then a corrector that uses the
              network's answer at the predicted point. Both work on x0 over lambda = log((1 - sigma) / sigma),
              at first order in the first and the last step, as in diffusers.
    ValueError for an unknown solver or less than one step.
    """
    solution = solver_steps(x, steps, shift, solver)
    x, t = next(solution)
    while t is not None:
        x, t = solution.send(velocity(x, t))
    return x


def solver_steps(x, steps, shift, solver):
    """`solve` as a generator, so that several videos can take turns: yields (x, t), is sent the velocity
    there, and ends with (x0, None)."""
    sigma, times = schedule(steps, shift, solver)
    lam = ((1 - sigma) / sigma).log().tolist()  # -inf at sigma 1, inf at 0
    sigma, times = sigma.tolist(), times.float().to(x.device)

    def step(x, i, x0, slope):
        """From level i to i + 1 where x0 is expected to move by `slope`: exact for a constant x0 + slope."""
        growth = (1 - sigma[i + 1]) * math.expm1(lam[i] - lam[i + 1])
        return sigma[i + 1] / sigma[i] * x - growth * (x0 + slope)
    older = old = before = None  # x0 at levels i - 2 and i - 1, x at level i - 1
    for i in range(steps):
        velocity = yield x, times[i]
        if solver == "euler":
            x = x + (sigma[i + 1] - sigma[i]) * velocity
            continue
        x0 = x - sigma[i] * velocity
        if i and solver == "unipc":
            x = step(before, i - 1, old, corrector(i - 1, lam, older, old, x0))
        slope = 0 if i in (0, steps - 1) else (x0 - old) * ((lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) / 2)
        older, old, before = old, x0, x
        x = step(x, i, x0, slope)
    yield x, None


def corrector(i, lam, older, old, new):
    """UniPC's slope for the step from level i to i + 1, once x0 at i + 1 is known."""
    if i == 0:
        return (new - old) / 2
    h = lam[i] - lam[i + 1]
    ratio = (lam[i - 1] - lam[i]) / (lam[i + 1] - lam[i])  # where the older one lies, in steps
    phi1 = math.expm1(h)
    phi2 = phi1 / h - 1
    phi3 = phi2 / h - 0.5
    first = (phi2 - 2 * phi3) / phi1 / (1 - ratio)
    return first * (older - old) / ratio + (phi2 / phi1 - first) * (new - old)
