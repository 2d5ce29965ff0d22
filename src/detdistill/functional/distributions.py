"""Distributions over the steps of a scale, such as those of box sides: from one scale to another.

Shape letters: S steps of the given scale, T steps of the wanted scale.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step_positions(
    steps: Tensor, origins: Tensor, units: Tensor, onto_origins: Tensor, onto_units: Tensor, least_unit: float = 1e-6
) -> Tensor:
    """Positions of the steps of one scale on another; a step s of a scale lies at the coordinate ``origin + unit * s``.

    For equal scales the positions are exactly the steps.

    Args:
        steps: [S] steps of the given scale.
        origins: [...] coordinate of its step 0.
        units: [...] length of its step; may be negative.
        onto_origins: [...] coordinate of step 0 of the wanted scale.
        onto_units: [...] length of its step; may be negative.
        least_unit: a smaller length of the wanted scale's step is replaced by this one (boxes without an area).

    Returns:
        [..., S].

    Example:
        >>> one, two = torch.tensor([10.0]), torch.tensor([2.0])
        >>> step_positions(torch.tensor([0.0, 3.0]), one, two, one + 1, two / 2).tolist()
        [[-1.0, 5.0]]
    """
    sign = torch.where(onto_units < 0, -1.0, 1.0).to(onto_units)
    length = torch.where(onto_units.abs() < least_unit, sign * least_unit, onto_units)
    return ((origins - onto_origins) / length)[..., None] + (units / length)[..., None] * steps


def project_distribution(probabilities: Tensor, positions: Tensor, steps: Tensor) -> Tensor:
    """Move the mass of a distribution to the steps of another scale.

    Each mass goes to the two wanted steps around its position, in proportion to nearness (as the targets of GFL's distribution
    loss; Bellemare et al., "A Distributional Perspective on Reinforcement Learning", ICML 2017, Eq. 7). Mass below the first
    or above the last step goes to that step.

    The result is exact (the same distribution) if every position with mass is one of the wanted steps. If all lie between the
    first and the last step, the mean is exact and the spread grows by at most half a step. Beyond them the mean moves, too.

    Args:
        probabilities: [..., S], sums to 1.
        positions: [..., S] position of each mass on the wanted scale.
        steps: [T] wanted steps in ascending order, at least two.

    Returns:
        [..., T], sums to 1.

    Example:
        >>> project_distribution(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 2.25]), torch.arange(4.0)).tolist()
        [0.0, 0.5, 0.375, 0.125]
    """
    inside = positions.clamp(steps[0], steps[-1]).contiguous()
    below = (torch.searchsorted(steps, inside, right=True) - 1).clamp(0, len(steps) - 2)
    above = (inside - steps[below]) / (steps[below + 1] - steps[below])
    projected = probabilities.new_zeros(*probabilities.shape[:-1], len(steps))
    projected.scatter_add_(-1, below, probabilities * (1 - above))
    return projected.scatter_add_(-1, below + 1, probabilities * above)
