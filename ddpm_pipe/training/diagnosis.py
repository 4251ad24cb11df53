"""What the log of a run shows: one sentence for each state that docs/when_it_goes_wrong.md names.

Every rule is a function of the entries of metrics.jsonl alone, so a resumed run tells the same at the same steps.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

Entry = Mapping[str, Any]
PAGE = "docs/when_it_goes_wrong.md"

SIGNIFICANT = 3.0
"""Standard errors that a change must exceed."""
RISE = 0.02
"""Smallest rise of the held-out loss, relative to its lowest value."""
OUTWEIGHS = 5.0
"""How much larger the rises of the noise levels must be together than the falls of the others."""
COLOURS_APART = 0.5
"""Smallest difference of mean colours, in standard deviations of the mean colours of images."""
COPIES = 1 / 3
"""Smallest share of samples that are nearer to a training image than 95 % of the test images are."""
FALL = 0.1
"""Smallest fall of the loss of most levels, in logarithms, from the second quarter of the run so far to the rest."""
STALLED = 1 / 2
"""Largest fall of a level that stalls, relative to that of most others."""
LEAST_SIGNAL, MOST_SIGNAL = 0.02, 0.95
"""Mean alpha_bar below and above which a noise level is not judged: there is too little of the image to learn from, or
too little noise to be told from the grain of the image."""
NOISY = 0.2
"""Mean alpha_bar below which composition and colour are decided."""
FEWEST = 4
"""Fewest values of a level in a quarter of the run so far."""


def diagnose(entries: Sequence[Entry], signal: Mapping[str, float]) -> dict[str, str]:
    """Return the states that hold after the last entry, as headings of the page, with a sentence for each.

    Args:
        entries: entries of the log, oldest first.
        signal: mean alpha_bar of each noise level, by the name that it has in the log, such as "t_00%".
    """
    found = {
        "Held-out loss rises": held_out_rises(entries),
        "A noise level stalls": level_stalls(entries, signal),
        "Wrong colours": colours_apart(entries),
        "Copies of training images": copies(entries),
    }
    return {heading: f'{told} See "{heading}" in {PAGE}.' for heading, told in found.items() if told}


def held_out_rises(entries: Sequence[Entry]) -> str | None:
    """Tell whether the last two held-out losses both lie above the lowest one before them.

    A network that learns its images by heart loses much at little noise, where their details are, and hardly anything
    elsewhere. What is left to chance moves some noise levels up and others down, so the rises must outweigh the falls.
    """
    losses = [entry for entry in entries if entry.get("held_out_loss") is not None]
    if len(losses) < 3:
        return None
    lowest = min(losses[:-2], key=lambda entry: entry["held_out_loss"])
    if not all(_has_risen(lowest, entry) for entry in losses[-2:]):
        return None
    rise = losses[-1]["held_out_loss"] / lowest["held_out_loss"] - 1
    return (
        f"The loss on held-out images has risen by {rise:.0%} since step {lowest['step']}: the network learns its "
        "training images by heart; give it more images, --flip, dropout in --unet, or fewer --steps."
    )


def _has_risen(before: Entry, after: Entry) -> bool:
    rise = after["held_out_loss"] - before["held_out_loss"]
    levels = [after[name] - before[name] for name in before if name.startswith("held_out_loss/") and name in after]
    rises, falls = (sum(max(sign * change, 0) for change in levels) for sign in (1, -1))
    return rise >= RISE * before["held_out_loss"] and rises > OUTWEIGHS * falls


def level_stalls(entries: Sequence[Entry], signal: Mapping[str, float]) -> str | None:
    """Tell whether the training loss of one noise level stays where it is while that of most others falls.

    The loss of the second quarter of the run so far is compared with that of its second half. A level that has fallen
    since the first entry by half as much as most others, in logarithms, has converged and does not stall.
    """
    rows = [entry for entry in entries if entry.get("loss") is not None]
    levels = {
        name: _fall([(row["step"], row[f"loss/{name}"]) for row in rows if f"loss/{name}" in row]) for name in signal
    }
    falls = {name: fall for name, fall in levels.items() if fall is not None}
    for name, (fall, error, learnt) in falls.items():
        others = [other for key, other in falls.items() if key != name]
        if len(others) < 2 or not LEAST_SIGNAL <= signal[name] <= MOST_SIGNAL:
            continue
        usual = median(other[0] for other in others)
        converged = learnt > median(other[2] for other in others) / 2
        if usual > FALL and fall + 2 * error < STALLED * usual and not converged:
            noisy = "--prediction_type v_prediction, --beta_schedule cosine and --loss_weight none"
            remedy = noisy if signal[name] < NOISY else "more channels or attention in --unet, or more --steps"
            return (
                f"The loss of noise level {name} does not fall, while that of most others has fallen by "
                f"{1 - math.exp(-usual):.0%} since the first half of the run; try {remedy}."
            )
    return None


def _fall(points: list[tuple[int, float]]) -> tuple[float, float, float] | None:
    """Return ln(second quarter / second half), its standard error, and ln(first value / second half) of a loss."""
    last = points[-1][0] if points else 0
    before = [loss for step, loss in points if last / 4 < step <= last / 2]
    after = [loss for step, loss in points if last / 2 < step]
    if min(len(before), len(after)) < FEWEST or min(points, key=lambda point: point[1])[1] <= 0:
        return None
    means = fmean(before), fmean(after)
    errors = [stdev(part) / mean / math.sqrt(len(part)) for part, mean in zip((before, after), means)]
    return math.log(means[0] / means[1]), math.hypot(*errors), math.log(points[0][1] / means[1])


def colours_apart(entries: Sequence[Entry]) -> str | None:
    """Tell whether the samples of the averaged and of the raw network, from the same noise, differ in mean colour.

    They must differ in the last two grids, because the raw network of a healthy run wavers for a while.
    """
    compared = [entry for entry in entries if entry.get("colour_gap") is not None][-2:]
    if len(compared) < 2:
        return None
    if any(entry["colour_gap"] < max(COLOURS_APART, SIGNIFICANT * entry["colour_gap_error"]) for entry in compared):
        return None
    last = compared[-1]
    told = (
        "The samples of the averaged and of the raw network differ in mean colour by "
        f"{last['colour_gap']:.1f} standard deviations of that of the images"
    )
    if last["colour/average"] > last["colour/raw"]:
        return f"{told}, and the average is farther off: it spans too many steps; lower --ema_decay or --ema_power."
    return f"{told}, and the raw network is farther off: lower --learning_rate, or let it decay with --lr_schedule."


def copies(entries: Sequence[Entry]) -> str | None:
    """Tell whether more samples are near to training images than chance explains.

    Of test images, 5 % are as near. Among 16 samples, a third or more is so by chance once in ten thousand grids.
    """
    shares = [entry["near_copies"] for entry in entries if entry.get("near_copies") is not None]
    if not shares or shares[-1] < COPIES:
        return None
    return (
        f"{shares[-1]:.0%} of the samples are closer to a training image than 95 % of the test images are: the network "
        "copies; give it more images, --flip, dropout in --unet, or fewer --steps."
    )
