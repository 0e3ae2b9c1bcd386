"""What the losses of preferences report of the pairs that they learn from."""

from jaxscale.types import Array


def sums_over_pairs(
    loss: Array,
    chosen: Array,
    rejected: Array,
    counted: Array,
) -> tuple[Array, Array, dict[str, Array]]:
    """Sums of the loss and of the figures of pairs.

    Args:
        loss: of each pair, [B, P].
        chosen: reward of the chosen answer, [B, P].
        rejected: reward of the rejected one, [B, P].
        counted: [B, P], 1 for a pair that this device counts, and 0 elsewhere.
    Returns:
        (sum_loss, number of pairs, {"accuracy": how often the chosen answer has the greater reward,
        "margin": chosen less rejected, "chosen_reward", "rejected_reward"}).
    """
    margin = chosen - rejected
    figures = {
        "accuracy": margin > 0,
        "margin": margin,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    sums = {name: (figure * counted).sum() for name, figure in figures.items()}
    return (loss * counted).sum(), counted.sum(), sums
