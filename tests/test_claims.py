"""Claims: who works on what, and how long a killed or silent holder stops others."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import claims
from harness.claims import Claims
from harness.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "root"))


def test_a_claim_is_held_by_one_until_it_is_released(store):
    mine, yours = Claims(store, "me"), Claims(store, "you")
    with mine.take("cell"):
        assert yours.take("cell") is None
        assert yours.held_by_others(["cell", "other"]) == {"cell"}
        assert mine.held_by_others(["cell", "other"]) == set()
    with yours.take("cell"):
        assert mine.take("cell") is None
    assert store.names("claims") == []


def test_of_many_that_ask_at_once_one_gets_it(store):
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda n: Claims(store, f"run{n}").take("cell"), range(8)))
    (claim,) = [claim for claim in taken if claim is not None]
    claim.release()


def test_a_trial_that_is_started_again_takes_over_its_own_claim(store):
    first = Claims(store, "run/trial").take("cell")
    second = Claims(store, "run/trial").take("cell")
    assert second is not None
    second.release()
    first.release()


def test_a_holder_that_is_killed_on_this_machine_is_missed_at_once(store):
    code = (
        "import os, signal, sys\n"
        "from harness.claims import Claims\n"
        "from harness.store import Store\n"
        "assert Claims(Store(sys.argv[1]), 'killed', 1e6).take('cell')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, store.root], check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.names("claims") == ["cell.json"]
    with Claims(store, "me").take("cell"):
        pass


def test_a_holder_that_falls_silent_elsewhere_stops_others_for_its_time_to_live(store, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    Claims(store, "silent", ttl=2.0)._store.publish("claims/cell.json", Claims(store, "silent", ttl=2.0)._record())
    ends = time.time() + 2.0
    monkeypatch.undo()
    monkeypatch.setattr(claims, "LOOK_SECONDS", 0.05)
    mine = Claims(store, "me")
    assert mine.take("cell") is None
    with mine.wait_for("cell"):
        assert time.time() >= ends - 0.1


def test_a_claim_outlasts_its_time_while_its_holder_lives(store, monkeypatch):
    monkeypatch.setattr(claims, "BEATS", 20)
    with Claims(store, "me", ttl=2.0).take("cell"):
        time.sleep(3)
        assert Claims(store, "you").take("cell") is None


def test_a_holder_that_was_taken_for_dead_leaves_the_claim_to_its_successor(store):
    first = Claims(store, "suspended", ttl=-1.0)
    store.publish("claims/cell.json", first._record())
    with Claims(store, "me").take("cell"):
        assert not first.renew("cell")
        first.release("cell")
        assert Claims(store, "you").take("cell") is None


def test_a_damaged_claim_is_nobodys(store):
    store.publish("claims/cell.json", b'{"owner": ')
    with Claims(store, "me").take("cell"):
        pass
