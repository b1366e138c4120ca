"""What this machine can do for rollouts: probes that try the thing itself, and what each engine needs.

A probe is a function without arguments that matter (paths may be given, for tests) that returns a `Finding`.
It tries the thing rather than looking whether a file exists, leaves nothing behind, and never raises: what it
could not find out is a finding too.

Not guaranteed: that a machine which passes can hold a given run. Sizes are reported, not weighed against a
configuration.
"""

from rollout.doctor.finding import ENGINES, Finding, Status, verdicts
from rollout.doctor.isolation import isolation_findings
from rollout.doctor.machine import machine_findings
from rollout.doctor.paging import paging_findings
from rollout.doctor.virtualisation import virtualisation_findings

__all__ = [
    "ENGINES",
    "Finding",
    "Status",
    "isolation_findings",
    "machine_findings",
    "paging_findings",
    "verdicts",
    "virtualisation_findings",
]
