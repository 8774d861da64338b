"""Amounts of retraining: the same few for every method. Chapters 5 and 7."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """How much a compressed model is trained again.

    Attributes:
        share: of the fit rows; 0: not at all.
        epochs: passes over them.
        teacher: learn the dense model's logits; else the labels.
    """

    share: float
    epochs: int
    teacher: bool

    @classmethod
    def named(cls, name: str) -> "Arm":
        """Return one of `ARMS`, or `0.01x3`: 1 % of the rows, 3 epochs, a teacher.

        Raises:
            ValueError: neither.

        >>> Arm.named("0.01x3")
        Arm(share=0.01, epochs=3, teacher=True)
        """
        if name in ARMS:
            return ARMS[name]
        share, _, epochs = name.partition("x")
        try:
            arm = cls(float(share), int(epochs), True)
        except ValueError:
            arm = cls(0.0, 0, True)
        if not (0 < arm.share <= 1 and arm.epochs > 0):
            raise ValueError(
                f"no retraining {name!r}; there are {', '.join(ARMS)} and such as "
                "0.01x3, a share of the rows and epochs."
            )
        return arm


ARMS = {
    "none": Arm(0.0, 0, False),
    "paper": Arm(0.1, 1, False),  # 10 % of the rows, one epoch, on labels
    "full": Arm(1.0, 3, True),
}
