"""The counters of a sink."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rollout.trajectory.roll import RollReport

__all__ = ["SinkStats"]


@dataclass(frozen=True, slots=True)
class SinkStats:
    """Counters of a sink since it was opened.

    Attributes:
        num_written: Episodes acknowledged.
        num_duplicates: Episodes that were there already, when written or when rolled.
        num_committed: Episodes committed, recovered ones included.
        num_recovered: Episodes committed from logs that dead writers had left.
        num_rows: Rows committed, in all tables.
        num_bytes: Size of the Parquet files.
        torn_bytes: What was cut from the ends of logs: writes that were never acknowledged.
        num_damaged: Records that were lost in the middle of logs.
        num_foreign_logs: Logs that are none, or of another run; left alone.
        num_failed_rolls: Rolls that failed and were, or will be, tried again.
        waited_s: Seconds that `write` waited for room, in all threads.
    """

    num_written: int = 0
    num_duplicates: int = 0
    num_committed: int = 0
    num_recovered: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    torn_bytes: int = 0
    num_damaged: int = 0
    num_foreign_logs: int = 0
    num_failed_rolls: int = 0
    waited_s: float = 0.0

    def with_roll(self, report: RollReport, *, recovered: bool = False) -> SinkStats:
        """The counters after a log was rolled."""
        return replace(
            self,
            num_committed=self.num_committed + report.num_episodes,
            num_recovered=self.num_recovered + (report.num_episodes if recovered else 0),
            num_duplicates=self.num_duplicates + report.num_duplicates,
            num_rows=self.num_rows + report.num_rows,
            num_bytes=self.num_bytes + report.num_bytes,
            torn_bytes=self.torn_bytes + report.torn_bytes,
            num_damaged=self.num_damaged + report.num_damaged,
        )
