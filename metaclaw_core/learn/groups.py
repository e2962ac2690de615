"""Groups of siblings as values: what each member is to learn, and what is said of the prompt they answer.

Design: a group is centred on the mean of its members and on nothing else (`advantage.grpo`); one that tells nothing apart has a
reason. `Siblings` is what `optimise` learns from: its samples are the members, what it says of a step is said of the prompts, for
those are the turns that the journal claims. Members bear negative numbers, so none is ever taken for a turn of the store.

Limits: every score enters the tracker, of groups that are left out, too; a member that the optimiser drops (an impossible token)
is left out of its group's mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from metaclaw_core.learn.advantage import Tracker, grpo, key_of
from metaclaw_core.learn.batch import Int32, LeftOut, Sample
from metaclaw_core.learn.cluster import Clusters
from metaclaw_core.learn.journal import Trained
from metaclaw_core.learn.optimise import mean
from metaclaw_core.learn.ranking import Asked
from metaclaw_core.model import Json

LOWEST, HIGHEST = 0.2, 0.8  # values of the tracker between which a prompt is worth its siblings


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a logged answer was sampled from."""

    turn: int  # id in `turns`: what the journal claims
    session: str
    split_by: str
    created_at: float
    ids: Int32  # (P,)
    max_tokens: int
    stops: tuple[str, ...]  # of the client
    tools: bool  # the request declared some
    asked: Asked
    text: str  # the human's, for the task's cluster; "": none
    agent: str
    cluster: str = ""
    value: float = 0.5  # what the tracker expects

    @property
    def promising(self) -> bool:
        return LOWEST <= self.value <= HIGHEST


@dataclass(frozen=True, slots=True)
class Member:
    """One sibling. Its sample has a negative number in place of a turn's."""

    sample: Sample  # `reward`: its worth within the group
    score: float | None  # by itself
    cut: bool = False

    @property
    def may_learn(self) -> bool:
        return not self.cut and self.sample.tokens.size > 0  # a server may end a reply without a token


@dataclass(frozen=True, slots=True)
class Group:
    prompt: Prompt
    members: tuple[Member, ...]
    paired: bool = False
    problem: str | None = None  # why it has no members

    @property
    def reason(self) -> str | None:
        """Why it teaches nothing; None: it does."""
        if self.problem is not None:
            return self.problem
        worth = [m.sample.earned for m in self.members if m.may_learn]
        if grpo([worth])[0] is not None:
            return None
        known = sum(w is not None for w in worth)
        return "its siblings earned the same" if known > 1 else "too few of its siblings could be judged"


@dataclass(frozen=True, slots=True)
class Siblings:
    """The groups of a step, as `optimise` learns from them."""

    groups: tuple[Group, ...]
    clusters: Clusters
    taught: bool = False  # by a teacher as well, who needs no group

    @property
    def samples(self) -> list[Sample]:
        return [m.sample for g in self.groups for m in g.members if m.may_learn and self._learns(g, m)]

    def _learns(self, group: Group, member: Member) -> bool:
        return self.taught or (group.reason is None and member.sample.earned is not None)

    def advantages(self, tracker: Tracker, good: Sequence[Sample]) -> tuple[Mapping[int, float], Tracker]:
        chosen = {s.turn for s in good}
        given: dict[int, float] = {}
        for group in self.groups:
            numbers = [m.sample.turn for m in group.members]
            worth = [m.sample.earned if m.sample.turn in chosen else None for m in group.members]
            for number, value in zip(numbers, grpo([worth])[0] or [], strict=False):
                if value is not None:
                    given[number] = value
            for member in group.members:
                if member.score is not None:
                    tracker = tracker.seen(key_of(group.prompt.cluster, group.prompt.agent), member.score)
        return given, tracker

    def told(self, said: Sequence[Trained]) -> list[Trained]:
        of = {one.turn: one for one in said}
        return [self._told(g, [of[m.sample.turn] for m in g.members if m.sample.turn in of]) for g in self.groups]

    def _told(self, group: Group, said: Sequence[Trained]) -> Trained:
        """A prompt is trained on if one of its siblings is; it has no advantage of its own."""
        trained = [one for one in said if one.reason is None]
        reason = None if trained else group.reason or next((one.reason for one in said), str(LeftOut.NO_SIGNAL))
        ratios = [one.mean_ratio for one in said if one.mean_ratio is not None]
        return Trained(group.prompt.turn, reason, mean(_scores([group])), None, mean(ratios), 0)

    def metrics(self, said: Sequence[Trained]) -> dict[str, Json]:
        drawn = sum(len(g.members) for g in self.groups)
        return {
            "turns": drawn,
            "skipped": drawn - sum(one.reason is None for one in said),
            "reward_mean": mean(_scores(self.groups)),
            "sessions": len({g.prompt.session for g in self.groups}),
            "groups": len(self.groups),
            "groups_without_signal": sum(g.reason is not None for g in self.groups),
            "groups_paired": sum(g.paired for g in self.groups),
            "cut": sum(m.cut for g in self.groups for m in g.members),
            "malformed": sum(m.sample.malformed for g in self.groups for m in g.members),
        }


def _scores(groups: Iterable[Group]) -> list[float]:
    return [m.score for g in groups for m in g.members if m.score is not None]
