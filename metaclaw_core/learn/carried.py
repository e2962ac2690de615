"""What one step hands on to the next: the expected rewards and the clusters of tasks.

Design: kept by name in the journal (`journal.carried`) and written in the transaction of the step that used them, so a step that
is done again after a kill begins with the same.
"""

from __future__ import annotations

from metaclaw_core.learn import journal
from metaclaw_core.learn.advantage import Tracker
from metaclaw_core.learn.cluster import Clusters
from metaclaw_core.model import Json
from metaclaw_core.store.rollouts import Store


def tracker_of(store: Store) -> Tracker:
    """An empty one before the first step."""
    kept = journal.carried(store, "tracker")
    return Tracker.from_json(kept) if kept else Tracker()


def clusters_of(store: Store) -> Clusters:
    """None before the first step."""
    return Clusters.from_json(journal.carried(store, "clusters") or [])


def to_carry(tracker: Tracker, clusters: Clusters) -> dict[str, Json]:
    """For the journal."""
    return {"tracker": tracker.to_json(), "clusters": clusters.to_json()}
