"""What DLC says of the machines, and what of it is refused."""

from __future__ import annotations

import pytest

from chatlearn.cluster.nodes import Node
from chatlearn.errors import ConfigError


def test_nothing_set_is_one_machine():
    assert Node.of({}) == Node(rank=0, count=1, head="127.0.0.1", port=12456)
    assert Node.of({"RANK": "", "WORLD_SIZE": "1"}).is_head


def test_four_variables_place_a_machine():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "23456"}
    node = Node.of(environ)
    assert node == Node(rank=1, count=2, head="10.0.0.7", port=23456)
    assert not node.is_head


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK=2 with WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
    ],
)
def test_what_contradicts_itself_is_refused(environ, message):
    with pytest.raises(ConfigError, match=message):
        Node.of(environ)
