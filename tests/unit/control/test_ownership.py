"""Whether `up` may claim a bucket, from what it knows of the one that claimed it last."""

import pytest

from shoal_cluster.control.catalog import Catalog, Owner
from shoal_cluster.control.ownership import host_identity, objection

OWNER = Owner(incarnation="i", address="127.0.0.1:7700", since_ms=5, host="there/1")


@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize("host", ["here/2", "there/1"])
def test_a_bucket_that_somebody_gave_up_is_free(host, take_over):
    assert objection(None, host=host, answers=False, take_over=take_over) is None


@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize("host", ["here/2", "there/1"])
def test_an_owner_that_answers_is_never_taken_over(host, take_over):
    reason = objection(OWNER, host=host, answers=True, take_over=take_over)
    assert reason is not None and "127.0.0.1:7700" in reason and "Stop that one first" in reason


def test_an_owner_of_this_machine_that_does_not_answer_is_gone():
    assert objection(OWNER, host="there/1", answers=False, take_over=False) is None


@pytest.mark.parametrize("host", ["here/1", "there/2"])
def test_an_owner_of_another_machine_cannot_be_asked_and_keeps_the_bucket(host):
    """Its loopback address is not ours: silence there tells nothing."""
    reason = objection(OWNER, host=host, answers=False, take_over=False)
    assert reason is not None and "'there'" in reason and "--take-over" in reason
    assert objection(OWNER, host=host, answers=False, take_over=True) is None


def test_the_owner_and_its_machine_survive_in_the_catalog():
    assert Catalog.from_wire(Catalog(owner=OWNER).to_wire()).owner == OWNER


def test_a_machine_is_itself():
    assert host_identity() == host_identity() != "/"
