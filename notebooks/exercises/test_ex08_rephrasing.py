import random

import train


def test_by_hand(answer):
    assert answer.lost_and_added("Founded in 1278.", "The year 1278 saw it begin.") == (set(), set())
    found = answer.lost_and_added("Born in 1640, died in 1702.", "Born in 1641.")
    assert found == ({"1640", "1702"}, {"1641"})
    assert answer.lost_and_added("It has 12 rooms.", "Twelve rooms it has.") == (set(), set())
    assert answer.lost_and_added("1,200 people.", "200 people and 1 dog.") == ({"1200"}, {"200", "1"})
    assert answer.lost_and_added("It is 2.5 miles.", "It is 2 miles, or 5.") == ({"2.5"}, {"2", "5"})


def test_on_a_world(answer):
    rng = random.Random(0)
    for entity in train.invent_world(3, people=12):
        source = train.article(entity, rng)
        for style in train.STYLES:
            assert answer.lost_and_added(source, train.tell(entity, style, rng)) == (set(), set()), style
