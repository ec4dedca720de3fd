from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.session import (
    Position,
    Sessions,
    SessionToken,
    merge_tokens,
    token_from_proto,
    token_to_proto,
)
from tests.unit.client.fake_server import token

POSITIONS = st.builds(Position, st.integers(0, 3), st.integers(0, 9))
TOKENS = st.builds(
    SessionToken,
    collection_id=st.just("c1"),
    positions=st.dictionaries(st.integers(0, 3), POSITIONS, max_size=4),
)


@given(TOKENS, TOKENS)
@settings(max_examples=200, deadline=None)
def test_merging_takes_the_larger_position_of_each_shard(
    left: SessionToken, right: SessionToken
) -> None:
    merged = merge_tokens(left, right)
    for shard in left.positions.keys() | right.positions.keys():
        candidates = [t.positions[shard] for t in (left, right) if shard in t.positions]
        assert merged.positions[shard] == max(candidates)
    assert merged == merge_tokens(right, left)


def test_a_later_epoch_wins_over_a_larger_seq() -> None:
    sessions = Sessions()
    sessions.observe("notes", token(s0=(1, 900)))
    sessions.observe("notes", token(s0=(2, 1)))
    sessions.observe("notes", token(s0=(1, 901)))
    assert sessions.token("notes").positions == {0: Position(2, 1)}


def test_a_collection_created_anew_starts_a_new_session() -> None:
    sessions = Sessions()
    sessions.observe("notes", token("c1", s0=(5, 5), s1=(1, 1)))
    sessions.observe("notes", token("c2", s0=(1, 1)))
    assert sessions.token("notes") == SessionToken(
        collection_id="c2", positions={0: Position(1, 1)}
    )


def test_a_reply_without_a_token_changes_nothing() -> None:
    sessions = Sessions()
    sessions.observe("notes", token(""))
    assert sessions.message("notes") is None
    sessions.observe("notes", token(s0=(1, 1)))
    sessions.observe("notes", token(""))
    assert sessions.token("notes").positions == {0: Position(1, 1)}


def test_sessions_of_different_collections_do_not_mix() -> None:
    sessions = Sessions()
    sessions.observe("notes", token(s0=(1, 1)))
    assert sessions.message("other") is None
    sessions.forget("notes")
    assert sessions.message("notes") is None


def test_tokens_survive_the_wire() -> None:
    message = token(s1=(2, 3), s0=(1, 2))
    assert token_from_proto(token_to_proto(token_from_proto(message))) == token_from_proto(message)
