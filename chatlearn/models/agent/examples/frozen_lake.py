"""``FrozenLake``: an environment to try the service with. Needs nothing but Python.

    E=chatlearn/models/agent/examples/frozen_lake.py:FrozenLake
    chatlearn data serve-environment --env $E

A task is a 4x4 lake made from its number; every lake can be crossed::

    P _ _ O      P player, _ ice, O hole, G goal
    _ O _ _
    _ _ _ O
    O _ _ G
"""

from __future__ import annotations

import random
import re
from typing import Any, ClassVar

from chatlearn.data.environment.protocol import Evaluation, Step

SIZE = 4
HOLES = 4
MAX_STEPS = 12
_MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
_START, _GOAL = (0, 0), (SIZE - 1, SIZE - 1)
_QUESTION = (
    "You (P) stand on a frozen lake of ice (_) and holes (O). Walk to the goal (G) without falling "
    "into a hole. Answer with one word: up, down, left or right."
)

Place = tuple[int, int]


class FrozenLake:
    """An action is a text; the first of the four words in it is the move.

    The score is 1 at the goal, else up to 0.5 for how near the player came before the end.
    """

    splits: ClassVar[dict[str, range]] = {"train": range(64), "test": range(1000, 1016)}

    @classmethod
    def tasks(cls, split: str) -> list[dict[str, Any]]:
        numbers = cls.splits[split]
        return [{"task_id": f"lake-{number}", "query": _QUESTION} for number in numbers]

    def create(self, task_id: str, params: dict[str, Any]) -> str:
        number = re.fullmatch(r"lake-(\d+)", task_id)
        if number is None:
            raise KeyError(task_id)
        self.holes = _holes(int(number[1]))
        self.place: Place = _START
        self.nearest = _distance(_START)
        self.steps, self.is_over = 0, False
        return self._drawn()

    def step(self, action: Any) -> Step:
        if self.is_over:
            return Step("The game is over.\n" + self._drawn(), done=True)
        self.steps += 1
        words = re.findall(r"[a-z]+", str(action).lower())
        move = next((word for word in words if word in _MOVES), None)
        if move is not None:
            self.place = _moved(self.place, move)
            if self.place not in self.holes:
                self.nearest = min(self.nearest, _distance(self.place))
        at_end = self.place == _GOAL or self.place in self.holes
        said = self._drawn() if move else "Say up, down, left or right.\n" + self._drawn()
        self.is_over = at_end or self.steps >= MAX_STEPS
        reward = float(self.place == _GOAL)
        return Step(said, reward=reward, done=self.is_over, info={"move": move})

    def evaluate(self, messages: list[dict[str, Any]]) -> Evaluation:
        is_there = self.place == _GOAL
        score = 1.0 if is_there else 0.5 * (1 - self.nearest / _distance(_START))
        return Evaluation(score, {"steps": self.steps, "success": is_there})

    def release(self) -> None:
        """Holds nothing."""

    def _drawn(self) -> str:
        def sign(place: Place) -> str:
            if place == self.place:
                return "P"
            if place == _GOAL:
                return "G"
            return "O" if place in self.holes else "_"

        rows = range(SIZE)
        return "\n".join(" ".join(sign((row, column)) for column in rows) for row in rows)


def _holes(number: int) -> frozenset[Place]:
    """The first lake of a seeded series that can be crossed."""
    chance = random.Random(number)
    ice = [(row, column) for row in range(SIZE) for column in range(SIZE)]
    ice = [place for place in ice if place not in (_START, _GOAL)]
    while True:
        holes = frozenset(chance.sample(ice, HOLES))
        if _can_be_crossed(holes):
            return holes


def _can_be_crossed(holes: frozenset[Place]) -> bool:
    seen, to_visit = {_START}, [_START]
    while to_visit:
        place = to_visit.pop()
        near = {_moved(place, move) for move in _MOVES} - seen - holes
        seen |= near
        to_visit += near
    return _GOAL in seen


def _moved(place: Place, move: str) -> Place:
    """One step on, or the same place at the shore."""
    row, column = (at + by for at, by in zip(place, _MOVES[move], strict=True))
    return (row, column) if 0 <= row < SIZE and 0 <= column < SIZE else place


def _distance(place: Place) -> int:
    """Steps to the goal if there were no holes."""
    return sum(abs(at - goal) for at, goal in zip(place, _GOAL, strict=True))
