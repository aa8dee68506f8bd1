"""Differential privacy of an expert's training."""

import dataclasses

from flexolmo_jax.config.model import require
from flexolmo_jax.config.training import ExpertTraining


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """What a data owner requires of differentially private training; the noise is calibrated to it.

    In this mode `data.batch_size` is the mean number of units in a batch. There is no key or seed:
    noise and batches are drawn from the operating system's entropy.
    """

    epsilon: float  # of the whole run, router rows included
    delta: float | None = None  # None: the ledger's; else 0.1 / units, at most 1e-5
    clip: float = 0.1  # C, the norm to which the gradient of each unit is clipped
    unit: str = "document"  # or "sequence" (a window), or "group:FIELD" (a patient, an author)
    windows: int = 8  # maximum windows per unit and step; longer units are subsampled
    microbatch_size: int = 8  # units whose gradients a device holds at the same time
    limit: float | None = None  # epsilon of all runs in the ledger; None: unchanged, or `epsilon`

    def __post_init__(self):
        for name in ("epsilon", "clip", "limit"):
            found = getattr(self, name)
            ok = found is None or 0 < found < float("inf")
            require(ok, f"{name} must be positive and finite, found {found}")
        require(
            self.delta is None or 0 < self.delta < 1, f"delta must be in (0, 1), found {self.delta}"
        )
        require(
            self.unit in ("document", "sequence")
            or (self.kind, bool(self.group_field)) == ("group", True),
            f"unit must be document, sequence or group:FIELD, found {self.unit!r}",
        )
        for name in ("windows", "microbatch_size"):
            found = getattr(self, name)
            require(found > 0, f"{name} must be positive, found {found}")

    @property
    def kind(self) -> str:
        """The kind of units: document, sequence or group."""
        return self.unit.partition(":")[0]

    @property
    def group_field(self) -> str:
        """FIELD of group:FIELD, or ""."""
        return self.unit.partition(":")[2]

    def applied_to(self, config: ExpertTraining) -> ExpertTraining:
        """The config with FIELD as the group field, so that no group is held out partially."""
        if not self.group_field:
            return config
        data = dataclasses.replace(config.data, group_field=self.group_field)
        return dataclasses.replace(config, data=data)
