"""The paper's headline, for the passages of `05.md`."""


def values() -> dict[str, float]:
    """Name → number for the passages of `05.md`."""
    return {
        "paper_speed": 1.92,
        "paper_lost": 1.5,
        "paper_twice": 3,
        "speed_least": 1.5,
    }
